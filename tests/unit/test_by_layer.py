"""Settings with one value, or one for the final layer and one for the lens layers."""

import pytest

from distilllens.by_layer import TailChoice, parse_by_layer, parse_tail_choices


def test_a_setting_is_one_value_or_one_for_the_final_layer_and_one_for_the_lens() -> None:
    def parse(text: str, layers: tuple[int, ...] = (4, 12)) -> dict[int, int]:
        return parse_by_layer("--top-k", text, layers, int, default=0)

    assert parse("16") == {4: 16, 12: 16}
    assert parse("final=64, lens=32", (4, 8, 12)) == {4: 32, 8: 32, 12: 64}
    assert parse("8,final=64") == {4: 8, 12: 64}
    assert parse("lens=8") == {4: 8, 12: 0}


@pytest.mark.parametrize("text", ["x", "first=1,lens=2", "final=3,lens=4,5", "final=3,final=4", "", "lens=", "1,2"])
def test_a_setting_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--top-k"):
        parse_by_layer("--top-k", text, (4, 12), int, default=0)


def test_tails_are_chosen_for_all_layers_or_for_some() -> None:
    assert parse_tail_choices("bucket") == (TailChoice("bucket"), TailChoice("bucket"))
    assert parse_tail_choices("lens=profile,final=sketch:64") == (TailChoice("sketch", 64), TailChoice("profile"))
    assert parse_tail_choices("final=renorm") == (TailChoice("renorm"), None)
    assert str(TailChoice("sketch", 64)) == "sketch:64"


@pytest.mark.parametrize("text", ["bag", "profile:3", "sketch:0", "sketch:x", "final=tree"])
def test_a_tail_that_does_not_exist_is_refused_with_those_that_do(text: str) -> None:
    with pytest.raises(ValueError, match="bucket, profile, sketch, sampled, renorm"):
        parse_tail_choices(text)

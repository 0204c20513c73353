"""What is stored of a layer's tail, as text."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilllens_cache import SketchSpec, TailSpec, parse_tail_spec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("none", TailSpec()),
        ("profile", TailSpec(profile=True)),
        ("sketch:64", TailSpec(sketch=SketchSpec(64, 4))),
        ("sketch:4096:8", TailSpec(sketch=SketchSpec(4096, 8))),
        ("sampled:65535", TailSpec(draws=65535)),
        ("profile+sampled:1", TailSpec(profile=True, draws=1)),
        ("profile+sketch:128:8+sampled:16", TailSpec(True, SketchSpec(128, 8), 16)),
    ],
)
def test_a_text_and_its_spec_say_the_same(text: str, spec: TailSpec) -> None:
    assert parse_tail_spec(text) == spec
    assert str(spec) == text


def test_four_bits_go_without_saying() -> None:
    assert str(parse_tail_spec("sketch:64:4")) == "sketch:64"


@pytest.mark.parametrize(
    "text",
    [
        *("", "+", "profile+", "+profile", "profile+none", "none+profile", "profile+profile", "bucket", "Profile"),
        *("sketch", "sketch:", "sketch:0", "sketch:4097", "sketch:64:", "sketch:64:5", "sketch:-1", "sketch:064"),
        *("sketch:64+sketch:64", "sketch:64+profile", "sampled:4+sketch:64", "sketch:٦", "sketch:6 4", " profile"),
        *("sampled", "sampled:0", "sampled:65536", "sampled:1.5", "sampled:1:2", "profile\n", "x" * 4096),
    ],
)
def test_any_other_text_is_refused_with_the_forms_there_are(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{text[:60]!r} is no stored tail: expected 'none', or some of")):
        parse_tail_spec(text)


@given(st.booleans(), st.none() | st.tuples(st.integers(1, 4096), st.sampled_from([4, 8])), st.integers(0, 65535))
def test_every_spec_comes_back_from_its_text(profile: bool, sketch: tuple[int, int] | None, draws: int) -> None:
    spec = TailSpec(profile, SketchSpec(*sketch) if sketch else None, draws or None)  # type: ignore[arg-type]
    assert parse_tail_spec(str(spec)) == spec


def test_a_spec_knows_what_a_target_costs() -> None:
    assert parse_tail_spec("profile").row_bytes(2) == 0
    assert not parse_tail_spec("profile").has_rows
    assert parse_tail_spec("sketch:65").row_bytes(2) == 33
    assert parse_tail_spec("sketch:65:8").row_bytes(2) == 65
    assert parse_tail_spec("sketch:64+sampled:10").row_bytes(2) == 32 + 2 + 10 * 8
    assert [parse_tail_spec(f"sketch:1:{bits}").sketch.limit for bits in (4, 8)] == [7, 127]  # type: ignore[union-attr]

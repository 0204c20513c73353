"""Layers and pairs: the released lists, the rules, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilllens.layer_maps import PRESETS, check_pairs, derive_pairs, parse_layers, parse_pairs


@pytest.mark.parametrize(
    ("text", "num_layers", "layers"),
    [
        ("anchors:5", 30, (5, 10, 15, 20, 25, 30)),
        ("anchors:5", 48, (8, 16, 24, 32, 40, 48)),
        ("anchors:1", 5, (3, 5)),
        ("stride:4", 12, (4, 8, 12)),
        ("stride:5", 12, (5, 10, 12)),
        ("12,4,8", 12, (4, 8, 12)),
        ("4", 6, (4, 6)),
        ("gpt2-12-48", 48, (8, 16, 24, 32, 40, 48)),
        ("qwen2.5-28-36", 36, (7, 14, 22, 29, 36)),
    ],
)
def test_layers_are_read_and_the_final_one_is_always_there(text: str, num_layers: int, layers: tuple) -> None:
    assert parse_layers(text, num_layers) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("13", "layer 13 does not exist; the teacher has layers 1 to 12"),
        ("0,4", "layer 0 does not exist"),
        ("anchors:0", "expected anchors:N"),
        ("anchors:12", "only 12 layers"),
        ("middle", "neither anchors:N"),
        ("gpt2-12-48", "for a teacher of 48 layers, and this one has 12"),
    ],
)
def test_layers_that_make_no_sense_are_refused_with_a_sentence(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_layers(text, 12)


def test_derived_pairs_match_the_released_gpt2_lists() -> None:
    for name in ("gpt2-12-48", "gpt2-24-48"):
        preset = PRESETS[name]
        layers = (*(teacher for _, teacher in preset.pairs), preset.teacher_layers)
        derived = derive_pairs(
            layers, num_student_layers=preset.student_layers, num_teacher_layers=preset.teacher_layers
        )
        assert derived == preset.pairs


@given(st.integers(2, 60), st.integers(1, 60), st.sets(st.integers(1, 59), max_size=12))
def test_derived_pairs_are_unique_ascending_and_inside_the_student(teacher: int, student: int, inner: set[int]) -> None:
    layers = tuple(sorted({layer for layer in inner if layer < teacher} | {teacher}))
    pairs = derive_pairs(layers, num_student_layers=student, num_teacher_layers=teacher)
    check_pairs(pairs, num_student_layers=student, num_teacher_layers=teacher, cached=layers)
    assert list(pairs) == sorted(set(pairs))
    assert len({s for s, _ in pairs}) == len(pairs)
    assert [t for _, t in pairs] == sorted(t for _, t in pairs)


def test_pairs_are_read_and_none_is_no_pair() -> None:
    assert parse_pairs("2:8,4:16") == ((2, 8), (4, 16))
    assert parse_pairs("none") == ()


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("6:8", "the student has lens layers 1 to 5"),
        ("0:8", "lens layers 1 to 5"),
        ("2:9", "holds 4, 8"),
        ("2:12", "holds 4, 8"),
    ],
)
def test_pairs_outside_the_models_or_the_cache_are_refused(pairs: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pairs(parse_pairs(pairs), num_student_layers=6, num_teacher_layers=12, cached=(4, 8, 12))


@pytest.mark.parametrize("text", ["2-8", "2:8:9", "2:x", "2:8,2:9"])
def test_pairs_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--pairs"):
        parse_pairs(text)

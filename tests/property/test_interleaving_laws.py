"""The weights of a mixture hold in what is drawn, at every moment, whatever they are."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilllens.interleaving import Interleaving

weights = st.lists(st.integers(1, 60), min_size=1, max_size=7)


@given(weights)
@settings(max_examples=200, deadline=None)
def test_every_beginning_has_the_weights_to_within_one_draw(parts: list[int]) -> None:
    interleaving, total, drawn = Interleaving(parts), sum(parts), [0] * len(parts)
    for place in range(2 * total + 3):
        part, before = interleaving[place]
        assert before == drawn[part]
        drawn[part] += 1
        for weight, count in zip(parts, drawn, strict=True):
            assert abs(count * total - weight * (place + 1)) < total
    assert all(interleaving[total * 2 - 1 - n] is not None for n in range(total))


@given(weights, st.lists(st.integers(0, 5000), min_size=1, max_size=8))
@settings(deadline=None)
def test_a_place_is_the_same_in_whatever_order_places_are_asked_for(parts: list[int], places: list[int]) -> None:
    forward = Interleaving(parts)
    everything = [forward[place] for place in range(max(places) + 1)]
    jumping = Interleaving(parts)
    assert [jumping[place] for place in places] == [everything[place] for place in places]


@given(weights)
@settings(deadline=None)
def test_a_period_has_the_exact_counts(parts: list[int]) -> None:
    interleaving = Interleaving(parts)
    for turn in (0, 1, 10**9):
        drawn = [interleaving[turn * interleaving.period + place][0] for place in range(interleaving.period)]
        assert [drawn.count(part) for part in range(len(parts))] == list(interleaving.draws_per_period)


def test_decimals_count_as_written() -> None:
    assert Interleaving([0.7, 0.3]).draws_per_period == (7, 3)
    assert Interleaving([0.1, 0.2, 0.7]).period == 10
    assert Interleaving([Fraction(240), Fraction(48)]).draws_per_period == (5, 1)


def test_few_large_weights_do_not_starve_many_small_ones() -> None:
    interleaving = Interleaving([0.9, 0.025, 0.025, 0.025, 0.025])
    first = [interleaving[place][0] for place in range(40)]
    assert [first.count(part) for part in range(5)] == [36, 1, 1, 1, 1]


@pytest.mark.parametrize("wrong", [[], [1, 0], [0.5, -0.5]])
def test_weights_that_are_none_are_refused(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Interleaving(wrong)

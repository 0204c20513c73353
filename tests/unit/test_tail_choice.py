"""Which tail stands for the rest, given what a cache stores and which divergence reads it."""

from types import SimpleNamespace
from typing import Any

import pytest

from distilllens.matching import choose_tails
from distilllens_cache import parse_tail_spec


def chosen(stored: str, text: str | None = None, **losses: str) -> dict[int, str]:
    identity: Any = SimpleNamespace(layers=(4, 8), tail_specs=dict.fromkeys((4, 8), parse_tail_spec(stored)))
    return {layer: str(choice) for layer, choice in choose_tails(identity, text, [4, 8], **losses).items()}


def test_by_default_it_is_the_best_that_is_stored() -> None:
    assert chosen("profile+sketch:8+sampled:4") == {4: "profile", 8: "profile"}
    assert chosen("sketch:8+sampled:4") == {4: "sketch", 8: "sketch"}
    assert chosen("sampled:4") == {4: "sampled", 8: "sampled"}
    assert chosen("none") == {4: "bucket", 8: "bucket"}


@pytest.mark.parametrize("task", ["rkl", "fkl+rkl", "jeffreys", "akl:0.3"])
def test_reverse_kl_takes_a_sketch_where_there_is_one(task: str) -> None:
    assert chosen("profile+sketch:8", task=task) == {4: "profile", 8: "sketch"}
    assert chosen("profile", task=task) == {4: "profile", 8: "profile"}
    assert chosen("profile+sketch:8", lens_divergence=task) == {4: "sketch", 8: "profile"}


def test_what_is_asked_for_wins() -> None:
    assert chosen("profile+sketch:8", "final=sketch:4", task="fkl") == {4: "profile", 8: "sketch:4"}
    assert chosen("profile+sketch:8", "profile", task="rkl") == {4: "profile", 8: "profile"}
    with pytest.raises(ValueError, match=r"--tail sketch:9 .* stores profile\+sketch:8: choose --tail profile"):
        chosen("profile+sketch:8", "sketch:9")

"""The estimate of a pass: a sample that looks like the whole, bytes near the truth, and when the pass pays."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distilllens.cache_teacher import run_cache_teacher
from distilllens.config import CacheTeacherConfig
from distilllens.data import Example, make_example
from distilllens.free_space import NoSpaceError, Space, folder_size, space_for
from distilllens.pass_estimate import Estimate, describe, estimate, extrapolate, tail_sum_bytes
from distilllens.pass_plan import Plan, open_plan
from distilllens.pass_sample import choose_sample, measure_sample, padded_tokens
from distilllens_cache import CacheReader


def example(number: int, num_targets: int) -> Example:
    return make_example(f"row-{number}", range(num_targets + 2), [False, False, *[True] * num_targets])


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=40)


@settings(deadline=None)
@given(lengths, st.integers(1, 12))
def test_a_sample_is_some_of_the_examples_once_each_in_their_order(counts: list[int], size: int) -> None:
    examples = [example(number, count) for number, count in enumerate(counts)]
    chosen = choose_sample(examples, size)
    places = [int(one.id.removeprefix("row-")) for one in chosen]
    assert 1 <= len(chosen) <= min(size, len(examples))
    assert places == sorted(set(places))


@settings(deadline=None)
@given(lengths, st.integers(1, 12))
def test_an_example_with_its_share_of_all_targets_is_in_the_sample(counts: list[int], size: int) -> None:
    examples = [example(number, count) for number, count in enumerate(counts)]
    chosen = {one.id for one in choose_sample(examples, size)}
    assert all(one.id in chosen for one in examples if one.num_targets >= sum(counts) / size)


def test_long_and_short_examples_are_in_the_sample_as_their_targets_are() -> None:
    """Half of all targets are in ten long examples, half in a hundred short ones."""
    examples = [example(number, 100 if number < 10 else 10) for number in range(110)]
    chosen = choose_sample(examples, 8)
    assert sum(one.num_targets == 100 for one in chosen) == 4
    assert sum(one.num_targets == 10 for one in chosen) == 4


def test_padding_counts_as_tokens_that_the_teacher_reads() -> None:
    assert padded_tokens([5, 3, 2], token_budget=100) == 15
    assert padded_tokens([5, 3, 2], token_budget=6) == 5 + 6


seconds = st.floats(1e-3, 1e6)


@settings(deadline=None)
@given(seconds, seconds, seconds)
def test_the_break_even_is_the_first_epoch_at_which_the_cache_is_no_dearer(
    once: float, forward: float, read: float
) -> None:
    assume(abs(forward - read) > 1e-6 * forward)
    epochs = Estimate(1, 1.0, once, forward, read).break_even_epochs
    if forward <= read:
        assert epochs is None
        return
    assert epochs is not None

    def saved(number: int) -> float:
        return number * (forward - read) - once

    assert saved(epochs) >= -1e-9 * once
    assert epochs == 1 or saved(epochs - 1) <= 1e-9 * once


def test_space_is_what_is_free_and_what_the_folder_holds_already(tmp_path: Path) -> None:
    (tmp_path / "held").write_bytes(bytes(100))
    space = Space(tmp_path, free=50, present=100)
    space.require(150)
    with pytest.raises(NoSpaceError, match=re.escape(f"{tmp_path} has 50 bytes free and holds 100 bytes of it")):
        space.require(151)
    assert space_for(tmp_path).present == 100
    assert space_for(tmp_path / "not" / "yet").parent == tmp_path


WORDS = "the a cat dog teacher student reads writes what of one two three on mat rug france paris and".split()
RANDOM = np.random.default_rng(0)
ROWS = [
    {
        name: " ".join(RANDOM.choice(WORDS, RANDOM.integers(2, most)))
        for name, most in (("prompt", 12), ("completion", 24))
    }
    for _ in range(48)
]
SETTINGS = {"layers": "2", "max_length": 300, "examples_per_shard": 5, "batch_tokens": 600, "device": "cpu"}


@pytest.fixture(scope="module")
def plan_of(tiny_model_folder, write_jsonl, tmp_path_factory):
    def make(**settings: object) -> Plan:
        folder = tmp_path_factory.mktemp("plan")
        rows = write_jsonl(folder / "rows.jsonl", ROWS)
        config = CacheTeacherConfig.model_validate(
            {
                "teacher": str(tiny_model_folder("llama")),
                "dataset": str(rows),
                "output_dir": folder / "cache",
                **SETTINGS,
                **settings,
            }
        )
        return open_plan(config, folder / "tokenizer")

    return make


@pytest.mark.parametrize(
    "settings",
    [
        {"codec": "arrow-fp16", "store_tail": "none"},
        {"store_tail": "final=sketch:8+sampled:4,lens=profile", "examples_per_shard": 30},
    ],
)
def test_bytes_extrapolated_from_eight_examples_are_within_15_percent(plan_of, settings: dict[str, object]) -> None:
    plan = plan_of(**settings)
    sample = choose_sample(plan.examples.examples, 8)
    found = extrapolate(plan, measure_sample(plan, sample))
    assert len(sample) <= 8 < len(plan.examples.examples)
    folder = run_cache_teacher(plan.config)
    beside = sum((folder / name).stat().st_size for name in ("README.md", "config.resolved.yaml"))
    truth = folder_size(folder) - beside
    assert found.num_bytes == pytest.approx(truth, rel=0.15)
    manifest = CacheReader(folder).manifest
    stored = sum(stats.bytes for stats in manifest.layer_stats.values())
    stored += sum(shard.tail_rows.size for shard in manifest.shards if shard.tail_rows is not None)
    assert found.bytes_per_target == pytest.approx(stored / manifest.num_targets, rel=0.15)


def test_tail_sums_of_more_targets_have_more_digits(plan_of) -> None:
    plan = plan_of(limit=8)
    sample = measure_sample(plan, plan.examples.examples)
    few, many = (
        tail_sum_bytes(sample, plan.identity, targets=times * sample.num_targets, num_shards=1) for times in (1, 4096)
    )
    digits = 320 * 2 * 2 * np.log2(4096) / 8  # of V numbers at two layers, in the file of the shard and of the cache
    assert 0.8 * digits < many - few < 2 * digits


def test_the_estimate_is_told_a_fact_a_line_and_its_times_are_whole(plan_of) -> None:
    plan = plan_of(limit=20)
    found = estimate(plan)
    assert found.pass_seconds > found.forward_seconds > 0 < found.read_seconds
    text = describe(plan, found, Space(Path("/disk"), free=10**9, present=0))
    lines = {line[:19].strip(): line[19:] for line in text.splitlines()}
    assert list(lines)[-4:] == ["bytes", "free space", "time", "break-even"]
    assert lines["free space"] == "1.0 GB in /disk"
    assert re.match(r"(from \d+ epochs? on, \d+ students? of 3 \(|never)", lines["break-even"])
    full = describe(plan, found, Space(Path("/disk"), free=10, present=0))
    assert "10 bytes in /disk: it does not fit" in full

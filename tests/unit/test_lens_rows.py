"""Which rows the lens layers read: each as often as the share says, and the same however a step is divided."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distilllens import lens_rows
from distilllens.batches import Steps
from distilllens.config import TrainConfig, load_config
from distilllens.lens_rows import ALL_ROWS, LensRows, choose_lens_rows, draw_offset, take_evenly
from distilllens.objective import Objective
from distilllens.targets import SparseTargets, TailSamples
from distilllens.training_run import TrainingRun
from distilllens_cache import CachedExample

LAYERS = (2, 5)
shares = st.floats(0.01, 1.0)


def example(index: int, num_targets: int) -> CachedExample:
    positions = np.arange(num_targets, dtype=np.uint32)
    return CachedExample(index, str(index), np.zeros(num_targets + 1, np.uint32), positions, {})


class Source:
    """Examples of 3, 4, 5, ... targets in one shard."""

    def __init__(self, size: int) -> None:
        self.num_targets = np.arange(3, size + 3)
        self.shard_of = np.zeros(size, np.int64)

    def __len__(self) -> int:
        return len(self.num_targets)

    def __getitem__(self, index: int) -> CachedExample:
        return example(index, int(self.num_targets[index]))


def rows_by_example(some: list[CachedExample], step: int) -> dict[tuple[int, int], tuple[int, ...]]:
    """(example, layer) -> which of the example's target positions are read."""
    rows = choose_lens_rows(some, LAYERS, share=0.4, seed=7, step=step)
    found, first = {}, 0
    for one in some:
        stop = first + len(one.target_positions)
        for layer, taken in rows.of_layer.items():
            found[one.index, layer] = tuple(row - first for row in taken.tolist() if first <= row < stop)
        first = stop
    return found


@given(shares, st.integers(1, 60))
def test_every_position_is_read_with_the_probability_of_the_share(share: float, num_targets: int) -> None:
    """Counted over a fine grid of offsets: the offsets that take a position are an interval or two."""
    grid = (np.arange(500) + 0.5) / 500
    times = sum(take_evenly(num_targets, share, offset=offset).astype(int) for offset in grid)
    assert np.abs(times - 500 * share).max() <= 2


@given(shares, st.integers(1, 60), st.floats(0, 1, exclude_max=True))
def test_an_examples_count_is_its_share_rounded_up_or_down(share: float, num_targets: int, offset: float) -> None:
    assert abs(take_evenly(num_targets, share, offset=offset).sum() - share * num_targets) < 1 + 1e-9


def test_offsets_are_uniform_and_of_their_own_for_every_seed_step_example_and_layer() -> None:
    places = [
        (seed, step, index, layer) for seed in (0, 1) for step in range(20) for index in range(20) for layer in (1, 2)
    ]
    offsets = np.array([draw_offset(*place) for place in places])
    assert len(set(offsets.tolist())) == len(places)
    # Kolmogorov and Smirnov: 1.63 / sqrt(n) is exceeded once in a hundred seeds.
    ecdf = np.arange(1, len(offsets) + 1) / len(offsets)
    assert np.abs(np.sort(offsets) - ecdf).max() < 1.63 / np.sqrt(len(offsets))
    for stride in (1, 2, 40, 800):  # neighbours in layer, example, step and seed
        assert abs(np.corrcoef(offsets[stride:], offsets[:-stride])[0, 1]) < 4 / np.sqrt(len(offsets) - stride)


def test_the_rows_of_a_step_are_the_same_in_every_version() -> None:
    rows = choose_lens_rows([example(3, 9), example(0, 6)], LAYERS, share=0.4, seed=42, step=17)
    assert {layer: taken.tolist() for layer, taken in rows.of_layer.items()} == {
        2: [0, 3, 5, 8, 10, 13],
        5: [0, 3, 5, 8, 9, 12, 14],
    }


@pytest.mark.parametrize("shape", [(2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)])
def test_ranks_and_micro_batches_read_the_rows_of_one_whole_batch(shape: tuple[int, int, int]) -> None:
    source = Source(10)
    whole, parted = Steps(source, 7, 4, 1), Steps(source, 7, *shape)
    for step in range(8):
        read: dict[tuple[int, int], tuple[int, ...]] = {}
        for number in range(parted.micro_batches):
            for rank in range(parted.world_size):
                read |= rows_by_example([source[index] for index in parted.micro_batch(step, number, rank)], step)
        assert read == rows_by_example([source[index] for index in whole.indices(step)], step)


def test_the_order_inside_a_batch_changes_no_examples_rows_and_another_step_does() -> None:
    some = [example(index, 5 + index) for index in range(6)]
    assert rows_by_example(some, step=3) == rows_by_example(some[::-1], step=3)
    assert rows_by_example(some, step=3) != rows_by_example(some, step=4)


def test_a_share_of_one_draws_nothing(monkeypatch) -> None:
    monkeypatch.setattr(lens_rows, "draw_offset", None)
    assert choose_lens_rows([example(0, 4)], LAYERS, share=1.0, seed=0, step=0) is ALL_ROWS
    assert ALL_ROWS.at(2) == slice(None)


def test_targets_are_taken_with_their_codes_and_samples() -> None:
    numbers = torch.arange(12).view(4, 3)
    targets = SparseTargets(
        ids=numbers,
        log_probs=-numbers.float(),
        is_kept=numbers > 2,
        log_rest=-numbers[:, 0].float(),
        codes=numbers * 2,
        samples=TailSamples(numbers * 3, -numbers.float(), numbers * 4),
    )
    taken = targets[LensRows(0.5, {2: torch.tensor([1, 3])}).at(2)]
    assert len(taken) == 2
    assert taken.codes is not None
    assert taken.samples is not None
    assert taken.ids.tolist() == [[3, 4, 5], [9, 10, 11]]
    assert taken.log_rest.tolist() == [-3, -9]
    assert taken.codes[:, 0].tolist() == [6, 18]
    assert taken.samples.draws[:, 0].tolist() == [12, 36]


@pytest.mark.parametrize("share", ["0", "-0.5", "1.01", "nan", "half"])
def test_a_share_that_is_none_is_refused_in_one_sentence(share: str) -> None:
    flags = {"student": "s", "cache": Path("c"), "output_dir": Path("o"), "lens_rows": share}
    with pytest.raises(ValueError, match=r"^the command line has 1 mistake:\n  lens_rows: Input should be [^\n]*$"):
        load_config(TrainConfig, file=None, flags=flags)


def test_a_batch_of_a_run_reads_the_rows_of_its_step() -> None:
    objective = Objective(task="fkl", lens_divergence="jsd", pairs=((2, 4),), lens_weight=1.0, kd_ratio=1.0)
    flags = {"student": "s", "cache": Path("c"), "output_dir": Path("o"), "lens_rows": 0.4, "seed": 5}
    run: Any = SimpleNamespace(
        config=TrainConfig.model_validate(flags), student=SimpleNamespace(objective=objective), teachings=None, tails={}
    )
    some = [example(index, 9 + index) for index in range(4)]
    for step in range(4):
        wanted = choose_lens_rows(some, (2,), share=0.4, seed=5, step=step)
        assert torch.equal(TrainingRun.batch(run, some, step).lens_rows.at(2), wanted.at(2))

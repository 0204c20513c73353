"""Which target positions a step's lens layers read: an unbiased share, the same on any number of ranks.

Dimension key: T target positions of an example, N of a batch, n those of the batch that a layer reads.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from distilllens_cache import CachedExample

STREAM = int.from_bytes(b"lensrows", "big")
"""Keeps these draws apart from the others of the same seed."""


@dataclass(frozen=True)
class LensRows:
    """Rows that a batch's lens layers read of its N target positions: all, where nothing else is said."""

    share: float = 1.0
    """A row that is read stands for ``1 / share`` rows."""
    of_layer: dict[int, Int[Tensor, " n"]] = field(default_factory=dict)
    """The rows by student layer, ascending; empty where ``share`` is 1."""

    def at(self, layer: int) -> Int[Tensor, " n"] | slice:
        """What student ``layer`` reads, as an index of something with N rows."""
        return self.of_layer[layer] if self.share < 1.0 else slice(None)

    def among(self, chosen: Int[Tensor, " chosen"], num_rows: int) -> "LensRows":
        """These, where only ``chosen`` of the batch's rows remain, ascending; rows are numbered among those."""
        number = torch.full((num_rows,), -1, device=chosen.device)
        number[chosen] = torch.arange(len(chosen), device=chosen.device)
        remaining = {layer: number[rows] for layer, rows in self.of_layer.items()}
        return LensRows(self.share, {layer: rows[rows >= 0] for layer, rows in remaining.items()})

    def to(self, device: torch.device) -> "LensRows":
        """These on another device."""
        moved = {layer: rows.to(device, non_blocking=True) for layer, rows in self.of_layer.items()}
        return LensRows(self.share, moved)


ALL_ROWS = LensRows()
"""Nothing is left out."""


def choose_lens_rows(
    examples: Sequence[CachedExample], layers: Iterable[int], *, share: float, seed: int, step: int
) -> LensRows:
    """The rows that student ``layers`` read of a batch in one step. With a ``share`` of 1 nothing is drawn.

    An example's rows depend on seed, step, example and layer alone: not on the batch around it, nor on where a run
    was stopped.
    """
    if share == 1.0:
        return ALL_ROWS

    def rows(layer: int) -> Tensor:
        taken = [
            take_evenly(len(example.target_positions), share, offset=draw_offset(seed, step, example.index, layer))
            for example in examples
        ]
        return torch.from_numpy(np.flatnonzero(np.concatenate(taken)))

    return LensRows(share, {layer: rows(layer) for layer in layers})


def take_evenly(num_targets: int, share: float, *, offset: float) -> NDArray[np.bool_]:
    """(T,) which of an example's target positions are taken: ``share * T`` of them, rounded up or down.

    Systematic sampling: over offsets in [0, 1) each position is taken with probability ``share``.
    """
    return np.diff(np.floor(np.arange(num_targets + 1) * share + offset)) > 0


def draw_offset(seed: int, step: int, example: int, layer: int) -> float:
    """Uniform in [0, 1): the first number of a counter-based generator that starts at these coordinates."""
    bits = np.random.Philox(key=[seed, STREAM], counter=[0, layer, example, step])
    return float(np.random.Generator(bits).random())

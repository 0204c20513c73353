"""Examples as tensors: one or several in a row, padded on the right, each target beside the token after its position.

Dimension key: B batch, T tokens, N target positions of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from distilllens.lens_rows import ALL_ROWS, LensRows
from distilllens.tails import Tail, tails_on
from distilllens.targets import SparseTargets, stack_targets
from distilllens_cache import CachedExample


@dataclass(frozen=True)
class Batch:
    """Rows of examples padded on the right to the longest, with the targets of all of them, example after example."""

    ids: tuple[str, ...]
    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    is_target: Bool[Tensor, "B T"]
    next_ids: Int[Tensor, " N"]
    targets: dict[int, SparseTargets]
    tails: dict[int, Tail]
    """What stands for the rest, by layer; the layers are those of ``targets``, the teacher's final one last."""
    num_targets: tuple[int, ...]
    """Target positions of each example."""
    lens_rows: LensRows = ALL_ROWS
    """Which of the N rows the lens losses read."""
    position_ids: Int[Tensor, "B T"] | None = None
    """Of packed rows: they start anew with each example, and with the padding."""

    @property
    def final_layer(self) -> int:
        """The teacher's final layer."""
        return max(self.targets)

    def at(self, rows: Int[Tensor, " n"]) -> "Batch":
        """This batch with ``rows`` of its N target positions alone, ascending; its hidden states stay as they are."""
        positions = self.is_target.flatten().nonzero()[rows, 0]
        is_target = torch.zeros_like(self.is_target).flatten()
        is_target[positions] = True
        ends = torch.tensor(self.num_targets, device=rows.device).cumsum(0)
        taken = torch.bucketize(rows, ends, right=True).bincount(minlength=len(ends))
        return replace(
            self,
            is_target=is_target.view_as(self.is_target),
            next_ids=self.next_ids[rows],
            targets={layer: targets[rows] for layer, targets in self.targets.items()},
            num_targets=tuple(taken.tolist()),
            lens_rows=self.lens_rows.among(rows, len(self.next_ids)),
        )

    def to(self, device: torch.device) -> "Batch":
        """This batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            is_target=self.is_target.to(device, non_blocking=True),
            next_ids=self.next_ids.to(device, non_blocking=True),
            targets={layer: targets.to(device) for layer, targets in self.targets.items()},
            tails=tails_on(self.tails, device),
            lens_rows=self.lens_rows.to(device),
            position_ids=None if self.position_ids is None else self.position_ids.to(device, non_blocking=True),
        )


def collate(
    examples: Sequence[CachedExample],
    tails: dict[int, Tail],
    *,
    lens_rows: LensRows = ALL_ROWS,
    packs: Sequence[range] | None = None,
) -> Batch:
    """One batch from some examples, with their targets at the layers of ``tails``.

    Each example has a row of its own, or ``packs`` say which of them share one, as `packing.pack` gives them.
    Padding is masked by length, never by id.
    """
    rows = [range(number, number + 1) for number in range(len(examples))] if packs is None else packs
    lengths = [[len(examples[member].token_ids) for member in row] for row in rows]
    width = max(map(sum, lengths))
    input_ids = np.zeros((len(rows), width), dtype=np.int64)
    attention_mask = np.zeros((len(rows), width), dtype=np.int64)
    is_target = np.zeros((len(rows), width), dtype=bool)
    position_ids = np.zeros((len(rows), width), dtype=np.int64)
    for number, members in enumerate(rows):
        start = 0
        for member in members:
            example = examples[member]
            stop = start + len(example.token_ids)
            input_ids[number, start:stop] = example.token_ids
            is_target[number, start + example.target_positions.astype(np.int64)] = True
            position_ids[number, start:stop] = np.arange(stop - start)
            start = stop
        attention_mask[number, :start] = 1
        position_ids[number, start:] = np.arange(width - start)
    next_ids = np.concatenate([example.token_ids[example.target_positions + 1] for example in examples])
    return Batch(
        ids=tuple(example.id for example in examples),
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        is_target=torch.from_numpy(is_target),
        next_ids=torch.from_numpy(next_ids.astype(np.int64)),
        targets={layer: stack_targets([example.targets[layer] for example in examples]) for layer in tails},
        tails=tails,
        num_targets=tuple(len(example.target_positions) for example in examples),
        lens_rows=lens_rows,
        position_ids=None if packs is None else torch.from_numpy(position_ids),
    )

"""Examples as tensors: padded on the right, each target beside the token after its position.

Dimension key: B batch, T tokens, N target positions of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from distilllens.lens_rows import ALL_ROWS, LensRows
from distilllens.tails import Tail
from distilllens.targets import SparseTargets, stack_targets
from distilllens_cache import CachedExample


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right to their longest, with the targets of all of them, example after example."""

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
            tails={layer: tail.to(device) for layer, tail in self.tails.items()},
            lens_rows=self.lens_rows.to(device),
        )


def collate(examples: Sequence[CachedExample], tails: dict[int, Tail], *, lens_rows: LensRows = ALL_ROWS) -> Batch:
    """One batch from some examples, with their targets at the layers of ``tails``.

    Padding is masked by length, never by id.
    """
    width = max(len(example.token_ids) for example in examples)
    input_ids = np.zeros((len(examples), width), dtype=np.int64)
    attention_mask = np.zeros((len(examples), width), dtype=np.int64)
    is_target = np.zeros((len(examples), width), dtype=bool)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.token_ids)] = example.token_ids
        attention_mask[row, : len(example.token_ids)] = 1
        is_target[row, example.target_positions] = True
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
    )

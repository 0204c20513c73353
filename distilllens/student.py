"""The student as the engine wraps it: model and lens in, sums of losses over target positions out."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distilllens.chunked import sum_over_chunks
from distilllens.collate import Batch
from distilllens.divergence import cross_entropy, sparse_divergence
from distilllens.fused import Group, Loss, certain_targets
from distilllens.lens import LogitLens, rows_at
from distilllens.losses import sum_losses
from distilllens.tails import BucketTail

Pairs = tuple[tuple[int, int], ...]
"""Layers that are matched: (student, teacher), counted from 1."""
CALIBRATION_BINS = 15
"""Equal-width bins of the expected calibration error (Guo et al. 2017)."""


@dataclass(frozen=True)
class Objective:
    """``(1 - kd_ratio) * CE + kd_ratio * (task + lens_weight * mean over pairs of the lens divergence)``."""

    task: str
    lens_divergence: str
    pairs: Pairs
    lens_weight: float
    kd_ratio: float

    @property
    def lens_pairs(self) -> Pairs:
        """Pairs that the loss needs: none where their weight is 0."""
        return self.pairs if self.kd_ratio * self.lens_weight > 0 else ()

    def teacher_layers(self, final_layer: int) -> tuple[int, ...]:
        """Teacher layers whose targets the loss reads."""
        final = (final_layer,) if self.needs_final_targets else ()
        return (*sorted({teacher for _, teacher in self.lens_pairs}), *final)

    @property
    def needs_final_targets(self) -> bool:
        """Whether the loss reads the teacher's final distribution."""
        return self.kd_ratio > 0 and self.task != "ce"


class Student(nn.Module):
    """Full-vocabulary logits stay inside; what comes out are sums, which any number of ranks can add up."""

    def __init__(self, model: PreTrainedModel, lens: LogitLens, objective: Objective, *, chunk_rows: int = 256) -> None:
        super().__init__()
        self.model = model
        self.lens = lens
        self.objective = objective
        self.chunk_rows = chunk_rows

    def forward(self, batch: Batch, measured_pairs: Pairs | None = None) -> dict[str, Tensor]:
        """Sums over the batch's target positions, in nats: ``total`` (with a gradient) and its parts.

        With ``measured_pairs`` the sums of the teacher-forced metrics instead, for ``teacher_forced.averages``.
        """
        measures = measured_pairs is not None
        pairs = measured_pairs if measures else self.objective.lens_pairs
        final_layer = self.lens.num_layers
        hidden = self.lens.hidden_states(
            batch.input_ids, batch.attention_mask, sorted({final_layer, *(student for student, _ in pairs)})
        )
        final = rows_at(hidden[final_layer], batch.is_target)
        inner = {pair: self.lens.normed(rows_at(hidden[pair[0]], batch.is_target), pair[0]) for pair in pairs}
        if measures:
            return self._measure_final(final, batch) | {
                f"lens/{student}:{teacher}": self._lens_jsd(rows, batch, teacher)
                for (student, teacher), rows in inner.items()
            }
        return self._losses(final, inner, batch)

    def _losses(self, final: Tensor, inner: dict[tuple[int, int], Tensor], batch: Batch) -> dict[str, Tensor]:
        objective = self.objective
        rho, lens_share = objective.kd_ratio, objective.lens_weight / max(1, len(inner))
        # Cross-entropy is the forward KL from all mass on the next token.
        of_next = certain_targets(batch.next_ids)
        at_final = {"ce": Loss("fkl", of_next, BucketTail(), 1 - rho)}
        if objective.needs_final_targets:
            at_final["task"] = self._loss(objective.task, batch, batch.final_layer, rho)
        elif rho > 0:
            at_final["task"] = Loss("fkl", of_next, BucketTail(), rho)
        at_lens = {
            f"lens/{student}:{teacher}": self._loss(objective.lens_divergence, batch, teacher, rho * lens_share)
            for student, teacher in inner
        }
        groups = [Group(len(final), tuple(at_final.values()))]
        groups += [Group(len(final), (loss,)) for loss in at_lens.values()]
        total, each = sum_losses([final, *inner.values()], groups, self.lens, chunk_rows=self.chunk_rows)
        return {"total": total, **dict(zip([*at_final, *at_lens], each, strict=True))}

    def _loss(self, divergence: str, batch: Batch, layer: int, weight: float) -> Loss:
        return Loss(divergence, batch.targets[layer], batch.tails[layer], weight)

    def _lens_jsd(self, rows: Tensor, batch: Batch, layer: int) -> Tensor:
        targets, tail = batch.targets[layer], batch.tails[layer]

        def losses(logits: Tensor, where: slice) -> Tensor:
            return sparse_divergence("jsd", logits, targets[where], tail).sum()[None]

        return sum_over_chunks(self.lens.head, rows, losses, chunk_rows=self.chunk_rows)[0]

    def _measure_final(self, rows: Tensor, batch: Batch) -> dict[str, Tensor]:
        targets, tail = batch.targets[batch.final_layer], batch.tails[batch.final_layer]

        def losses(logits: Tensor, where: slice) -> Tensor:
            next_ids = batch.next_ids[where]
            kl = sparse_divergence("fkl", logits, targets[where], tail).sum()
            ce = cross_entropy(logits, next_ids).sum()
            confidence, top_1 = logits.float().softmax(-1).max(-1)
            agrees = (top_1 == targets[where].ids[:, 0]).float().sum()
            bins = (confidence * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
            empty = torch.zeros(CALIBRATION_BINS, device=logits.device)
            correct = empty.index_add(0, bins, (top_1 == next_ids).float())
            return torch.cat([torch.stack([kl, ce, agrees]), empty.index_add(0, bins, confidence), correct])

        sums = sum_over_chunks(self.lens.head, rows, losses, chunk_rows=self.chunk_rows)
        confidence, correct = sums[3:].view(2, CALIBRATION_BINS)
        return {"kl": sums[0], "ce": sums[1], "agrees": sums[2], "confidence": confidence, "correct": correct}

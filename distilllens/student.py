"""The student as the engine wraps it: model and lens in, sums of losses over target positions out."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distilllens.chunked import sum_over_chunks
from distilllens.collate import Batch
from distilllens.divergence import cross_entropy, sparse_divergence
from distilllens.fused import Group, Loss, certain_targets, fused_losses, is_fused
from distilllens.lens import LogitLens, rows_at
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
        """All losses over all rows: fused where every one has a fused form, else chunk by chunk under autograd."""
        objective = self.objective
        is_certain = certain_targets(batch.next_ids)
        terms = {"ce": Loss("fkl", is_certain, BucketTail(), 1 - objective.kd_ratio)}
        if objective.needs_final_targets:
            terms["task"] = self._loss(objective.task, batch, batch.final_layer, objective.kd_ratio)
        elif objective.kd_ratio > 0:
            terms["ce"] = Loss("fkl", is_certain, BucketTail(), 1.0)
        groups = {"": Group(len(final), tuple(terms.values()))}
        names = [*terms]
        for (student, teacher), rows in inner.items():
            weight = objective.kd_ratio * objective.lens_weight / len(inner)
            loss = self._loss(objective.lens_divergence, batch, teacher, weight)
            names.append(f"lens/{student}:{teacher}")
            groups[names[-1]] = Group(len(rows), (loss,))
        head = self.lens.plain_head()
        every = [loss for group in groups.values() for loss in group.losses]
        rows = torch.cat([final, *inner.values()])
        if head is not None and all(is_fused(loss.divergence, loss.tail) for loss in every):
            total, each = fused_losses(rows, head, tuple(groups.values()), chunk_rows=self.chunk_rows)
        else:
            total, each = self._plain_losses(rows, tuple(groups.values()))
        sums = dict(zip(names, each.detach(), strict=True))
        return {"total": total, "task": sums["ce"], **sums}

    def _loss(self, divergence: str, batch: Batch, layer: int, weight: float) -> Loss:
        return Loss(divergence, batch.targets[layer], batch.tails[layer], weight)

    def _plain_losses(self, rows: Tensor, groups: tuple[Group, ...]) -> tuple[Tensor, Tensor]:
        """What ``fused_losses`` gives, through ``divergence.py`` and autograd."""
        sums, start = [], 0
        for group in groups:

            def losses(logits: Tensor, where: slice, group: Group = group) -> Tensor:
                of_each = (
                    sparse_divergence(loss.divergence, logits, loss.targets[where], loss.tail) for loss in group.losses
                )
                return torch.stack([values.sum() for values in of_each])

            own = rows[start : start + group.num_rows]
            sums.append(sum_over_chunks(self.lens.head, own, losses, chunk_rows=self.chunk_rows))
            start += group.num_rows
        each = torch.cat(sums)
        weights = torch.tensor([loss.weight for group in groups for loss in group.losses], device=each.device)
        return (each * weights).sum(), each

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

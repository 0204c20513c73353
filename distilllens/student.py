"""The student as the engine wraps it: model and lens in, sums of losses over target positions out."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distilllens.batches import Batch
from distilllens.chunked import sum_over_chunks
from distilllens.divergence import cross_entropy, sparse_divergence
from distilllens.lens import LogitLens, rows_at

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
        sums = self._measure_final(final, batch) if measures else self._final(final, batch)
        divergence = "jsd" if measures else self.objective.lens_divergence
        for student, teacher in pairs:
            rows = self.lens.normed(rows_at(hidden[student], batch.is_target), student)
            sums[f"lens/{student}:{teacher}"] = self._divergence(divergence, rows, batch, teacher)
        return (
            sums if measures else {"total": self._total(sums), **{name: value.detach() for name, value in sums.items()}}
        )

    def _total(self, sums: dict[str, Tensor]) -> Tensor:
        objective = self.objective
        task, pairs = sums["task"], objective.lens_pairs
        if pairs:
            task = task + objective.lens_weight * sum(sums[f"lens/{s}:{t}"] for s, t in pairs) / len(pairs)
        if objective.kd_ratio == 1:
            return task
        return (1 - objective.kd_ratio) * sums["ce"] + objective.kd_ratio * task

    def _divergence(self, name: str, rows: Tensor, batch: Batch, layer: int) -> Tensor:
        targets, tail = batch.targets[layer], batch.tails[layer]

        def losses(logits: Tensor, where: slice) -> Tensor:
            return sparse_divergence(name, logits, targets[where], tail).sum()[None]

        return sum_over_chunks(self.lens.head, rows, losses, chunk_rows=self.chunk_rows)[0]

    def _final(self, rows: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy and task share one pass over the final layer's logits."""
        objective = self.objective

        def losses(logits: Tensor, where: slice) -> Tensor:
            ce = cross_entropy(logits, batch.next_ids[where]).sum()
            if not objective.needs_final_targets:
                return torch.stack([ce, ce])
            layer = batch.final_layer
            task = sparse_divergence(objective.task, logits, batch.targets[layer][where], batch.tails[layer])
            return torch.stack([ce, task.sum()])

        ce, task = sum_over_chunks(self.lens.head, rows, losses, chunk_rows=self.chunk_rows)
        return {"ce": ce, "task": task}

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

"""The student as the engine wraps it: model and lens in, sums of losses over target positions out."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distilllens.collate import Batch
from distilllens.divergence import cross_entropy, jsd_certificate, sparse_divergence
from distilllens.divergence_spec import parse_divergence
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
    def lens_layers(self) -> tuple[int, ...]:
        """Student layers whose lens the loss reads."""
        return tuple(student for student, _ in self.lens_pairs)

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

        ``lens/s:t`` is the divergence of a pair. Where it is the JSD, ``lens_low/s:t`` and ``lens_high/s:t`` are limits
        of the JSD over the whole vocabulary, which sparse targets do not determine.

        With ``measured_pairs`` the sums of the teacher-forced metrics instead, for ``teacher_forced.averages``.
        """
        measures = measured_pairs is not None
        pairs = measured_pairs if measures else self.objective.lens_pairs
        final_layer = self.lens.num_layers
        hidden = self.lens.hidden_states(
            batch.input_ids,
            batch.attention_mask,
            sorted({final_layer, *(student for student, _ in pairs)}),
            position_ids=batch.position_ids,
        )
        rows = {layer: rows_at(states, batch.is_target) for layer, states in hidden.items()}
        if measures:
            sums = self._measure_final(rows[final_layer], batch)
            for student, teacher in pairs:
                normed = self.lens.normed(rows[student], student)
                sums |= self._measure_lens(normed, batch, (student, teacher))
            return sums
        # Rows that a lens layer doesn't read go through neither norm nor head.
        inner = {pair: self.lens.normed(rows[pair[0]][batch.lens_rows.at(pair[0])], pair[0]) for pair in pairs}
        return self._losses(rows[final_layer], inner, batch)

    def _losses(self, final: Tensor, inner: dict[tuple[int, int], Tensor], batch: Batch) -> dict[str, Tensor]:
        objective = self.objective
        rho, per_pair = objective.kd_ratio, objective.lens_weight / max(1, len(inner))
        # Cross-entropy is the forward KL from all mass on the next token.
        of_next = certain_targets(batch.next_ids)
        at_final = {"ce": Loss("fkl", of_next, BucketTail(), 1 - rho)}
        if objective.needs_final_targets:
            at_final["task"] = self._loss(objective.task, batch, batch.final_layer, rho)
        elif rho > 0:
            at_final["task"] = Loss("fkl", of_next, BucketTail(), rho)
        groups = [Group(len(final), tuple(at_final.values()))]
        groups += [Group(len(rows), (self._lens_loss(batch, pair, rho * per_pair),)) for pair, rows in inner.items()]
        found = sum_losses([final, *inner.values()], groups, self.lens, chunk_rows=self.chunk_rows)
        sums = {"total": found.total, **dict(zip(at_final, found.each, strict=False))}
        of_lens = torch.stack([found.each, found.low, found.slack], -1)[len(at_final) :] / batch.lens_rows.share
        is_jsd = parse_divergence(objective.lens_divergence).name == "jsd"
        for pair, values in zip(inner, of_lens, strict=True):
            sums |= _named(pair, *values, is_jsd=is_jsd)
        return sums

    def _loss(self, divergence: str, batch: Batch, layer: int, weight: float) -> Loss:
        return Loss(divergence, batch.targets[layer], batch.tails[layer], weight)

    def _lens_loss(self, batch: Batch, pair: tuple[int, int], weight: float) -> Loss:
        student, teacher = pair
        targets, weight = batch.targets[teacher][batch.lens_rows.at(student)], weight / batch.lens_rows.share
        return Loss(self.objective.lens_divergence, targets, batch.tails[teacher], weight)

    def _measure_lens(self, rows: Tensor, batch: Batch, pair: tuple[int, int]) -> dict[str, Tensor]:
        targets, tail = batch.targets[pair[1]], batch.tails[pair[1]]

        def losses(logits: Tensor, where: slice) -> Tensor:
            bucket = BucketTail().outcomes(logits.float().log_softmax(-1), targets[where])
            low, slack = jsd_certificate(bucket.log_p, bucket.log_q, counts=bucket.counts)
            value = sparse_divergence("jsd", logits, targets[where], tail)
            return torch.stack([value.sum(), low.sum(), slack.sum()])

        return _named(pair, *self.lens.sum_over_chunks(rows, losses, chunk_rows=self.chunk_rows), is_jsd=True)

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

        sums = self.lens.sum_over_chunks(rows, losses, chunk_rows=self.chunk_rows)
        confidence, correct = sums[3:].view(2, CALIBRATION_BINS)
        return {"kl": sums[0], "ce": sums[1], "agrees": sums[2], "confidence": confidence, "correct": correct}


def _named(pair: tuple[int, int], value: Tensor, low: Tensor, slack: Tensor, *, is_jsd: bool) -> dict[str, Tensor]:
    student, teacher = pair
    limits = {"lens_low": low, "lens_high": low + slack} if is_jsd else {}
    return {f"{name}/{student}:{teacher}": sums for name, sums in {"lens": value, **limits}.items()}

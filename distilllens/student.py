"""The student as the engine wraps it: model and lens in, sums of losses over target positions out."""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from distilllens.collate import Batch
from distilllens.divergence import cross_entropy, jsd_certificate, sparse_divergence
from distilllens.divergence_spec import parse_divergence
from distilllens.layer_maps import Pairs
from distilllens.lens import LogitLens, rows_at
from distilllens.loss_parts import Part, final_part, final_values, lens_part
from distilllens.losses import sum_losses
from distilllens.mixed_batch import MixedBatch, combined
from distilllens.objective import Objective
from distilllens.positions import take_highest
from distilllens.tails import BucketTail, log_mass_outside
from distilllens.targets import SparseTargets

CALIBRATION_BINS = 15
"""Equal-width bins of the expected calibration error (Guo et al. 2017)."""


class Student(nn.Module):
    """Full-vocabulary logits stay inside; what comes out are sums, which any number of ranks can add up."""

    def __init__(self, model: PreTrainedModel, lens: LogitLens, objective: Objective, *, chunk_rows: int = 256) -> None:
        super().__init__()
        self.model = model
        self.lens = lens
        self.objective = objective
        self.chunk_rows = chunk_rows

    def forward(
        self,
        batch: Batch,
        measured_pairs: Pairs | None = None,
        lens_factor: float = 1.0,
        *,
        read: Callable[["Student", Batch], dict[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Sums over the batch's target positions, in nats: ``total`` (with a gradient) and its parts.

        ``lens/s:t`` is the divergence of a pair, ``lens`` their sum by shares, as the loss has it. Where it is the JSD,
        ``lens_low/s:t`` and ``lens_high/s:t`` are limits of the JSD over the whole vocabulary, which sparse targets do
        not determine. ``unsure/final`` and ``unsure/s:t`` count the positions beyond an entropy gate.
        ``kept_mass/s:t`` and ``student_mass/s:t`` are the teacher's and the student's probability of the kept tokens,
        and the same with ``final`` for the final layer, where the loss reads its targets.
        ``lens_factor`` scales the weight of the lens.

        With ``measured_pairs`` the sums of the teacher-forced metrics instead, for ``teacher_forced.averages``; with
        ``read`` what that makes of the batch, inside the call, where wrappers have gathered the weights.
        """
        if read is not None:
            return read(self, batch)
        measures = measured_pairs is not None
        pairs = measured_pairs if measures else self.objective.lens_pairs
        final_layer = self.lens.num_layers
        hidden = self.lens.hidden_states(
            batch.input_ids,
            batch.attention_mask,
            sorted({final_layer, *(student for student, _ in pairs)}),
            position_ids=batch.position_ids,
        )
        if measures:
            rows = _Rows(self.lens, hidden, batch)
            sums = self._measure_final(rows.states[final_layer], batch)
            for student, teacher in pairs:
                normed = self.lens.normed(rows.states[student], student)
                sums |= self._measure_lens(normed, batch, (student, teacher))
            return sums
        if not isinstance(batch, MixedBatch):
            own = self._parts(batch, _Rows(self.lens, hidden, batch), self.objective, lens_factor)
            total, (sums,) = self._sums([own])
            return {"total": total, **sums, **_lens_sum(self.objective, sums)}
        views, disagreement = batch.taught(vocab_size=self.lens.vocab_size)
        rows = [_Rows(self.lens, hidden, view.batch) for view in views]
        if batch.mix == "losses":
            # The same rows for every teacher: as the same tensors, so that the head's products are made once.
            rows = rows[:1] * len(views)
        parts = []
        for view, of_view in zip(views, rows, strict=True):
            own = self._parts(view.batch, of_view, view.teaching.objective, lens_factor)
            parts.append([part.times(view.teaching.weight) for part in own])
        total, of_views = self._sums(parts)
        of_views = [sums | _lens_sum(view.teaching.objective, sums) for view, sums in zip(views, of_views, strict=True)]
        return {"total": total, **combined(views, of_views, mix=batch.mix), **disagreement}

    def _parts(self, batch: Batch, rows: "_Rows", objective: Objective, lens_factor: float) -> list[Part]:
        """The losses of a batch, or of one view of it."""
        share = objective.positions.share
        if share < 1.0:
            scores = self._scores(rows.states[self.lens.num_layers], batch)
            batch = batch.at(take_highest(scores, batch.num_targets, share))
            rows = rows.of(batch)
        parts = final_part(objective, batch, rows.states[self.lens.num_layers])
        for pair, weight in objective.weight_of_pair.items():
            parts += lens_part(objective, batch, rows.normed(pair[0]), pair, weight * lens_factor)
        return parts

    def _sums(self, parts: Sequence[list[Part]]) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The weighted total, and for each list of parts the sums by name."""
        objective, flat = self.objective, [part for some in parts for part in some]
        groups = [part.group(lens_trains_head=objective.lens_trains_head) for part in flat]
        found = sum_losses([part.states for part in flat], groups, self.lens, chunk_rows=self.chunk_rows)
        # Beyond a gate there is no JSD, and a sum over some positions would be no limit of anything.
        has_limits = parse_divergence(objective.lens_divergence).name == "jsd" and objective.gate.lens == math.inf
        of_losses = iter(torch.stack([found.each, found.low, found.slack, found.on_support], -1))
        each: list[dict[str, Tensor]] = []
        for some in parts:
            sums: dict[str, Tensor] = {}
            for part in some:
                for name, loss in part.losses.items():
                    value, low, slack, mass = next(of_losses) / part.share
                    more = (
                        {name: value} if part.pair is None else _named(part.pair, value, low, slack, is_jsd=has_limits)
                    )
                    if part.pair is not None or (name == "task" and objective.needs_final_targets):
                        more |= _masses(part.label, loss.targets, mass, share=part.share)
                    sums |= {key: sums[key] + sum_ if key in sums else sum_ for key, sum_ in more.items()}
                if part.is_unsure:
                    sums[f"unsure/{part.label}"] = torch.tensor(len(part.states) / part.share, device=found.each.device)
            each.append(sums)
        return found.total, each

    @torch.no_grad()
    def _scores(self, final: Float[Tensor, "N D"], batch: Batch) -> Float[Tensor, " N"]:
        """What positions are chosen by, of all of them: a head's forward product more."""

        def of_chunk(logits: Tensor, where: slice) -> Tensor:
            if self.objective.positions.by == "entropy":
                values = torch.special.entr(logits.float().softmax(-1)).sum(-1)
            else:
                values = final_values(self.objective, logits, batch, where)
            # As a sum over chunks: each gives its own rows, and zeros for the others.
            return functional.pad(values, (where.start, len(final) - where.start - len(values)))

        return self.lens.sum_over_chunks(final, of_chunk, chunk_rows=self.chunk_rows)

    def _measure_lens(self, rows: Tensor, batch: Batch, pair: tuple[int, int]) -> dict[str, Tensor]:
        targets, tail = batch.targets[pair[1]], batch.tails[pair[1]]

        def losses(logits: Tensor, where: slice) -> Tensor:
            bucket = BucketTail().outcomes(logits.float().log_softmax(-1), targets[where])
            low, slack = jsd_certificate(bucket.log_p, bucket.log_q, counts=bucket.counts)
            value = sparse_divergence("jsd", logits, targets[where], tail)
            return torch.stack([value.sum(), low.sum(), slack.sum(), -bucket.log_q[:, -1].expm1().sum()])

        *values, mass = self.lens.sum_over_chunks(rows, losses, chunk_rows=self.chunk_rows)
        return _named(pair, *values, is_jsd=True) | _masses(_name(pair), targets, mass)

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
            mass = -log_mass_outside(logits.float().log_softmax(-1), targets[where]).expm1().sum()
            return torch.cat([torch.stack([kl, ce, agrees, mass]), empty.index_add(0, bins, confidence), correct])

        sums = self.lens.sum_over_chunks(rows, losses, chunk_rows=self.chunk_rows)
        confidence, correct = sums[4:].view(2, CALIBRATION_BINS)
        measured = {"kl": sums[0], "ce": sums[1], "agrees": sums[2], "confidence": confidence, "correct": correct}
        return measured | _masses("final", targets, sums[3])


class _Rows:
    """The hidden states at a batch's target positions; what is read of a layer again is the same tensor."""

    def __init__(self, lens: LogitLens, hidden: dict[int, Tensor], batch: Batch) -> None:
        self._lens, self._hidden, self._lens_rows = lens, hidden, batch.lens_rows
        self.states = {layer: rows_at(states, batch.is_target) for layer, states in hidden.items()}
        self._normed: dict[int, Tensor] = {}

    def normed(self, layer: int) -> Float[Tensor, "n D"]:
        """What the head reads of a lens layer; rows that it doesn't read go through neither norm nor head."""
        if layer not in self._normed:
            self._normed[layer] = self._lens.normed(self.states[layer][self._lens_rows.at(layer)], layer)
        return self._normed[layer]

    def of(self, batch: Batch) -> "_Rows":
        """The rows at other positions of the same states."""
        return _Rows(self._lens, self._hidden, batch)


def _lens_sum(objective: Objective, sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """``lens``: the pairs' sums by their shares, as the loss has it; nothing where it has no pairs."""
    shared = [share * sums[f"lens/{_name(pair)}"] for pair, share in objective.share_of_pair.items()]
    return {"lens": torch.stack(shared).sum()} if shared else {}


def _named(pair: tuple[int, int], value: Tensor, low: Tensor, slack: Tensor, *, is_jsd: bool) -> dict[str, Tensor]:
    limits = {"lens_low": low, "lens_high": low + slack} if is_jsd else {}
    return {f"{name}/{_name(pair)}": sums for name, sums in {"lens": value, **limits}.items()}


def _name(pair: tuple[int, int]) -> str:
    student, teacher = pair
    return f"{student}:{teacher}"


def _masses(where: str, targets: SparseTargets, of_student: Tensor, *, share: float = 1.0) -> dict[str, Tensor]:
    """The probability of the kept tokens, of the teacher's targets at a ``share`` of the rows and of the student."""
    of_teacher = -targets.log_rest.double().expm1().sum() / share
    return {f"kept_mass/{where}": of_teacher, f"student_mass/{where}": of_student}

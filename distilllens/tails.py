"""What stands for the rest of a sparse target in the loss.

A divergence sees a target and the student's logits as *outcomes*, which its tail makes of them. A tail with a shape
completes the target to a distribution over the whole vocabulary: the rest is spread over the tokens outside the top-k
in proportion to ``exp(shape)``.

Dimension key: N rows, K tokens kept, S sampled tokens, R rank, V vocabulary, O outcomes.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distilllens.targets import SparseTargets
from distilllens_cache import LOG_FLOOR


class Outcomes(NamedTuple):
    """Log-probabilities of teacher and student over the same outcomes, and how often each counts in a sum."""

    log_p: Float[Tensor, "N O"]
    log_q: Float[Tensor, "N O"]
    counts: Float[Tensor, "N O"] | None = None
    """None: once each. 0 is padding; other numbers are importance weights of samples."""
    unseen: Float[Tensor, " N"] | None = None
    """The student's mass outside the kept tokens, less the samples' estimate of it: 0 in expectation."""


class Tail(ABC):
    """What stands for the rest."""

    @abstractmethod
    def outcomes(self, log_q: Float[Tensor, "N V"], targets: SparseTargets) -> Outcomes:
        """What a divergence compares, from the student's log-probabilities."""

    @abstractmethod
    def completed(self, targets: SparseTargets, vocab_size: int) -> Float[Tensor, "N V"]:
        """Log-probabilities of a distribution that doesn't diverge from ``targets``."""

    def to(self, device: torch.device) -> "Tail":
        """This tail on another device."""
        return self


@dataclass(frozen=True)
class BucketTail(Tail):
    """The rest is one outcome, "another token", for teacher and student alike.

    Coarse-graining, so that every f-divergence is a lower bound of the dense one.
    """

    def outcomes(self, log_q: Float[Tensor, "N V"], targets: SparseTargets) -> Outcomes:
        """The K slots, then the rest."""
        rest = torch.ones_like(targets.is_kept[:, :1])
        return Outcomes(
            torch.cat([_kept_p(targets), targets.log_rest[:, None]], -1),
            torch.cat([_kept_q(log_q, targets), log_mass_outside(log_q, targets)[:, None]], -1),
            torch.cat([targets.is_kept, rest], -1).to(log_q.dtype),
        )

    def completed(self, targets: SparseTargets, vocab_size: int) -> Float[Tensor, "N V"]:
        """The rest spread evenly: one of many distributions that have these masses."""
        return _spread_evenly(targets, vocab_size)


@dataclass(frozen=True)
class RenormTail(Tail):
    """No rest: the kept tokens are renormalised on both sides. For comparison with other systems only.

    Its gradient is 0 outside the kept tokens, so the student may put any mass there.
    """

    def outcomes(self, log_q: Float[Tensor, "N V"], targets: SparseTargets) -> Outcomes:
        """The K slots as distributions of their own."""
        log_p, log_q = _kept_p(targets), _kept_q(log_q, targets)
        log_p, log_q = (one - one.logsumexp(-1, keepdim=True) for one in (log_p, log_q))
        return Outcomes(log_p, log_q, targets.is_kept.to(log_q.dtype))

    def completed(self, targets: SparseTargets, vocab_size: int) -> Float[Tensor, "N V"]:
        """The rest spread evenly."""
        return _spread_evenly(targets, vocab_size)


@dataclass(frozen=True)
class SampledTail(Tail):
    """The rest is seen through draws from it, with their exact log-probabilities: an unbiased estimate.

    Draw i of n stands for ``rest / n`` of the teacher's mass, so it counts ``rest / (n p_i)`` times. For divergences
    whose terms grow like ``slope * q``, the student's exact mass outside replaces its estimate (a control variate).
    """

    def outcomes(self, log_q: Float[Tensor, "N V"], targets: SparseTargets) -> Outcomes:
        """The K slots, then the S sampled tokens."""
        samples = targets.samples
        if samples is None:
            raise ValueError("the tail `sampled` needs targets with samples")
        is_drawn = samples.draws > 0
        share = samples.draws / samples.draws.sum(-1, keepdim=True).clamp_min(1)
        log_p = samples.log_probs.masked_fill(~is_drawn, LOG_FLOOR).to(targets.log_probs)
        counts = share * (targets.log_rest[:, None] - log_p).exp().masked_fill(~is_drawn, 0.0)
        at_samples = log_q.gather(-1, samples.ids).masked_fill(~is_drawn, LOG_FLOOR)
        mass = log_mass_outside(log_q, targets).exp()
        return Outcomes(
            torch.cat([_kept_p(targets), log_p], -1),
            torch.cat([_kept_q(log_q, targets), at_samples], -1),
            torch.cat([targets.is_kept.to(log_q), counts.to(log_q)], -1),
            mass - (counts * at_samples.exp()).sum(-1),
        )

    def completed(self, targets: SparseTargets, vocab_size: int) -> Float[Tensor, "N V"]:
        """The samples as they are, what is left of the rest spread evenly."""
        if targets.samples is None:
            raise ValueError("the tail `sampled` needs targets with samples")
        samples, is_drawn = targets.samples, targets.samples.draws > 0
        drawn = (samples.log_probs.exp() * is_drawn).sum(-1)
        left = (targets.log_rest.exp() - drawn).clamp_min(math.exp(LOG_FLOOR))
        others = (vocab_size - targets.is_kept.sum(-1) - is_drawn.sum(-1)).clamp_min(1)
        even = (left.log() - others.log())[:, None].expand(-1, vocab_size)
        with_samples = _write(even, samples.ids, samples.log_probs.to(even), is_drawn)
        return _write(with_samples, targets.ids, targets.log_probs, targets.is_kept)


def tails_on(tails: dict[int, Tail], device: torch.device) -> dict[int, Tail]:
    """Tails by layer on another device."""
    return {layer: tail.to(device) for layer, tail in tails.items()}


class ShapedTail(Tail):
    """A tail that completes each target to a distribution over the vocabulary."""

    @abstractmethod
    def shape(self, targets: SparseTargets, vocabulary: slice = slice(None)) -> Float[Tensor, "rows chunk"]:
        """Log of what the rest is spread in proportion to, over a chunk of the vocabulary."""

    @abstractmethod
    def shape_at(self, targets: SparseTargets, ids: Int[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """The same for some tokens of each row."""

    def level(self, targets: SparseTargets) -> Float[Tensor, " N"]:
        """What added to ``shape`` gives log-probabilities: log of the rest less log of the shape's mass outside."""
        shape = self.shape(targets).to(targets.log_probs).expand(len(targets), -1)
        return targets.log_rest - log_mass_outside(shape, targets)

    def log_probs_at(self, targets: SparseTargets, ids: Int[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """Log-probabilities that the completed targets give to some tokens outside the kept ones."""
        return (self.level(targets)[:, None] + self.shape_at(targets, ids)).clamp_min(LOG_FLOOR)

    def completed(self, targets: SparseTargets, vocab_size: int) -> Float[Tensor, "N V"]:
        """The completed targets. Rows sum to 1."""
        spread = self.shape(targets).to(targets.log_probs) + self.level(targets)[:, None]
        return _write(spread, targets.ids, targets.log_probs, targets.is_kept).clamp_min(LOG_FLOOR)

    def outcomes(self, log_q: Float[Tensor, "N V"], targets: SparseTargets) -> Outcomes:
        """Every token is an outcome."""
        return Outcomes(self.completed(targets, log_q.shape[-1]), log_q)


@dataclass(frozen=True)
class ProfileTail(ShapedTail):
    """The rest has the shape of the layer's mean tail over the whole dataset: no bytes per target."""

    log_profile: Float[Tensor, " V"]

    def shape(self, targets: SparseTargets, vocabulary: slice = slice(None)) -> Float[Tensor, "1 chunk"]:
        """The log of the profile."""
        return self.log_profile[None, vocabulary]

    def shape_at(self, targets: SparseTargets, ids: Int[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """The log of the profile at some tokens."""
        return self.log_profile[ids]

    def to(self, device: torch.device) -> "ProfileTail":
        """This tail on another device."""
        return ProfileTail(self.log_profile.to(device))


@dataclass(frozen=True)
class SketchTail(ShapedTail):
    """The rest has the shape of the teacher's own logits in low rank: ``softcap(codes @ basis.T + offset)``.

    The first columns of a basis explain most, so a basis of lower rank than the codes reads the first codes.
    """

    basis: Float[Tensor, "V R"]
    offset: Float[Tensor, " V"]
    softcap: float | None = None

    @property
    def rank(self) -> int:
        """Codes that are read."""
        return self.basis.shape[1]

    def shape(self, targets: SparseTargets, vocabulary: slice = slice(None)) -> Float[Tensor, "N chunk"]:
        """The sketched logits."""
        with self._in_full():
            return self._capped(self._codes(targets) @ self.basis[vocabulary].T + self.offset[vocabulary])

    def shape_at(self, targets: SparseTargets, ids: Int[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """The sketched logits of some tokens."""
        codes = self._codes(targets)[:, :, None]
        with self._in_full():
            return self._capped((self.basis[ids] @ codes)[..., 0] + self.offset[ids])

    def to(self, device: torch.device) -> "SketchTail":
        """This tail on another device."""
        return SketchTail(self.basis.to(device), self.offset.to(device), self.softcap)

    def _codes(self, targets: SparseTargets) -> Tensor:
        if targets.codes is None:
            raise ValueError("the tail `sketch` needs targets with codes")
        return targets.codes[:, : self.rank].to(self.basis)

    def _in_full(self) -> torch.autocast:
        # In bfloat16, as a student's own products are, these logits would err by 0.1 and more.
        return torch.autocast(self.basis.device.type, enabled=False)

    def _capped(self, logits: Tensor) -> Tensor:
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


def log_mass_outside(log_probs: Float[Tensor, "N V"], targets: SparseTargets) -> Float[Tensor, " N"]:
    """Log of the mass that ``log_probs`` gives to the tokens outside the kept ones; at least LOG_FLOOR.

    A logsumexp over the tokens left out: ``1 - sum`` in float32 is wrong in nearly every peaked row.
    """
    outside = _write(log_probs, targets.ids, torch.full_like(targets.log_probs, -torch.inf), targets.is_kept)
    # A row whose top-k is the whole vocabulary has no rest, and logsumexp of nothing has no gradient.
    is_empty = (outside == -torch.inf).all(-1)
    return (
        outside.masked_fill(is_empty[:, None], LOG_FLOOR - math.log(outside.shape[-1]))
        .logsumexp(-1)
        .clamp_min(LOG_FLOOR)
    )


def _write(
    rows: Float[Tensor, "N V"], ids: Int[Tensor, "N K"], values: Float[Tensor, "N K"], is_written: Tensor
) -> Float[Tensor, "N V"]:
    """A copy of ``rows`` with ``values`` at ``ids``. Padding slots point one past the vocabulary: id 0 is a token."""
    size = rows.shape[-1]
    padded = torch.cat([rows, rows[:, :1]], -1)
    return padded.scatter(-1, torch.where(is_written, ids, size), values.to(rows))[:, :-1]


def _kept_p(targets: SparseTargets) -> Float[Tensor, "N K"]:
    return targets.log_probs.masked_fill(~targets.is_kept, LOG_FLOOR)


def _kept_q(log_q: Float[Tensor, "N V"], targets: SparseTargets) -> Float[Tensor, "N K"]:
    return log_q.gather(-1, targets.ids).masked_fill(~targets.is_kept, LOG_FLOOR)


def _spread_evenly(targets: SparseTargets, vocab_size: int) -> Float[Tensor, "N V"]:
    outside = (vocab_size - targets.is_kept.sum(-1)).clamp_min(1)
    even = (targets.log_rest - outside.log())[:, None].expand(-1, vocab_size)
    return _write(even, targets.ids, targets.log_probs, targets.is_kept)

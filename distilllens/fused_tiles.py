"""Losses over a tile: logits of a few rows, few enough for a cache, become the gradient at them in place.

Cells (kept tokens, a bucket) are done one by one in float64: they are few, and their differences cancel where a
student is sure. The rest of the vocabulary is summed in the logits' own precision, directly: ``1 - sum`` has no correct
digit in a peaked row.

Dimension key: N rows of the tile, K tokens kept, C cells, V vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distilllens.fused_divergences import FusedDivergence, OfTail, Spread
from distilllens.mixed_targets import MixedTail
from distilllens.tails import BucketTail, ProfileTail, SketchTail, Tail
from distilllens.targets import SparseTargets
from distilllens_cache import LOG_FLOOR

FUSED_TAILS = (BucketTail, ProfileTail, SketchTail, MixedTail)
"""Tails with a fused form."""
SMALLEST_MASS = 1e-30
"""Of a profile outside the kept tokens: where nothing is outside, anything finite does."""

Scratch = Callable[[str], Tensor]
"""A buffer of the tile's shape by name, with old numbers in it."""


class OfTile(NamedTuple):
    """A divergence of each row, and what a bucket tail sees of both sides."""

    value: Float[Tensor, " N"]
    log_p: Float[Tensor, "N buckets"]
    log_q: Float[Tensor, "N buckets"]


@dataclass(frozen=True, eq=False)
class _Cells:
    """Some tokens of each row. Where a row has fewer, its first one stands again: writing it twice does no harm."""

    ids: Int[Tensor, "N C"]
    is_cell: Bool[Tensor, "N C"]

    def read(self, values: Float[Tensor, "N V"], otherwise: float) -> Float[Tensor, "N C"]:
        """In float64."""
        return values.gather(-1, self.ids).double().masked_fill(~self.is_cell, otherwise)

    def write(self, values: Float[Tensor, "N V"], at_cells: Float[Tensor, "N C"]) -> None:
        values.scatter_(-1, self.ids, torch.where(self.is_cell, at_cells, at_cells[:, :1]).to(values))


class TileLoss(ABC):
    """A divergence with a tail, ready to be run tile by tile."""

    @abstractmethod
    def run(self, z: Float[Tensor, "N V"], targets: SparseTargets, scratch: Scratch) -> OfTile:
        """The divergence of each row; logits ``z`` become its gradient, divided by ``-factor``."""


def tile_loss(divergence: FusedDivergence, tail: Tail, dtype: torch.dtype) -> TileLoss:
    """A divergence with a tail, for logits of ``dtype``."""
    if isinstance(tail, ProfileTail):
        return _ShapedLoss(divergence, _ProfileShape(tail, dtype))
    if isinstance(tail, SketchTail):
        return _ShapedLoss(divergence, _SketchShape(tail, dtype))
    if isinstance(tail, MixedTail):
        return _ShapedLoss(divergence, _MixedShape(tail))
    assert isinstance(tail, BucketTail)
    return _BucketLoss(divergence)


@dataclass(frozen=True, eq=False)
class _BucketLoss(TileLoss):
    """Over the kept tokens and one bucket, whose tokens share one factor."""

    divergence: FusedDivergence

    def run(self, z: Tensor, targets: SparseTargets, scratch: Scratch) -> OfTile:
        kept = _kept(targets)
        log_masses = kept.read(z, -math.inf)
        z.scatter_(-1, kept.ids, -math.inf)
        # Each side of the split has its own maximum, so that a rest of e^-200 is no 0.
        top = z.amax(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).min)
        z.sub_(top).exp_()
        rest = z.sum(-1, keepdim=True).double()
        log_masses = torch.cat([log_masses, rest.log() + top], -1)
        log_p, log_q = _kept_log_p(targets), log_masses.log_softmax(-1)
        log_q = torch.cat([log_q[:, :-1].masked_fill(~kept.is_cell, LOG_FLOOR), log_q[:, -1:].clamp_min(LOG_FLOOR)], -1)
        value, gradient, _ = _of_cells(self.divergence, log_p, log_q, log_p)
        z.mul_((gradient[:, -1:] / rest.clamp_min(1.0)).to(z))
        kept.write(z, gradient[:, :-1])
        return OfTile(value, log_p, log_q)


class _Shape(ABC):
    """What a tail spreads the rest in proportion to."""

    @abstractmethod
    def spread(
        self, targets: SparseTargets, kept: _Cells, scratch: Scratch
    ) -> tuple[Float[Tensor, "rows V"], Float[Tensor, "N 1"], Float[Tensor, "rows V"]]:
        """The shape's log, the level that makes it the log-probabilities outside the kept tokens, and the shape."""


class _ProfileShape(_Shape):
    def __init__(self, tail: ProfileTail, dtype: torch.dtype) -> None:
        self._log_shape = tail.log_profile.to(dtype)[None]
        self._shape = self._log_shape.exp()
        self._exact = self._log_shape[0].double().exp()
        self._total = self._exact.sum()

    def spread(self, targets: SparseTargets, kept: _Cells, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
        # In float64 the difference to the total has digits enough, and no matrix is needed.
        of_kept = self._exact[kept.ids].masked_fill(~kept.is_cell, 0.0).sum(-1, keepdim=True)
        outside = (self._total - of_kept).clamp_min(SMALLEST_MASS)
        return self._log_shape, targets.log_rest.double()[:, None] - outside.log(), self._shape


class _SketchShape(_Shape):
    def __init__(self, tail: SketchTail, dtype: torch.dtype) -> None:
        self._basis, self._offset, self._softcap = tail.basis.to(dtype), tail.offset.to(dtype), tail.softcap

    def spread(self, targets: SparseTargets, kept: _Cells, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
        if targets.codes is None:
            raise ValueError("the tail `sketch` needs targets with codes")
        log_shape, shape = scratch("t"), scratch("shape")
        codes = targets.codes[:, : self._basis.shape[1]].to(self._basis)
        torch.addmm(self._offset, codes, self._basis.t(), out=log_shape)
        if self._softcap:
            log_shape.div_(self._softcap).tanh_().mul_(self._softcap)
        return _spread_of_rows(log_shape, targets, kept, shape)


class _MixedShape(_Shape):
    def __init__(self, tail: MixedTail) -> None:
        self._tail = tail

    def spread(self, targets: SparseTargets, kept: _Cells, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
        log_shape = scratch("t").copy_(self._tail.shape(targets))
        return _spread_of_rows(log_shape, targets, kept, scratch("shape"))


def _spread_of_rows(
    log_shape: Tensor, targets: SparseTargets, kept: _Cells, shape: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A spread where each row has a shape of its own; ``log_shape`` is changed and ``shape`` written."""
    log_shape.scatter_(-1, kept.ids, -math.inf)
    log_shape.sub_(log_shape.amax(-1, keepdim=True).clamp_min(torch.finfo(log_shape.dtype).min))
    torch.exp(log_shape, out=shape)
    outside = shape.sum(-1, keepdim=True).double().clamp_min(SMALLEST_MASS)
    log_shape.scatter_(-1, kept.ids, 0.0)
    return log_shape, targets.log_rest.double()[:, None] - outside.log(), shape


@dataclass(frozen=True, eq=False)
class _ShapedLoss(TileLoss):
    """Over the whole vocabulary: kept tokens exactly, all others in a few passes."""

    divergence: FusedDivergence
    shape: _Shape

    def run(self, z: Tensor, targets: SparseTargets, scratch: Scratch) -> OfTile:
        kept, log_p_kept = _kept(targets), _kept_log_p(targets)
        z.sub_(z.amax(-1, keepdim=True))
        q = torch.exp(z, out=scratch("q"))
        cells = _with_dominant(kept, z, q)
        tail_mass = q.sum(-1, keepdim=True).double().clamp_min(torch.finfo(q.dtype).tiny)
        log_masses = torch.cat([cells.read(z, -math.inf), tail_mass.log()], -1)
        log_total = log_masses.logsumexp(-1, keepdim=True)
        log_q = log_masses - log_total
        q.mul_((-log_total).exp().to(q))

        log_shape, level, shape = self.shape.spread(targets, kept, scratch)
        at_dominant = log_shape.expand(len(z), -1).gather(-1, cells.ids[:, -1:]) + level
        at_dominant = at_dominant.clamp_min(LOG_FLOOR).masked_fill(~cells.is_cell[:, -1:], LOG_FLOOR)
        mass = log_p_kept[:, -1].exp() - at_dominant[:, 0].exp()
        p = Spread(level.exp().to(z), shape, cells.ids, mass.to(z).clamp_min(0.0))
        t = scratch("t")
        if self.divergence.sees_floor:
            log_shape = torch.maximum(log_shape, (LOG_FLOOR - level).to(z), out=t)
        of_tail = self.divergence.tail(torch.sub(log_shape, z, out=t), level + log_total, p, q, out=z)

        log_p_cells = torch.cat([log_p_kept[:, :-1], at_dominant], -1)
        log_q_cells = log_q[:, :-1].masked_fill(~cells.is_cell, LOG_FLOOR)
        value, gradient, centre = _of_cells(self.divergence, log_p_cells, log_q_cells, log_p_kept, of_tail)
        z.sub_(centre.to(z)).mul_(q)
        if self.divergence.averages_over_p:
            p.add_to(z)
        cells.write(z, gradient)
        rest = torch.logaddexp(log_q[:, -1:], log_q_cells[:, -1:])
        return OfTile(value, log_p_kept, torch.cat([log_q_cells[:, :-1], rest.clamp_min(LOG_FLOOR)], -1))


def _kept(targets: SparseTargets) -> _Cells:
    return _Cells(torch.where(targets.is_kept, targets.ids, targets.ids[:, :1]), targets.is_kept)


def _kept_log_p(targets: SparseTargets) -> Tensor:
    """(N, K + 1): the kept tokens, then the rest."""
    log_p = targets.log_probs.double().masked_fill(~targets.is_kept, LOG_FLOOR)
    return torch.cat([log_p, targets.log_rest.double()[:, None]], -1)


def _with_dominant(kept: _Cells, z: Tensor, q: Tensor) -> _Cells:
    """The kept tokens and, last, a token outside them that has more than half of the student's mass.

    Sums that it takes part in would lose all others. ``z`` is the logits less their maximum, ``q`` their exp, which
    becomes 0 at the cells.
    """
    at_kept = kept.read(z, -math.inf)
    q.scatter_(-1, kept.ids, 0.0)
    is_sure = (at_kept.amax(-1) < 0) & (at_kept.exp().sum(-1) + q.sum(-1) < 2)
    rows = is_sure.nonzero()[:, 0]
    ids = kept.ids[:, :1].clone()
    # Not for every row: the index of a maximum takes as long as an exp.
    ids[rows, 0] = z[rows].argmax(-1)
    q.scatter_(-1, ids, 0.0)
    return _Cells(torch.cat([kept.ids, ids], -1), torch.cat([kept.is_cell, is_sure[:, None]], -1))


def _of_cells(
    divergence: FusedDivergence, log_p: Tensor, log_q: Tensor, log_p_all: Tensor, of_tail: OfTail | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Value (N,), gradient at the cells' logits (N, C) and what a tail's B is to be less (N, 1).

    The gradient is divided by ``-factor``. ``log_p_all``, the kept tokens and the rest, sum to 1 but for rounding.
    """
    p, q = log_p.exp(), log_q.exp()
    value, ratio = divergence.cells(log_p - log_q, p, q)
    if of_tail is not None:
        value, ratio = value + of_tail.value, ratio - of_tail.offset
    centre = (q * ratio).sum(-1, keepdim=True)
    if of_tail is not None:
        centre = centre + of_tail.ratio[:, None]
    gradient = 0.0
    if divergence.averages_over_p:
        centre, gradient = centre + log_p_all.exp().sum(-1, keepdim=True), p
    return value, gradient + q * (ratio - centre), centre

"""Divergences as the fused head needs them: from ratios t = log p - log q to values and gradients, without autograd.

For ``D = sum_v g(p_v, q_v)`` of ``q = softmax(z)`` and G = dD/dq, the gradient at z is ``q (G - sum q G)``. Every
divergence here has it in the form

    -factor * [ q (B - sum q B) + (p - q sum p) ]

with a bounded or logarithmic B, the second term only in the KL directions that average over p. Few *cells* (kept tokens
and a bucket) are done exactly; the many tokens of a *tail* in place, each pass over them costing half a percent of
the head itself (`scripts/bench/loss.py`).

Dimension key: N rows, C cells, V vocabulary.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from distilllens.divergence_spec import DivergenceSpec

RATIO_LIMIT = 80.0
"""exp of a larger log-ratio overflows float32; the mass that it is averaged over is 0 there."""
SOFTPLUS_LINEAR = 40.0
"""Where softplus(x) = x: exp(-40) is 0 beside 1 even in float64."""


@dataclass(frozen=True, eq=False)
class Spread:
    """Teacher's probabilities over a tail: ``scale * shape``, no matrix where all rows share a shape."""

    scale: Float[Tensor, "N 1"]
    shape: Float[Tensor, "rows V"]
    cells: Tensor
    """(N, C) ids that don't belong to the tail."""
    mass: Float[Tensor, " N"]

    def mean_of(self, values: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """Sum of p times ``values`` over the tail; they become 0 at the cells."""
        values.scatter_(-1, self.cells, 0.0)
        return self.scale[:, 0] * (
            values @ self.shape[0] if len(self.shape) == 1 else sum_of_products(values, self.shape)
        )

    def add_to(self, values: Float[Tensor, "N V"]) -> None:
        """Add p, and rubbish at the cells."""
        values.addcmul_(self.scale, self.shape)


class OfCells(NamedTuple):
    """What a divergence gets from the cells of each row."""

    value: Float[Tensor, " N"]
    ratio: Float[Tensor, "N C"]
    """B in each cell."""


class OfTail(NamedTuple):
    """What a divergence gets from a tail, where B is known less a number for each row."""

    value: Float[Tensor, " N"]
    ratio: Float[Tensor, " N"]
    """Sum of q B, with B less ``offset``: small where B is nearly the same everywhere, so that little cancels."""
    offset: Tensor | float


class FusedDivergence(ABC):
    """A divergence with a fused form."""

    factor: float = 1.0
    averages_over_p: bool = False
    """Whether its gradient has the term ``p - q sum p``."""
    sees_floor: bool = False
    """Whether it grows without limit as p falls, so that p's floor shows."""

    @abstractmethod
    def cells(self, t: Float[Tensor, "N C"], p: Float[Tensor, "N C"], q: Float[Tensor, "N C"]) -> OfCells:
        """Exact where p and q nearly agree and where they are far apart."""

    @abstractmethod
    def tail(
        self,
        t: Float[Tensor, "N V"],
        level: Float[Tensor, "N 1"],
        p: Spread,
        q: Float[Tensor, "N V"],
        *,
        out: Float[Tensor, "N V"],
    ) -> OfTail:
        """Sums over a tail whose log-ratios are ``t + level``; q is 0 at the cells.

        ``t`` is used up, and ``out`` becomes B less the offset.
        """


class _ForwardKL(FusedDivergence):
    averages_over_p = True

    def cells(self, t: Tensor, p: Tensor, q: Tensor) -> OfCells:
        return OfCells((p * t).sum(-1), torch.zeros_like(t))

    def tail(self, t: Tensor, level: Tensor, p: Spread, q: Tensor, *, out: Tensor) -> OfTail:
        out.zero_()
        return OfTail(p.mean_of(t) + level[:, 0] * p.mass, torch.zeros_like(p.mass), 0.0)


class _ReverseKL(FusedDivergence):
    sees_floor = True

    def cells(self, t: Tensor, p: Tensor, q: Tensor) -> OfCells:
        return OfCells(-(q * t).sum(-1), t)

    def tail(self, t: Tensor, level: Tensor, p: Spread, q: Tensor, *, out: Tensor) -> OfTail:
        out.copy_(t)
        mean = sum_of_products(q, t)
        return OfTail(-mean - level[:, 0] * q.sum(-1), mean, level)


class _BothKL(FusedDivergence):
    """factor times KL(p || q) + KL(q || p)."""

    averages_over_p = True
    sees_floor = True

    def cells(self, t: Tensor, p: Tensor, q: Tensor) -> OfCells:
        return OfCells(((p - q) * t).sum(-1) * self.factor, t)

    def tail(self, t: Tensor, level: Tensor, p: Spread, q: Tensor, *, out: Tensor) -> OfTail:
        out.copy_(t)
        mean = sum_of_products(q, t)
        of_level = level[:, 0] * (p.mass - q.sum(-1))
        return OfTail((p.mean_of(t) - mean + of_level) * self.factor, mean, level)


class _Jeffreys(_BothKL):
    factor = 0.5


class _JensenShannon(FusedDivergence):
    """B = log(m / q) with m = beta p + (1 - beta) q."""

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.factor = 1 - beta

    def cells(self, t: Tensor, p: Tensor, q: Tensor) -> OfCells:
        beta, ratio = self.beta, _log_mean(t, self.beta)
        of_p = -(p * _log_mean(-t, 1 - beta)).sum(-1)
        return OfCells(beta * of_p - (1 - beta) * (q * ratio).sum(-1), ratio)

    def tail(self, t: Tensor, level: Tensor, p: Spread, q: Tensor, *, out: Tensor) -> OfTail:
        offset = math.log1p(-self.beta)
        _softplus(t.add_((level + math.log(self.beta) - offset).to(t)), out)
        mean = sum_of_products(q, out)
        of_p = p.mean_of(t.sub_(out)) - math.log(self.beta) * p.mass
        of_q = -mean - offset * q.sum(-1)
        return OfTail(self.beta * of_p + (1 - self.beta) * of_q, mean, offset)


class _SkewReverseKL(FusedDivergence):
    """B = log(m / q) + alpha q / m with m = alpha q + (1 - alpha) p."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def cells(self, t: Tensor, p: Tensor, q: Tensor) -> OfCells:
        log_ratio = _log_mean(t, 1 - self.alpha)
        return OfCells(-(q * log_ratio).sum(-1), log_ratio + self.alpha * (-log_ratio).exp())

    def tail(self, t: Tensor, level: Tensor, p: Spread, q: Tensor, *, out: Tensor) -> OfTail:
        offset = math.log(self.alpha)
        _softplus(t.add_((level + math.log1p(-self.alpha) - offset).to(t)), out)
        value = -sum_of_products(q, out) - offset * q.sum(-1)
        out.sub_(t.sigmoid_())  # alpha q / m - 1
        return OfTail(value, sum_of_products(q, out), offset + 1)


class _SkewForwardKL(FusedDivergence):
    """B = alpha p / m with m = alpha p + (1 - alpha) q."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.factor = (1 - alpha) / alpha

    def cells(self, t: Tensor, p: Tensor, q: Tensor) -> OfCells:
        log_ratio = _log_mean(-t, 1 - self.alpha)
        return OfCells(-(p * log_ratio).sum(-1), self.alpha * (-log_ratio).exp())

    def tail(self, t: Tensor, level: Tensor, p: Spread, q: Tensor, *, out: Tensor) -> OfTail:
        log_alpha = math.log(self.alpha)
        _softplus(t.add_((level + log_alpha - math.log1p(-self.alpha)).to(t)), out)
        of_p = p.mean_of(out.neg_().add_(t)) - log_alpha * p.mass
        torch.sigmoid(t, out=out)
        return OfTail(of_p, sum_of_products(q, out), 0.0)


FUSED: dict[str, type[FusedDivergence]] = {
    "fkl": _ForwardKL,
    "rkl": _ReverseKL,
    "fkl+rkl": _BothKL,
    "jsd": _JensenShannon,
    "jeffreys": _Jeffreys,
    "skew_fkl": _SkewForwardKL,
    "skew_rkl": _SkewReverseKL,
}
"""Divergences with a fused form, by name; they take the parameters of their spec."""


def fused_divergence(spec: DivergenceSpec) -> FusedDivergence:
    """The fused form of a divergence."""
    return FUSED[spec.name](*spec.parameters)


def sum_of_products(a: Float[Tensor, "N V"], b: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """Sum of a times b in each row."""
    # As a batched product this takes four times as long on a CPU.
    return torch.linalg.vecdot(a, b)


def _log_mean(t: Tensor, weight: float) -> Tensor:
    """log((1 - weight) + weight e^t), with all digits where t is near 0."""
    return t.clamp_max(RATIO_LIMIT).expm1().mul(weight).log1p()


def _softplus(t: Tensor, out: Tensor) -> None:
    # One pass in place of exp and log1p. Its error near t = 0 is that of t itself, a difference of log-probabilities.
    torch.ops.aten.softplus.out(t, 1, SOFTPLUS_LINEAR, out=out)

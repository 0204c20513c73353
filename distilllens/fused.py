"""The head and its divergences in one pass: logits of one chunk of rows are alive, and gradients come along.

The same numbers as ``divergence.py``, its plain twin, without an autograd graph over the vocabulary. For a divergence
``D = sum_v g(p_v, q_v)`` of ``q = softmax(z)``, with ``G_v = dD/dq_v``,

    dD/dz_v = q_v (G_v - sum_u q_u G_u),

so a chunk's logits are turned in place into the gradient at them, and two products give the gradients at hidden states
and head. Nothing is computed twice: three products of (rows, D, V), against four with checkpointing.

Dimension key: N rows, D hidden size, K tokens kept, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilllens.tails import BucketTail, ProfileTail, Tail
from distilllens.targets import SparseTargets
from distilllens_cache import LOG_FLOOR

FUSED = ("fkl", "rkl", "jsd")
"""Divergences with a fused form, for the tails bucket and profile."""
TILE_ROWS = 32
"""Rows worked on at a time on a CPU, so that their probabilities stay in its cache; with fewer, threads wait for each
other (`scripts/bench/loss.py`)."""
LOG_RATIO_LIMIT = 80.0
"""exp of a larger log-ratio overflows float32; q is 0 there."""


@dataclass(frozen=True, eq=False)
class Loss:
    """A divergence from some targets, and its weight in the total."""

    divergence: str
    targets: SparseTargets
    tail: Tail
    weight: float


@dataclass(frozen=True, eq=False)
class Group:
    """Consecutive rows of hidden states and the losses of their logits; each loss has a target per row."""

    num_rows: int
    losses: tuple[Loss, ...]


@dataclass(frozen=True, eq=False)
class Head:
    """Logits are ``softcap * tanh((h @ weight.T + bias) * scale / softcap)``."""

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None


def is_fused(divergence: str, tail: Tail) -> bool:
    """Whether a divergence with this tail has a fused form."""
    return divergence in FUSED and isinstance(tail, BucketTail | ProfileTail)


def certain_targets(ids: Tensor) -> SparseTargets:
    """Targets that give all mass to ``ids`` (N): forward KL to them, with a bucket, is the cross-entropy."""
    return SparseTargets(
        ids=ids[:, None],
        log_probs=torch.zeros(len(ids), 1, device=ids.device),
        is_kept=torch.ones(len(ids), 1, dtype=torch.bool, device=ids.device),
        log_rest=torch.full((len(ids),), LOG_FLOOR, device=ids.device),
    )


def fused_losses(
    normed: Float[Tensor, "N D"], head: Head, groups: Sequence[Group], *, chunk_rows: int = 256
) -> tuple[Tensor, Tensor]:
    """The weighted total of all losses of all groups, with a gradient, and each loss's own sum in nats, in order.

    The head's gradient is accumulated over all groups in one float32 buffer.
    """
    with torch.autocast(normed.device.type, enabled=False):
        return _FusedLosses.apply(normed.to(head.weight.dtype), head.weight, head.bias, head, tuple(groups), chunk_rows)  # type: ignore[no-any-return]


class _FusedLosses(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        normed: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        groups: tuple[Group, ...],
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        needed = ctx.needs_input_grad[:3]
        work = _Workspace(normed, weight, bias, head, chunk_rows, needed)
        sums: list[Tensor] = []
        first = 0
        for group in groups:
            of_group = torch.zeros(len(group.losses), dtype=torch.float64, device=normed.device)
            for start in range(0, group.num_rows, chunk_rows):
                stop = min(start + chunk_rows, group.num_rows)
                work.run(slice(first + start, first + stop), group, slice(start, stop), of_group)
            sums.append(of_group)
            first += group.num_rows
        if first != len(normed):
            raise ValueError(f"the groups have {first} rows and the hidden states {len(normed)}")
        ctx.save_for_backward(*work.gradients(weight.dtype))
        each = torch.cat(sums)
        weights = torch.tensor([loss.weight for group in groups for loss in group.losses], dtype=each.dtype)
        total, each = (each * weights.to(each.device)).sum().to(work.full), each.to(work.full)
        ctx.mark_non_differentiable(each)
        return total, each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor, _of_each: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients = (None if g is None else g * of_total.to(g.dtype) for g in ctx.saved_tensors)
        return (*gradients, None, None, None)


class _Workspace:
    """Buffers that every chunk uses again, and the gradients they add up to."""

    def __init__(
        self,
        normed: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        chunk_rows: int,
        needed: tuple[bool, bool, bool],
    ) -> None:
        self.full = torch.float64 if normed.dtype == torch.float64 else torch.float32
        self._normed, self._weight, self._bias, self._head = normed, weight, bias, head
        size, rows, device = len(weight), min(chunk_rows, len(normed)), normed.device
        self._tile_rows = min(rows, TILE_ROWS) if device.type == "cpu" else rows
        self._logits = torch.empty(rows, size, dtype=self.full, device=device)
        self._scratch = torch.empty(3, self._tile_rows, size, dtype=self.full, device=device)
        self._needs_gradient = any(needed)
        self._of_normed = torch.empty_like(normed) if needed[0] else None
        self._of_weight = torch.zeros(weight.shape, dtype=self.full, device=device) if needed[1] else None
        self._of_bias = torch.zeros(size, dtype=self.full, device=device) if needed[2] else None

    def gradients(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients at hidden states, head and bias, where they were needed."""
        of_weight, of_bias = (None if g is None else g.to(dtype) for g in (self._of_weight, self._of_bias))
        return self._of_normed, of_weight, of_bias

    def run(self, where: slice, group: Group, inside: slice, sums: Tensor) -> None:
        """Losses and gradients of one chunk: rows ``where`` of all, which are rows ``inside`` of the group."""
        rows = self._normed[where]
        logits = self._project(rows)
        slope = _cap(logits, self._head.softcap)
        for start in range(0, len(rows), self._tile_rows):
            tile = logits[start : start + self._tile_rows]
            mine = slice(inside.start + start, inside.start + start + len(tile))
            self._tile(tile, group, mine, sums)
        if not self._needs_gradient:
            return
        if slope is not None:
            logits.mul_(slope)
        if self._head.scale != 1.0:
            logits.mul_(self._head.scale)
        if self._of_bias is not None:
            self._of_bias += logits.sum(0)
        gradient = logits.to(self._weight.dtype)
        if self._of_normed is not None:
            self._of_normed[where] = gradient @ self._weight
        if self._of_weight is not None and self._of_weight.dtype == gradient.dtype:
            self._of_weight.addmm_(gradient.t(), rows)
        elif self._of_weight is not None:
            self._of_weight += gradient.t() @ rows

    def _project(self, rows: Tensor) -> Tensor:
        logits = self._logits[: len(rows)]
        if rows.dtype == logits.dtype == self._weight.dtype:
            torch.mm(rows, self._weight.t(), out=logits)
        elif rows.is_cuda:
            # A bfloat16 result would err by up to 0.03 nats in the logsumexp.
            torch.mm(rows, self._weight.t(), out_dtype=logits.dtype, out=logits)
        else:
            torch.mm(rows.to(logits.dtype), self._weight.to(logits.dtype).t(), out=logits)
        if self._bias is not None:
            logits += self._bias
        return logits.mul_(self._head.scale) if self._head.scale != 1.0 else logits

    def _tile(self, tile: Tensor, group: Group, mine: slice, sums: Tensor) -> None:
        """Add the losses of a tile to ``sums`` and make the tile the gradient of their weighted sum."""
        q, t, copy = self._scratch[:, : len(tile)]
        is_single = len(group.losses) == 1
        total = None if is_single else torch.zeros_like(tile)
        for number, loss in enumerate(group.losses):
            z = tile if is_single else copy.copy_(tile)
            targets = loss.targets[mine]
            if isinstance(loss.tail, BucketTail):
                values = _bucket(loss.divergence, z, targets)
            else:
                values = _profile(loss.divergence, z, targets, loss.tail.log_profile, q, t)
            sums[number] += values.double().sum()
            if total is None:
                tile.mul_(loss.weight) if loss.weight != 1.0 else None
            elif loss.weight != 0.0:
                total.add_(z, alpha=loss.weight)
        if total is not None:
            tile.copy_(total)


def _cap(logits: Tensor, softcap: float | None) -> Tensor | None:
    """Soft-cap logits in place; the slope of that at each, or None without a cap."""
    if softcap is None:
        return None
    logits.div_(softcap).tanh_()
    slope = 1 - logits.square()
    logits.mul_(softcap)
    return slope


def _bucket(divergence: str, z: Tensor, targets: SparseTargets) -> Tensor:
    """Divergence of each row over the kept tokens and one bucket; ``z`` becomes its gradient.

    All tokens of the bucket share one factor, so the vocabulary is passed over a handful of times. The student's rest
    is summed directly: ``1 - sum`` has no correct digit in a peaked row.
    """
    is_kept = targets.is_kept
    # Padding slots repeat the first one, with no mass of their own.
    ids = torch.where(is_kept, targets.ids, targets.ids[:, :1])
    tiny = torch.finfo(z.dtype).tiny
    z.sub_(z.amax(-1, keepdim=True))
    kept = z.gather(-1, ids)
    z.exp_().scatter_(-1, ids, 0.0)
    s = z.sum(-1)
    # The normaliser from the same sums: a long float32 sum loses small addends beside a large one.
    normaliser = (kept.exp() * is_kept).sum(-1) + s
    log_q = (kept - normaliser.log()[:, None]).masked_fill(~is_kept, LOG_FLOOR)
    log_s = (s / normaliser).clamp_min(tiny).log()
    log_p = torch.where(is_kept, targets.log_probs.to(z.dtype), LOG_FLOOR)
    log_p, log_q = (torch.cat(pair, -1) for pair in ((log_p, targets.log_rest.to(z)[:, None]), (log_q, log_s[:, None])))
    values, gradient = _cells(divergence, log_p, log_q)
    z.mul_((gradient[:, -1] / s.clamp_min(tiny))[:, None])
    z.scatter_(-1, ids, torch.where(is_kept, gradient[:, :-1], gradient[:, :1]))
    return values


def _cells(divergence: str, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Divergence of distributions over few cells, and q_j (G_j - mean of G under q): its gradient at their logits."""
    p, q = log_p.exp(), log_q.exp()
    if divergence == "fkl":
        return (p * (log_p - log_q)).sum(-1), q * p.sum(-1, keepdim=True) - p
    if divergence == "rkl":
        ratio = log_q - log_p
        return (q * ratio).sum(-1), q * _centred(ratio, q)
    if divergence == "jsd":
        to_mixture = math.log(2) - torch.nn.functional.softplus(log_p - log_q)
        values = (q * to_mixture + p * (to_mixture + log_p - log_q)).sum(-1) / 2
        return values, q * _centred(to_mixture, q) / 2
    raise ValueError(f"{divergence} has no fused form")


def _centred(ratio: Tensor, q: Tensor) -> Tensor:
    """``ratio`` less its mean under q. Shifted by the likeliest cell first: with q near 1 there, nothing cancels."""
    shifted = ratio - ratio.gather(-1, q.argmax(-1, keepdim=True))
    return shifted - (q * shifted).sum(-1, keepdim=True)


def _profile(divergence: str, z: Tensor, targets: SparseTargets, log_profile: Tensor, q: Tensor, t: Tensor) -> Tensor:
    """Divergence of each row over the vocabulary, the tail completed by a profile; ``z`` becomes its gradient.

    ``q`` and ``t`` are scratch of z's shape. Outside the kept tokens ``log p = level + log_profile`` with one level per
    row, so p never exists as a matrix and sums over it are products with the profile.
    """
    is_kept = targets.is_kept
    ids = torch.where(is_kept, targets.ids, targets.ids[:, :1])
    log_profile = log_profile.to(z.dtype)
    profile = log_profile.exp()
    log_p = targets.log_probs.to(z.dtype)
    p = log_p.exp() * is_kept
    outside = 1 - (log_profile.double().exp()[ids] * is_kept).sum(-1)
    level = (targets.log_rest.double() - outside.clamp_min(1e-300).log()).to(z.dtype)[:, None]
    z.sub_(z.amax(-1, keepdim=True))
    torch.exp(z, out=q)
    normaliser = q.sum(-1, keepdim=True)
    z.sub_(normaliser.log())
    q.div_(normaliser)

    def of_tail(values: Tensor, at_kept: Tensor) -> Tensor:
        """Sum of p times ``values`` over the tail alone; ``at_kept`` are the values at the kept tokens."""
        return level[:, 0].exp() * (values @ profile - (profile[ids] * at_kept * is_kept).sum(-1))

    log_q = z.gather(-1, ids)
    if divergence == "fkl":
        rest = targets.log_rest.to(z.dtype).exp()
        torch.sub(log_profile, z, out=t)  # log p - log q in the tail, less the level
        values = (p * (log_p - log_q)).sum(-1) + of_tail(t, log_profile[ids] - log_q) + level[:, 0] * rest
        at_kept = q.gather(-1, ids) * (p.sum(-1) + rest)[:, None] - p
        torch.mul(q, (p.sum(-1) + rest)[:, None], out=z)
        z.addcmul_(level.exp(), profile[None], value=-1)
        z.scatter_(-1, ids, torch.where(is_kept, at_kept, at_kept[:, :1]))
        return values
    at_kept = torch.where(is_kept, log_p - log_q, (log_p - log_q)[:, :1])
    torch.sub(log_profile, z, out=t).add_(level).scatter_(-1, ids, at_kept)  # log p - log q
    if divergence == "rkl":
        values = -(q * t).sum(-1)
        torch.neg(t, out=z).sub_(values[:, None]).mul_(q)
        return values
    if divergence == "jsd":
        # log(q / m) = -log((1 + e^t) / 2) = -log1p(expm1(t) / 2): exact where p and q nearly agree.
        torch.clamp_max(t, LOG_RATIO_LIMIT, out=z).expm1_().div_(2).log1p_().neg_()
        of_q = (q * z).sum(-1)
        t.add_(z).clamp_max_(math.log(2))  # log(p / m); its limit is right wherever the ratio was cut
        at_kept = t.gather(-1, ids)
        of_p = (p * at_kept).sum(-1) + of_tail(t, at_kept)
        z.sub_(of_q[:, None]).mul_(q).div_(2)
        return (of_p + of_q) / 2
    raise ValueError(f"{divergence} has no fused form")

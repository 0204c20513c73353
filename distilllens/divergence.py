"""Divergences between a teacher's sparse targets and a student's logits: plain, readable, true in float64.

p is the teacher, q the student; natural logarithms; each function gives nats per row.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distilllens.tails import Tail
from distilllens.targets import SparseTargets

LogProbs = Float[Tensor, "N outcomes"]
PerRow = Float[Tensor, " N"]


def forward_kl(log_p: LogProbs, log_q: LogProbs) -> PerRow:
    """KL(p || q). At least 0, no upper limit. The student must cover what the teacher says."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p: LogProbs, log_q: LogProbs) -> PerRow:
    """KL(q || p). At least 0, no upper limit. The student must not say what the teacher doesn't."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jensen_shannon(log_p: LogProbs, log_q: LogProbs) -> PerRow:
    """Mean KL of p and q to their mixture. Between 0 and ln 2; symmetric (DistillLens, arXiv 2602.13567)."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1) / 2


DIVERGENCES: dict[str, Callable[[LogProbs, LogProbs], PerRow]] = {
    "fkl": forward_kl,
    "rkl": reverse_kl,
    "jsd": jensen_shannon,
}


def sparse_divergence(
    name: str, logits: Float[Tensor, "N V"], targets: SparseTargets, tail: Tail
) -> Float[Tensor, " N"]:
    """Divergence ``name`` of the student's ``logits`` from ``targets`` completed by ``tail``, in nats per row.

    Computed in float32, or in float64 where the logits are; gradients reach the logits.
    """
    log_q = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    log_p, log_q = tail.teacher(targets), tail.student(log_q, targets)
    outcomes = tail.is_outcome(targets)
    if outcomes is not None:
        log_p, log_q = _agree_outside(outcomes, log_p, log_q)
    return DIVERGENCES[name](log_p, log_q)


def _agree_outside(outcomes: Bool[Tensor, "N outcomes"], log_p: LogProbs, log_q: LogProbs) -> tuple[LogProbs, LogProbs]:
    """Padding slots get one negligible mass on both sides: exactly 0 in every divergence, and no gradient."""
    padding = torch.full_like(log_p, -100.0)
    return torch.where(outcomes, log_p, padding), torch.where(outcomes, log_q, padding.to(log_q))


def cross_entropy(logits: Float[Tensor, "N V"], next_ids: Tensor) -> Float[Tensor, " N"]:
    """-log q of the true next token, in nats per row."""
    return torch.nn.functional.cross_entropy(logits.float(), next_ids, reduction="none")

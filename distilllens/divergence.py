"""Divergences between a teacher's sparse targets and a student's logits: plain, readable, true in float64.

p is the teacher, q the student; natural logarithms; each function gives nats per row (total variation has no unit). All
are 0 where p = q and positive elsewhere. On a tail's bucket they see the rest as one outcome, which can only lose
something: a lower bound of the dense value for every f-divergence (all but ``akl`` and ``ab`` here).
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distilllens.divergence_spec import DivergenceSpec, parse_divergence
from distilllens.tails import Tail
from distilllens.targets import SparseTargets
from distilllens_cache import LOG_FLOOR

LogProbs = Float[Tensor, "N outcomes"]
PerRow = Float[Tensor, " N"]


def forward_kl(log_p: LogProbs, log_q: LogProbs) -> PerRow:
    """KL(p || q). No upper limit. The student must cover what the teacher says."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p: LogProbs, log_q: LogProbs) -> PerRow:
    """KL(q || p). No upper limit. The student must not say what the teacher doesn't (MiniLLM, arXiv 2306.08543)."""
    return forward_kl(log_q, log_p)


def jensen_shannon(log_p: LogProbs, log_q: LogProbs, beta: float = 0.5) -> PerRow:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q. At most the entropy of beta.

    With beta = 1/2 symmetric and at most ln 2: the lens divergence of DistillLens (arXiv 2602.13567). The general
    form is that of GKD (arXiv 2306.13649).
    """
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


def jeffreys(log_p: LogProbs, log_q: LogProbs) -> PerRow:
    """(KL(p || q) + KL(q || p)) / 2. Symmetric, no upper limit."""
    return (forward_kl(log_p, log_q) + reverse_kl(log_p, log_q)) / 2


def adaptive_kl(log_p: LogProbs, log_q: LogProbs, mu: float = 0.5) -> PerRow:
    """Forward KL and reverse KL, weighted by the errors in the teacher's head and tail. No upper limit.

    The head is the likeliest outcomes whose probabilities together stay within ``mu``, the likeliest one always among
    them. The weights are shares of sum |p - q| and carry no gradient (AKL, arXiv 2404.02657).
    """
    p, q = log_p.exp(), log_q.detach().exp()
    ordered, order = p.sort(dim=-1, descending=True)
    error = (ordered - q.gather(-1, order)).abs()
    is_head = ordered.cumsum(-1) <= mu
    is_head[..., 0] = True
    of_head = (error * is_head).sum(-1)
    share = of_head / error.sum(-1).clamp_min(torch.finfo(error.dtype).tiny)
    return share * forward_kl(log_p, log_q) + (1 - share) * reverse_kl(log_p, log_q)


def skew_forward_kl(log_p: LogProbs, log_q: LogProbs, alpha: float = 0.1) -> PerRow:
    """KL(p || alpha p + (1 - alpha) q). At most -ln alpha (DistiLLM, arXiv 2402.03898)."""
    return forward_kl(log_p, torch.logaddexp(log_p + math.log(alpha), log_q + math.log1p(-alpha)))


def skew_reverse_kl(log_p: LogProbs, log_q: LogProbs, alpha: float = 0.1) -> PerRow:
    """KL(q || alpha q + (1 - alpha) p). At most -ln alpha (DistiLLM, arXiv 2402.03898)."""
    return skew_forward_kl(log_q, log_p, alpha)


def total_variation(log_p: LogProbs, log_q: LogProbs) -> PerRow:
    """Half of sum |p - q|. Between 0 and 1; its gradient doesn't vanish near p = q (arXiv 2307.15190)."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def alpha_beta(log_p: LogProbs, log_q: LogProbs, alpha: float = 0.2, beta: float = 0.7) -> PerRow:
    """-1 / (a b) sum(p^a q^b - a / (a + b) p^(a + b) - b / (a + b) q^(a + b)). No upper limit for a + b > 1.

    Tends to forward KL for a = 1, b -> 0 and to reverse KL for a -> 0, b = 1 (ABKD, arXiv 2505.04560).
    """
    both, total = alpha * log_p + beta * log_q, alpha + beta
    terms = both.exp() - (alpha * (total * log_p).exp() + beta * (total * log_q).exp()) / total
    return -terms.sum(-1) / (alpha * beta)


DIVERGENCES: dict[str, Callable[..., PerRow]] = {
    "fkl": forward_kl,
    "rkl": reverse_kl,
    "jsd": jensen_shannon,
    "jeffreys": jeffreys,
    "akl": adaptive_kl,
    "skew_fkl": skew_forward_kl,
    "skew_rkl": skew_reverse_kl,
    "tvd": total_variation,
    "ab": alpha_beta,
}


def sparse_divergence(
    divergence: str | DivergenceSpec, logits: Float[Tensor, "N V"], targets: SparseTargets, tail: Tail
) -> Float[Tensor, " N"]:
    """A divergence of the student's ``logits`` from ``targets`` completed by ``tail``, per row.

    Computed in float32, or in float64 where the logits are; gradients reach the logits.
    """
    spec = parse_divergence(divergence) if isinstance(divergence, str) else divergence
    log_q = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    log_p, log_q = tail.teacher(targets), tail.student(log_q, targets)
    outcomes = tail.is_outcome(targets)
    if outcomes is not None:
        log_p, log_q = _agree_outside(outcomes, log_p, log_q)
    return DIVERGENCES[spec.name](log_p, log_q, *spec.parameters)


def _agree_outside(outcomes: Bool[Tensor, "N outcomes"], log_p: LogProbs, log_q: LogProbs) -> tuple[LogProbs, LogProbs]:
    """Padding slots get one negligible mass on both sides: nothing in every divergence, and no gradient."""
    padding = torch.full_like(log_p, LOG_FLOOR)
    return torch.where(outcomes, log_p, padding), torch.where(outcomes, log_q, padding.to(log_q))


def cross_entropy(logits: Float[Tensor, "N V"], next_ids: Tensor) -> Float[Tensor, " N"]:
    """-log q of the true next token, in nats per row."""
    return torch.nn.functional.cross_entropy(logits.float(), next_ids, reduction="none")

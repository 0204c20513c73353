"""Divergences between a teacher's sparse targets and a student's logits: plain, readable, true in float64.

p is the teacher, q the student; natural logarithms; each function gives nats per row (total variation has no unit). All
are 0 where p = q and positive elsewhere. On a tail's bucket they see the rest as one outcome, which can only lose
something: a lower bound of the dense value for every f-divergence (all but ``akl`` and ``ab`` here).

``counts`` is how often each outcome counts in a sum (None: once): 0 for padding, importance weights for samples.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from distilllens.divergence_spec import DivergenceSpec, parse_divergence
from distilllens.tails import Tail
from distilllens.targets import SparseTargets

LogProbs = Float[Tensor, "N outcomes"]
Counts = Float[Tensor, "N outcomes"] | None
PerRow = Float[Tensor, " N"]


def forward_kl(log_p: LogProbs, log_q: LogProbs, *, counts: Counts = None) -> PerRow:
    """KL(p || q). No upper limit. The student must cover what the teacher says."""
    return _sum(log_p.exp() * (log_p - log_q), counts)


def reverse_kl(log_p: LogProbs, log_q: LogProbs, *, counts: Counts = None) -> PerRow:
    """KL(q || p). No upper limit. The student must not say what the teacher doesn't (MiniLLM, arXiv 2306.08543)."""
    return forward_kl(log_q, log_p, counts=counts)


def jensen_shannon(log_p: LogProbs, log_q: LogProbs, beta: float = 0.5, *, counts: Counts = None) -> PerRow:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q. At most the entropy of beta.

    With beta = 1/2 symmetric and at most ln 2: the lens divergence of DistillLens (arXiv 2602.13567). The general
    form is that of GKD (arXiv 2306.13649).
    """
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * forward_kl(log_p, log_m, counts=counts) + (1 - beta) * forward_kl(log_q, log_m, counts=counts)


def jeffreys(log_p: LogProbs, log_q: LogProbs, *, counts: Counts = None) -> PerRow:
    """(KL(p || q) + KL(q || p)) / 2. Symmetric, no upper limit."""
    return _sum((log_p.exp() - log_q.exp()) * (log_p - log_q), counts) / 2


def both_kl(log_p: LogProbs, log_q: LogProbs, *, counts: Counts = None) -> PerRow:
    """KL(p || q) + KL(q || p): twice ``jeffreys``, the baseline FKL+RKL of the released code. No upper limit."""
    return 2 * jeffreys(log_p, log_q, counts=counts)


def adaptive_kl(log_p: LogProbs, log_q: LogProbs, mu: float = 0.5, *, counts: Counts = None) -> PerRow:
    """Forward KL and reverse KL, weighted by the errors in the teacher's head and tail. No upper limit.

    The head is the likeliest outcomes whose probabilities together stay within ``mu``, the likeliest one always among
    them. The weights are shares of sum |p - q| and carry no gradient (AKL, arXiv 2404.02657).
    """
    p, q = log_p.exp(), log_q.detach().exp()
    if counts is not None:
        p, q = p * counts, q * counts
    ordered, order = p.sort(dim=-1, descending=True)
    error = (ordered - q.gather(-1, order)).abs()
    is_head = ordered.cumsum(-1) <= mu
    is_head[..., 0] = True
    of_head = (error * is_head).sum(-1)
    share = of_head / error.sum(-1).clamp_min(torch.finfo(error.dtype).tiny)
    reverse = reverse_kl(log_p, log_q, counts=counts)
    return share * forward_kl(log_p, log_q, counts=counts) + (1 - share) * reverse


def skew_forward_kl(log_p: LogProbs, log_q: LogProbs, alpha: float = 0.1, *, counts: Counts = None) -> PerRow:
    """KL(p || alpha p + (1 - alpha) q). At most -ln alpha (DistiLLM, arXiv 2402.03898)."""
    return forward_kl(log_p, torch.logaddexp(log_p + math.log(alpha), log_q + math.log1p(-alpha)), counts=counts)


def skew_reverse_kl(log_p: LogProbs, log_q: LogProbs, alpha: float = 0.1, *, counts: Counts = None) -> PerRow:
    """KL(q || alpha q + (1 - alpha) p). At most -ln alpha (DistiLLM, arXiv 2402.03898)."""
    return skew_forward_kl(log_q, log_p, alpha, counts=counts)


def total_variation(log_p: LogProbs, log_q: LogProbs, *, counts: Counts = None) -> PerRow:
    """Half of sum |p - q|. Between 0 and 1; its gradient doesn't vanish near p = q (arXiv 2307.15190)."""
    return _sum((log_p.exp() - log_q.exp()).abs(), counts) / 2


def alpha_beta(
    log_p: LogProbs, log_q: LogProbs, alpha: float = 0.2, beta: float = 0.7, *, counts: Counts = None
) -> PerRow:
    """-1 / (a b) sum(p^a q^b - a / (a + b) p^(a + b) - b / (a + b) q^(a + b)). No upper limit for a + b > 1.

    Tends to forward KL for a = 1, b -> 0 and to reverse KL for a -> 0, b = 1 (ABKD, arXiv 2505.04560).
    """
    both, total = alpha * log_p + beta * log_q, alpha + beta
    terms = both.exp() - (alpha * (total * log_p).exp() + beta * (total * log_q).exp()) / total
    return -_sum(terms, counts) / (alpha * beta)


def _sum(terms: LogProbs, counts: Counts) -> PerRow:
    return (terms if counts is None else terms * counts).sum(-1)


DIVERGENCES: dict[str, Callable[..., PerRow]] = {
    "fkl": forward_kl,
    "rkl": reverse_kl,
    "fkl+rkl": both_kl,
    "jsd": jensen_shannon,
    "jeffreys": jeffreys,
    "akl": adaptive_kl,
    "skew_fkl": skew_forward_kl,
    "skew_rkl": skew_reverse_kl,
    "tvd": total_variation,
    "ab": alpha_beta,
}


SLOPES: dict[str, Callable[..., float]] = {
    "rkl": lambda: 1.0,
    "jsd": lambda beta: -(1 - beta) * math.log1p(-beta),
    "skew_rkl": lambda alpha: -math.log(alpha),
    "tvd": lambda: 0.5,
}
"""By divergence: s such that its terms less s q vary least over samples (0 where not named). Where terms grow like s q
for students far above the teacher, that s; for reverse KL, whose terms grow faster, their slope at p = q."""


def sparse_divergence(
    divergence: str | DivergenceSpec, logits: Float[Tensor, "N V"], targets: SparseTargets, tail: Tail
) -> Float[Tensor, " N"]:
    """A divergence of the student's ``logits`` from ``targets`` completed by ``tail``, per row.

    Computed in float32, or in float64 where the logits are; gradients reach the logits.
    """
    spec = parse_divergence(divergence) if isinstance(divergence, str) else divergence
    log_q = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    seen = tail.outcomes(log_q, targets)
    value = DIVERGENCES[spec.name](seen.log_p, seen.log_q, *spec.parameters, counts=seen.counts)
    if seen.unseen is not None and spec.name in SLOPES:
        value = value + SLOPES[spec.name](*spec.parameters) * seen.unseen
    return value


class Certificate(NamedTuple):
    """Limits of the dense JSD that follow from sparse targets alone: ``low <= dense JSD <= low + slack``, in nats."""

    low: PerRow
    """JSD over the kept tokens and a bucket for the rest: coarse-graining can only lose."""
    slack: PerRow
    """m h(w) with m the bucket's mass in the mixture, w the teacher's share of it and h the binary entropy."""


def jsd_certificate(log_p: LogProbs, log_q: LogProbs, beta: float = 0.5, *, counts: Counts = None) -> Certificate:
    """The certificate from the outcomes of a bucket tail, the bucket last.

    The loss is at most that of two disjoint tails: ``m JSD_w(p_tail, q_tail) <= m h(w)``.
    """
    r, s = beta * log_p[:, -1].exp(), (1 - beta) * log_q[:, -1].exp()
    m = r + s
    slack = torch.special.entr(r) + torch.special.entr(s) - torch.special.entr(m)
    return Certificate(jensen_shannon(log_p, log_q, beta, counts=counts), slack.clamp_min(0.0))


def cross_entropy(logits: Float[Tensor, "N V"], next_ids: Tensor) -> Float[Tensor, " N"]:
    """-log q of the true next token, in nats per row."""
    return torch.nn.functional.cross_entropy(logits.float(), next_ids, reduction="none")

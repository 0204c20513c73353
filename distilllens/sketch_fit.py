"""The few directions in which a layer's logits vary most: PCA of its lens hidden states in a metric of the head.

With ``G = W^T M W`` the metric that the head W brings to hidden states, mu and C the mean and covariance of these,

    C G P = P Lambda,   P^T G P = I,   c = P^T G (h - mu),   h ~ mu + P c,

so that ``W P c + W mu`` are the logits' best approximation of that rank in the metric M. With M = I every token of the
vocabulary weighs the same; with the Fisher metric ``M = diag(pi) - pi pi^T`` of the mean tail pi an error counts as
much as it moves the tail's probabilities.

Dimension key: N rows, D hidden size, R rank, V vocabulary.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

STEPS = {4: 0.335, 8: 0.05}
"""By bits of a code: its step in standard deviations of the direction. For 4 bits the best uniform one for a normal
distribution (Max 1960); for 8 bits wide enough to cut off only beyond six."""


@dataclass
class Moments:
    """Sums over target positions of one layer, in float64; they add up in the order of the rows."""

    count: int
    total: Float[Tensor, " D"]
    outer: Float[Tensor, "D D"]
    tail: Float[Tensor, " V"]
    """Probability of each token where it was not kept."""

    @classmethod
    def empty(cls, hidden_size: int, vocab_size: int, device: torch.device | None = None) -> "Moments":
        """Of no rows."""
        sizes = ((hidden_size,), (hidden_size, hidden_size), (vocab_size,))
        return cls(0, *(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))

    def add(self, normed: Float[Tensor, "N D"], tail: Float[Tensor, "N V"]) -> None:
        """Add rows: what the head reads, and the probabilities outside the kept tokens."""
        rows = normed.double()
        self.count += len(rows)
        self.total += rows.sum(0)
        self.outer += rows.T @ rows
        self.tail += tail.sum(0).double()


@dataclass(frozen=True)
class FittedSketch:
    """Directions and mean of one layer, before any rounding."""

    directions: Float[Tensor, "D R"]
    """P: hidden states are ``mean + directions @ c``."""
    encoder: Float[Tensor, "D R"]
    """G P: ``c = (h - mean) @ encoder``."""
    mean: Float[Tensor, " D"]
    deviations: Float[Tensor, " R"]
    """Standard deviation of each coefficient, falling."""

    def first(self, rank: int) -> "FittedSketch":
        """The sketch of a lower rank, which has the first directions of this one."""
        return FittedSketch(self.directions[:, :rank], self.encoder[:, :rank], self.mean, self.deviations[:rank])


def fit_sketch(moments: Moments, weight: Float[Tensor, "V D"], rank: int, *, metric: str = "fisher") -> FittedSketch:
    """The ``rank`` directions that explain most. ValueError for more than the hidden size."""
    if rank > len(moments.total):
        raise ValueError(f"a sketch of rank {rank} of states of size {len(moments.total)}: lower the rank")
    mean = moments.total / moments.count
    covariance = moments.outer / moments.count - torch.outer(mean, mean)
    gram = head_metric(weight, moments.tail if metric == "fisher" else None)
    size = len(mean)
    # A trace of ridge keeps directions that calibration never saw from being infinitely sure.
    ridge = torch.eye(size, dtype=torch.float64, device=mean.device) * (covariance.diagonal().mean() * 1e-6 + 1e-12)
    lower = torch.linalg.cholesky(covariance + ridge)
    values, vectors = torch.linalg.eigh(lower.T @ gram @ lower)
    # Directions in which nothing varies come out as 0 or a little less; their codes are 0 whatever their scale.
    values, vectors = values.flip(0)[:rank].clamp_min(values[-1] * 1e-12), vectors.flip(1)[:, :rank]
    # An eigenvector's sign is arbitrary; fixed, the same moments give the same bytes everywhere.
    largest = vectors.abs().argmax(0)
    vectors = vectors * vectors[largest, torch.arange(rank, device=vectors.device)].sign()
    directions = lower @ vectors / values.sqrt()
    return FittedSketch(directions, gram @ directions, mean, values.sqrt())


def head_metric(
    weight: Float[Tensor, "V D"], mass: Float[Tensor, " V"] | None, *, chunk: int = 8192
) -> Float[Tensor, "D D"]:
    """W^T M W in float64: M the identity, or the Fisher metric of the distribution in proportion to ``mass``."""
    size = weight.shape[1]
    gram = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
    mean = torch.zeros(size, dtype=torch.float64, device=weight.device)
    # Without any tail there is nothing that could weigh the vocabulary.
    shares = None if mass is None or not mass.any() else (mass / mass.sum()).to(weight.device)
    for start in range(0, len(weight), chunk):
        rows = weight[start : start + chunk].double()
        if shares is None:
            gram += rows.T @ rows
        else:
            share = shares[start : start + chunk, None]
            gram += rows.T @ (rows * share)
            mean += (rows * share).sum(0)
    return gram - torch.outer(mean, mean)

"""What stands for the rest of a sparse target in the loss.

Dimension key: N rows, K tokens kept, V vocabulary.

- bucket: one extra outcome on both sides. Coarse-graining, so every divergence is a lower bound of the dense one.
- profile: the rest is spread over the tokens outside the top-k in proportion to the layer's mean tail
  distribution over the whole dataset. Nearly unbiased, and no bytes per target.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from distilllens.targets import SparseTargets
from distilllens_cache import LOG_FLOOR


@dataclass(frozen=True)
class BucketTail:
    """The rest is one outcome, "another token", for teacher and student alike."""

    def teacher(self, targets: SparseTargets) -> Float[Tensor, "N outcomes"]:
        """The teacher's log-probabilities of the K slots, then of the rest."""
        return torch.cat([targets.log_probs, targets.log_rest[:, None]], dim=-1)

    def student(self, log_q: Float[Tensor, "N V"], targets: SparseTargets) -> Float[Tensor, "N outcomes"]:
        """The student's log-probabilities of the same outcomes.

        The rest is the logsumexp over the tokens left out: ``1 - sum`` in float32 is wrong in nearly every
        peaked row.
        """
        kept = log_q.gather(-1, targets.ids).masked_fill(~targets.is_kept, LOG_FLOOR)
        return torch.cat([kept, log_mass_outside(log_q, targets)[:, None]], dim=-1)

    def to(self, device: torch.device) -> "BucketTail":
        """This tail on another device."""
        return self

    def is_outcome(self, targets: SparseTargets) -> Tensor:
        """Slots of ``teacher`` and ``student`` that are outcomes, and not padding. (N, K + 1)."""
        return torch.cat([targets.is_kept, torch.ones_like(targets.is_kept[:, :1])], dim=-1)


@dataclass(frozen=True)
class ProfileTail:
    """The rest is spread over the tokens outside the top-k in proportion to a profile of the vocabulary."""

    log_profile: Float[Tensor, " V"]

    def teacher(self, targets: SparseTargets) -> Float[Tensor, "N V"]:
        """The teacher's log-probabilities of every token, the tail completed. Rows sum to 1."""
        log_profile = self.log_profile.to(targets.log_probs).expand(len(targets), -1)
        spread = targets.log_rest[:, None] + log_profile - log_mass_outside(log_profile, targets)[:, None]
        # Padding slots write what is already there: duplicates of id 0 must not overwrite a kept token.
        slots = torch.where(targets.is_kept, targets.ids, log_profile.shape[-1])
        padded = torch.cat([spread, spread[:, :1]], dim=-1).scatter(-1, slots, targets.log_probs)
        return padded[:, :-1].clamp_min(LOG_FLOOR)

    def student(self, log_q: Float[Tensor, "N V"], targets: SparseTargets) -> Float[Tensor, "N V"]:
        """The student's log-probabilities of every token, as they are."""
        return log_q

    def to(self, device: torch.device) -> "ProfileTail":
        """This tail on another device."""
        return ProfileTail(self.log_profile.to(device))

    def is_outcome(self, targets: SparseTargets) -> None:
        """Every token is an outcome."""
        return


Tail = BucketTail | ProfileTail


def log_mass_outside(log_probs: Float[Tensor, "N V"], targets: SparseTargets) -> Float[Tensor, " N"]:
    """Log of the mass that ``log_probs`` gives to the tokens outside the kept ones; at least LOG_FLOOR."""
    # Padding slots point one past the vocabulary: in a row that keeps fewer tokens, id 0 stays in the rest.
    slots = torch.where(targets.is_kept, targets.ids, log_probs.shape[-1])
    padded = torch.cat([log_probs, log_probs.new_full((len(targets), 1), -torch.inf)], dim=-1)
    outside = padded.scatter(-1, slots, -torch.inf)
    # A row whose top-k is the whole vocabulary has no rest, and logsumexp of nothing has no gradient.
    is_empty = (outside == -torch.inf).all(-1)
    return (
        outside.masked_fill(is_empty[:, None], LOG_FLOOR - math.log(outside.shape[-1]))
        .logsumexp(-1)
        .clamp_min(LOG_FLOOR)
    )

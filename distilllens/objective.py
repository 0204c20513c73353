"""What a student is trained for: which losses, at which layers, with which weights."""

import math
from dataclasses import dataclass

from distilllens.layer_maps import Pairs, equal_shares

OF_UNSURE = "fkl"
"""Divergence where the teacher is unsure: the student is to cover all that it considers."""


@dataclass(frozen=True)
class Gate:
    """Entropies of targets, in nats, above which forward KL takes the place of the divergence; infinity for never.

    Entropies are those of the target that a loss reads, so they rise towards the lower layers: final layer and lens
    layers have numbers of their own.
    """

    final: float = math.inf
    lens: float = math.inf


@dataclass(frozen=True)
class Positions:
    """The share of each example's target positions that is trained on: the highest by loss or entropy."""

    share: float = 1.0
    by: str = "loss"


@dataclass(frozen=True)
class Objective:
    """``(1 - kd_ratio) * CE + kd_ratio * (task + lens_weight * sum over pairs of share * lens divergence)``."""

    task: str
    lens_divergence: str
    pairs: Pairs
    lens_weight: float
    kd_ratio: float
    shares: tuple[float, ...] = ()
    """Of each pair in the lens loss; equal ones when empty."""
    gate: Gate = Gate()
    positions: Positions = Positions()
    lens_trains_head: bool = True
    """Whether the lens losses have a gradient at the head's own weights."""

    @property
    def lens_pairs(self) -> Pairs:
        """Pairs that the loss needs: none where their weight is 0."""
        return self.pairs if self.kd_ratio * self.lens_weight > 0 else ()

    @property
    def share_of_pair(self) -> dict[tuple[int, int], float]:
        """Shares of the lens divergences in their sum, of the pairs that the loss needs."""
        shares = dict(zip(self.pairs, self.shares or equal_shares(len(self.pairs)), strict=True))
        return {pair: shares[pair] for pair in self.lens_pairs}

    @property
    def weight_of_pair(self) -> dict[tuple[int, int], float]:
        """Weights of the lens divergences in the whole loss."""
        return {pair: self.kd_ratio * self.lens_weight * share for pair, share in self.share_of_pair.items()}

    def teacher_layers(self, final_layer: int) -> tuple[int, ...]:
        """Teacher layers whose targets the loss reads."""
        final = (final_layer,) if self.needs_final_targets else ()
        return (*sorted({teacher for _, teacher in self.lens_pairs}), *final)

    def divergences(self, final_layer: int) -> list[tuple[str, int]]:
        """Each divergence in the loss, with the teacher layer whose targets it reads."""
        lens = [teacher for _, teacher in self.lens_pairs]
        found = [(self.lens_divergence, teacher) for teacher in lens]
        if self.gate.lens < math.inf:
            found += [(OF_UNSURE, teacher) for teacher in lens]
        if self.needs_final_targets:
            found.append((self.task, final_layer))
            if self.gate.final < math.inf:
                found.append((OF_UNSURE, final_layer))
        return list(dict.fromkeys(found))

    @property
    def lens_layers(self) -> tuple[int, ...]:
        """Student layers whose lens the loss reads."""
        return tuple(student for student, _ in self.lens_pairs)

    @property
    def needs_final_targets(self) -> bool:
        """Whether the loss reads the teacher's final distribution."""
        return self.kd_ratio > 0 and self.task != "ce"

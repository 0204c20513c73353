"""Which losses a batch has at which rows: the final layer's, those of each pair, and what an entropy gate parts.

Dimension key: n rows, D hidden size, V vocabulary.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distilllens.collate import Batch
from distilllens.divergence import cross_entropy, sparse_divergence
from distilllens.fused import Group, Loss, certain_targets
from distilllens.objective import OF_UNSURE, Objective
from distilllens.tails import BucketTail
from distilllens.targets import entropies


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of the final layer or of a pair, with their losses."""

    states: Float[Tensor, "n D"]
    losses: dict[str, Loss]
    """By the name of their sum; several parts may share one."""
    pair: tuple[int, int] | None = None
    """None: the final layer."""
    share: float = 1.0
    """A row stands for ``1 / share`` rows."""
    is_unsure: bool = False
    """Whether its targets lie beyond an entropy gate."""

    @property
    def label(self) -> str:
        """The part's place, as metrics write it."""
        return "final" if self.pair is None else f"{self.pair[0]}:{self.pair[1]}"

    def group(self, *, lens_trains_head: bool) -> Group:
        """The losses without their names."""
        return Group(len(self.states), tuple(self.losses.values()), lens_trains_head or self.pair is None)

    def at(self, rows: Int[Tensor, " m"]) -> "Part":
        """This part at some of its rows."""
        losses = {name: replace(loss, targets=loss.targets[rows]) for name, loss in self.losses.items()}
        return replace(self, states=self.states[rows], losses=losses)

    def times(self, weight: float) -> "Part":
        """This part, counting ``weight`` times as much in the total."""
        losses = {name: replace(loss, weight=weight * loss.weight) for name, loss in self.losses.items()}
        return replace(self, losses=losses)


def final_part(objective: Objective, batch: Batch, states: Float[Tensor, "n D"]) -> list[Part]:
    """The losses at the final layer: ``ce`` and ``task``."""
    rho = objective.kd_ratio
    # Cross-entropy is the forward KL from all mass on the next token.
    of_next = certain_targets(batch.next_ids)
    losses = {"ce": Loss("fkl", of_next, BucketTail(), 1 - rho)}
    if not objective.needs_final_targets:
        if rho > 0:
            losses["task"] = Loss("fkl", of_next, BucketTail(), rho)
        return [Part(states, losses)]
    layer = batch.final_layer
    losses["task"] = Loss(objective.task, batch.targets[layer], batch.tails[layer], rho)
    return _parted(Part(states, losses), "task", objective.gate.final)


def lens_part(
    objective: Objective, batch: Batch, states: Float[Tensor, "n D"], pair: tuple[int, int], weight: float
) -> list[Part]:
    """The loss of a pair, ``lens/s:t``, at the rows that its student layer reads."""
    student, teacher = pair
    targets, share = batch.targets[teacher][batch.lens_rows.at(student)], batch.lens_rows.share
    name = f"lens/{student}:{teacher}"
    loss = Loss(objective.lens_divergence, targets, batch.tails[teacher], weight / share)
    return _parted(Part(states, {name: loss}, pair, share), name, objective.gate.lens)


def _parted(part: Part, name: str, limit: float) -> list[Part]:
    """The rows whose targets have an entropy within ``limit``, then the others with forward KL as loss ``name``."""
    if limit == math.inf:
        return [part]
    is_unsure = entropies(part.losses[name].targets) > limit
    sure, unsure = (part.at(side.nonzero()[:, 0]) for side in (~is_unsure, is_unsure))
    covered = {name: replace(unsure.losses[name], divergence=OF_UNSURE)}
    return [sure, replace(unsure, losses=unsure.losses | covered, is_unsure=True)]


def final_values(objective: Objective, logits: Float[Tensor, "n V"], batch: Batch, rows: slice) -> Float[Tensor, " n"]:
    """The final layer's part of the loss at each of some rows: ``(1 - kd_ratio) * CE + kd_ratio * task``."""
    ce = cross_entropy(logits, batch.next_ids[rows])
    if not objective.needs_final_targets:
        return ce
    targets, tail = batch.targets[batch.final_layer][rows], batch.tails[batch.final_layer]
    task = sparse_divergence(objective.task, logits, targets, tail)
    if objective.gate.final < math.inf:
        is_unsure = entropies(targets) > objective.gate.final
        task = torch.where(is_unsure, sparse_divergence(OF_UNSURE, logits, targets, tail), task)
    return (1 - objective.kd_ratio) * ce + objective.kd_ratio * task

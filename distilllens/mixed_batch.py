"""A batch from several caches: what each of them says of which target positions.

Dimension key: B batch, T tokens, N target positions of the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from distilllens.collate import Batch, collate
from distilllens.lens_rows import LensRows
from distilllens.mixed_targets import Mixture, mix
from distilllens.mixture import MixedExample
from distilllens.objective import Objective
from distilllens.positions import num_taken
from distilllens.tails import Tail
from distilllens_cache import CachedExample

NOWHERE = np.zeros(0, dtype=np.uint32)
Mix = Literal["data", "losses", "probabilities"]
"""data: each example has one teacher. losses: each has all, and a loss for each. probabilities: one loss from their
mixture."""


@dataclass(frozen=True)
class Teaching:
    """What the loss reads of one of several caches."""

    name: str
    weight: float
    """Of its losses or probabilities; with different data it is held by what is drawn, and this is 1."""
    objective: Objective
    """The run's, with the pairs of this teacher."""
    tails: dict[int, Tail]
    """What stands for the rest at the teacher layers that the loss reads, the final one last."""


@dataclass(frozen=True)
class Teachings:
    """What the loss reads of all caches, in their order."""

    mix: Mix
    each: tuple[Teaching, ...]


@dataclass(frozen=True)
class View:
    """Target positions of a batch with the targets of one teacher, or of a mixture of teachers."""

    teaching: Teaching
    batch: Batch
    """The tokens of the whole batch, of which ``is_target`` names this view's positions alone."""


@dataclass(frozen=True)
class MixedBatch(Batch):
    """A batch with several views; it has no targets of its own."""

    views: tuple[View, ...] = ()
    mix: Mix = "data"

    def to(self, device: torch.device) -> "MixedBatch":
        """This batch on another device."""
        moved = super().to(device)
        assert isinstance(moved, MixedBatch)
        views = (replace(view, batch=view.batch.to(device)) for view in self.views)
        return replace(moved, views=tuple(views))

    def taught(self, *, vocab_size: int) -> tuple[tuple[View, ...], dict[str, Tensor]]:
        """The views that have losses, and how far the teachers of the same positions disagree.

        ``teacher_jsd/final`` and, where all match student layer s, ``teacher_jsd/s`` are sums over positions of the
        weighted JSD between the teachers, in nats (see `Mixture`).
        """
        if self.mix == "data":
            return self.views, {}
        objectives = [view.teaching.objective for view in self.views]
        has_final = objectives[0].needs_final_targets
        places = {"final": [view.batch.final_layer for view in self.views]} if has_final else {}
        matched = [dict(objective.lens_pairs) for objective in objectives]
        for student in matched[0]:
            if all(student in pairs for pairs in matched):
                places[str(student)] = [pairs[student] for pairs in matched]
        mixtures = {name: self._mixture(layers, vocab_size) for name, layers in places.items()}
        # Teachers are compared at all positions, and averages are over those that are trained on.
        lengths = np.array(self.num_targets)
        scale = float(num_taken(lengths, objectives[0].positions.share).sum() / lengths.sum())
        sums = {f"teacher_jsd/{name}": scale * mixture.jsd.sum() for name, mixture in mixtures.items()}
        if self.mix == "losses":
            return self.views, sums
        # Under the layers of the first teacher, whose pairs all others match.
        by_layer = {layers[0]: mixtures[name] for name, layers in places.items()}
        targets = {layer: by_layer[layer].targets for layer in sorted(by_layer)}
        tails = {layer: by_layer[layer].tail for layer in sorted(by_layer)}
        first = self.views[0]
        mixed = replace(first.batch, targets=targets, tails=tails)
        return (View(replace(first.teaching, weight=1.0, tails=tails), mixed),), sums

    def _mixture(self, layers: Sequence[int], vocab_size: int) -> Mixture:
        return mix(
            [view.batch.targets[layer] for view, layer in zip(self.views, layers, strict=True)],
            [view.batch.tails[layer] for view, layer in zip(self.views, layers, strict=True)],
            [view.teaching.weight for view in self.views],
            vocab_size=vocab_size,
        )


def collate_mixed(
    examples: Sequence[MixedExample],
    teachings: Teachings,
    *,
    lens_rows: Callable[[Sequence[CachedExample]], LensRows],
    packs: Sequence[range] | None = None,
) -> MixedBatch:
    """One batch from examples of several caches; ``lens_rows`` chooses the rows that lens layers read of examples.

    ``packs`` as for `collate`.
    """
    whole = collate(examples, {}, packs=packs)
    views = []
    for number, teaching in enumerate(teachings.each):
        mine = [row for row, example in enumerate(examples) if number in example.by_source]
        if not mine:
            continue
        own = [replace(examples[row], targets=examples[row].by_source[number]) for row in mine]
        # The whole batch, in which the others have no target.
        others = {
            row: replace(examples[row], target_positions=NOWHERE) for row in range(len(examples)) if row not in mine
        }
        is_target = collate([others.get(row, one) for row, one in enumerate(examples)], {}, packs=packs).is_target
        batch = replace(
            collate(own, teaching.tails, lens_rows=lens_rows(own)),
            input_ids=whole.input_ids,
            attention_mask=whole.attention_mask,
            position_ids=whole.position_ids,
            is_target=is_target,
        )
        views.append(View(teaching, batch))
    return MixedBatch(**{f.name: getattr(whole, f.name) for f in fields(Batch)}, views=tuple(views), mix=teachings.mix)


def combined(views: Sequence[View], sums: Sequence[dict[str, Tensor]], *, mix: Mix) -> dict[str, Tensor]:
    """The sums of a batch from those of its views, whose names are as `Student.forward` gives them, without a total.

    Where teachers share positions: the weighted ``ce``, ``task`` and ``lens``, and each teacher's own as ``NAME/task``
    and so on. Else views hold different positions, and sums of one name add up.
    """
    found: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        found[name] = found[name] + value if name in found else value

    for view, of_view in zip(views, sums, strict=True):
        if mix != "losses":
            for name, value in of_view.items():
                add(name, value)
            continue
        for name, value in of_view.items():
            if name in ("ce", "task", "lens"):
                add(name, view.teaching.weight * value)
            if name != "ce":
                found[f"{view.teaching.name}/{name}"] = value
    return found

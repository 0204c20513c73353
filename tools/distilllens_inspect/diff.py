"""Two caches compared: whether identity, examples and targets are the same."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from distilllens_cache import CacheReader, Identity, LayerTargets
from distilllens_inspect.console import put
from distilllens_inspect.summary import by_layer
from distilllens_inspect.text import one_line


@dataclass(frozen=True)
class FieldDifference:
    """A field of the identity in which the caches differ."""

    name: str
    a: Any
    b: Any


@dataclass
class LayerDiff:
    """How the targets of one layer differ, over the shared examples."""

    layer_a: int
    layer_b: int
    """Another layer than ``layer_a`` only where both are the last of their teacher."""
    num_targets: int = 0
    identical: int = 0
    """Targets with equal ids, log-probabilities and rest, to the last bit."""
    other_ids: int = 0
    """Targets that keep another set of ids."""
    other_top_id: int = 0
    """Targets whose likeliest ids differ."""
    largest_log_prob: float = 0.0
    """Largest difference, in nats, of the log-probability of an id that both keep."""
    jsd_sum: float = 0.0
    largest_jsd: float = 0.0
    """In nats, at most ln 2."""
    tails: set[str] = field(default_factory=set)
    """What is stored of the tail and differs, or is in one cache only: profile, sketch, codes, samples."""

    @property
    def mean_jsd(self) -> float:
        """In nats, over ids that both keep and one bucket of all others: a lower bound of the JSD of the teachers."""
        return self.jsd_sum / self.num_targets if self.num_targets else 0.0

    @property
    def is_same(self) -> bool:
        return self.identical == self.num_targets and not self.tails

    def add(self, a: LayerTargets, b: LayerTargets) -> None:
        """Count the rows of one example, which has the same target positions in both caches."""
        found = compare_rows(a, b)
        self.num_targets += len(a.counts)
        self.identical += int(found.is_identical.sum())
        self.other_ids += int(found.has_other_ids.sum())
        self.other_top_id += int(found.has_other_top_id.sum())
        self.largest_log_prob = max(self.largest_log_prob, found.largest_log_prob)
        self.jsd_sum += float(found.jsd.sum())
        self.largest_jsd = max(self.largest_jsd, float(found.jsd.max(initial=0.0)))
        if not _equal(a.codes, b.codes):
            self.tails.add("codes")
        if not _equal_parts(a.samples, b.samples, ("counts", "ids", "draws", "log_probs")):
            self.tails.add("samples")


@dataclass(frozen=True)
class CacheDiff:
    """Everything that `inspect diff` says."""

    fields: tuple[FieldDifference, ...]
    only_a: int
    """Examples that B lacks; an example is its tokens and target positions."""
    only_b: int
    shared: int
    is_same_order: bool
    """Whether both caches have exactly the same examples, under the same names, in the same order."""
    layers: tuple[LayerDiff, ...]
    only_layers_a: tuple[int, ...]
    only_layers_b: tuple[int, ...]

    @property
    def same_identity(self) -> bool:
        return not self.fields

    @property
    def same_targets(self) -> bool | None:
        """None where no example is in both, so that there is nothing to compare."""
        if not self.shared:
            return None
        return not self.only_layers_a and not self.only_layers_b and all(layer.is_same for layer in self.layers)

    @property
    def is_same(self) -> bool:
        """Whether a training run could not tell the caches apart."""
        return self.same_identity and self.is_same_order and self.same_targets is True

    def to_json(self) -> dict[str, Any]:
        """Plain content for `--json`."""
        return {
            "is_same": self.is_same,
            "same_identity": self.same_identity,
            "same_examples": self.is_same_order,
            "same_targets": self.same_targets,
            "identity": [asdict(difference) for difference in self.fields],
            "examples": {"shared": self.shared, "only_a": self.only_a, "only_b": self.only_b},
            "layers": [
                {
                    "a": layer.layer_a,
                    "b": layer.layer_b,
                    "is_same": layer.is_same,
                    "num_targets": layer.num_targets,
                    "identical": layer.identical,
                    "other_ids": layer.other_ids,
                    "other_top_id": layer.other_top_id,
                    "largest_log_prob": layer.largest_log_prob,
                    "mean_jsd_lower_bound": layer.mean_jsd,
                    "largest_jsd_lower_bound": layer.largest_jsd,
                    "tails_differ": sorted(layer.tails),
                }
                for layer in self.layers
            ],
            "layers_only_in": {"a": list(self.only_layers_a), "b": list(self.only_layers_b)},
        }


@dataclass(frozen=True)
class RowDiffs:
    """How each of T rows differs from its twin."""

    is_identical: NDArray[np.bool_]
    has_other_ids: NDArray[np.bool_]
    has_other_top_id: NDArray[np.bool_]
    largest_log_prob: float
    jsd: NDArray[np.float64]
    """(T,) in nats."""


def compare_rows(a: LayerTargets, b: LayerTargets) -> RowDiffs:
    """Compare T sparse distributions with their twins.

    The JSD is over the ids that both rows keep and one bucket with everything else of each: its rest, and what
    it gives to ids that the other does not keep. Merging outcomes never raises a JSD, so this is a lower bound.
    """
    rows = len(a.counts)
    row_a, row_b = (np.repeat(np.arange(rows), one.counts) for one in (a, b))
    size = 1 + max(int(one.ids.max(initial=0)) for one in (a, b))
    keys = [row * size + one.ids.astype(np.int64) for row, one in ((row_a, a), (row_b, b))]
    _, at_a, at_b = np.intersect1d(*keys, assume_unique=True, return_indices=True)
    row = row_a[at_a]
    p, rest_p = _cells(a, at_a, row_a)
    q, rest_q = _cells(b, at_b, row_b)
    jsd = np.bincount(row, _jsd_terms(p, q), rows) + _jsd_terms(rest_p, rest_q)
    common = np.bincount(row, minlength=rows)
    distance = np.abs(a.log_probs[at_a].astype(np.float64) - b.log_probs[at_b])
    has_other_ids = (a.counts != common) | (b.counts != common)
    is_off = np.bincount(row, distance > 0, rows) > 0
    return RowDiffs(
        is_identical=~has_other_ids & ~is_off & (a.log_rest == b.log_rest),
        has_other_ids=has_other_ids,
        has_other_top_id=a.ids[a.offsets[:-1]] != b.ids[b.offsets[:-1]],
        largest_log_prob=float(distance.max(initial=0.0)),
        jsd=np.clip(jsd, 0.0, np.log(2.0)),
    )


def _cells(targets: LayerTargets, common: NDArray[np.int64], row: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
    """Probabilities of the common ids, and of everything else in each row."""
    probabilities = np.exp(targets.log_probs.astype(np.float64))
    is_other = np.ones(len(probabilities), np.bool_)
    is_other[common] = False
    others = np.bincount(row[is_other], probabilities[is_other], len(targets.counts))
    return probabilities[common], others + np.exp(targets.log_rest.astype(np.float64))


def _jsd_terms(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each outcome's part of the JSD in nats; an outcome without probability adds nothing of its side."""
    m = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(one > 0, one * np.log(one / m), 0.0) for one in (p, q)]
    return (parts[0] + parts[1]) / 2


def diff_caches(a: CacheReader, b: CacheReader) -> CacheDiff:
    """Compare two caches; a few decoded shards of each are in memory.

    Examples are paired by their tokens and target positions, wherever they stand. Caches of other teachers or
    other settings are compared as far as they have layers in common.
    """
    identities = a.manifest.identity, b.manifest.identity
    layers = [LayerDiff(*pair) for pair in _common_layers(*identities)]
    _compare_tails(a, b, layers)
    digests = a.example_digests, b.example_digests
    shared = 0
    for place_a, place_b in _pairs(*digests):
        shared += 1
        one, other = a[place_a], b[place_b]
        for layer in layers:
            layer.add(one.targets[layer.layer_a], other.targets[layer.layer_b])
    return CacheDiff(
        fields=_field_differences(*identities),
        only_a=len(a) - shared,
        only_b=len(b) - shared,
        shared=shared,
        is_same_order=a.ids == b.ids and digests[0] == digests[1],
        layers=tuple(layers),
        only_layers_a=tuple(sorted(set(identities[0].layers) - {layer.layer_a for layer in layers})),
        only_layers_b=tuple(sorted(set(identities[1].layers) - {layer.layer_b for layer in layers})),
    )


def _pairs(a: Sequence[str], b: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Places of equal digests, ascending in A; the n-th of several equal ones is paired with the n-th."""
    places: dict[str, list[int]] = defaultdict(list)
    for place in reversed(range(len(b))):
        places[b[place]].append(place)
    for place, digest in enumerate(a):
        if twins := places.get(digest):
            yield place, twins.pop()


def _field_differences(a: Identity, b: Identity) -> tuple[FieldDifference, ...]:
    plain = [identity.model_dump(mode="json") for identity in (a, b)]
    return tuple(
        FieldDifference(name, *(content.get(name) for content in plain))
        for name in sorted(Identity.model_fields)
        if getattr(a, name) != getattr(b, name)
    )


def _common_layers(a: Identity, b: Identity) -> list[tuple[int, int]]:
    """Lens layers of the same number, and the last layers, which may have different ones."""
    lens = sorted(set(a.layers[:-1]) & set(b.layers[:-1]))
    return [*((layer, layer) for layer in lens), (a.layers[-1], b.layers[-1])]


def _compare_tails(a: CacheReader, b: CacheReader, layers: Sequence[LayerDiff]) -> None:
    """Note the tail profiles and sketches that differ, or that one cache lacks."""
    sums, sketches = (a.tail_sums(), b.tail_sums()), (a.sketches(), b.sketches())
    for layer in layers:
        if not _equal(sums[0].get(layer.layer_a), sums[1].get(layer.layer_b)):
            layer.tails.add("profile")
        found = sketches[0].get(layer.layer_a), sketches[1].get(layer.layer_b)
        if not _equal_parts(*found, ("basis", "offset", "softcap")):
            layer.tails.add("sketch")


def _equal(a: NDArray | None, b: NDArray | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


def _equal_parts(a: object, b: object, names: Sequence[str]) -> bool:
    if a is None or b is None:
        return a is b
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)


def print_diff(diff: CacheDiff, console: Console) -> None:
    """The answer for people: the fields that differ, the examples, a line per layer, the verdict."""
    if diff.fields:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for name in ("identity", "A", "B"):
            table.add_column(name, overflow="fold")
        for difference in diff.fields:
            table.add_row(difference.name, *(one_line(_text(value)) for value in (difference.a, difference.b)))
        put(console, table)
        console.print()
    if diff.layers and diff.shared:
        put(console, _layer_table(diff))
        console.print("JSD in nats, over the ids that both keep and one bucket for everything else: a lower bound.")
        console.print("log p: of ids that both keep, in nats.")
        console.print()
    for name, layers in (("A", diff.only_layers_a), ("B", diff.only_layers_b)):
        if layers:
            console.print(f"Only {name} has {'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))}.")
    number = len(diff.fields)
    fields = f"differs in {number} field{'' if number == 1 else 's'}"
    console.print(f"identity   {'same' if diff.same_identity else fields}")
    counts = f"{diff.shared:,} in both, {diff.only_a:,} only in A, {diff.only_b:,} only in B"
    moved = "" if diff.is_same_order or diff.only_a or diff.only_b else ", in another order or under other names"
    console.print(f"examples   {'same' if diff.is_same_order else counts + moved}")
    verdicts = {True: "same", False: "differ", None: "nothing to compare: no example is in both"}
    console.print(f"targets    {verdicts[diff.same_targets]}")


def _layer_table(diff: CacheDiff) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("layer", "targets", "identical", "other ids", "other top 1", "largest log p", "mean JSD", "max JSD"):
        table.add_column(name, justify="right")
    table.add_column("other tails")
    for layer in diff.layers:
        number = max(1, layer.num_targets)
        table.add_row(
            str(layer.layer_a) if layer.layer_a == layer.layer_b else f"{layer.layer_a}:{layer.layer_b}",
            f"{layer.num_targets:,}",
            *(f"{count / number:.1%}" for count in (layer.identical, layer.other_ids, layer.other_top_id)),
            f"{layer.largest_log_prob:.2g}",
            f"{layer.mean_jsd:.2g}",
            f"{layer.largest_jsd:.2g}",
            ", ".join(sorted(layer.tails)) or "none",
        )
    return table


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, dict):
        return by_layer(dict(sorted(value.items(), key=lambda item: int(item[0]))))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

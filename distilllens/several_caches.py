"""Several caches opened as one source of examples, after everything that could keep them apart was compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from distilllens.config import TrainConfig
from distilllens.matching import Matching
from distilllens.mixed_batch import Mix, Teaching
from distilllens.mixed_targets import is_mixable
from distilllens.mixture import DataMixture, SameExamples
from distilllens_cache import CacheError, CacheReader

SHARED = ("tokenizer_digest", "vocab_size")
"""Fields of the identity in which all caches of a run agree, whatever the loss reads of them."""


@dataclass(frozen=True)
class SeveralCaches:
    """The caches of a run in the order in which they were given."""

    readers: tuple[CacheReader, ...]
    names: tuple[str, ...]
    """Different from each other: the folders' own names where they are."""
    mix: Mix
    weights: tuple[float, ...]
    source: DataMixture | SameExamples


def open_caches(config: TrainConfig) -> SeveralCaches:
    """Open the caches of a run. CacheError or ValueError naming the caches that don't go together, and why."""
    readers = tuple(CacheReader(config.cache_folder(location)) for location in config.cache)
    for other in readers[1:]:
        if readers[0].digest == other.digest:
            raise CacheError(f"{readers[0].folder} and {other.folder} are copies of one cache: give it once.")
        _require_equal(readers[0], other, SHARED)
    names = [location.rstrip("/").rpartition("/")[2] for location in config.cache]
    if len(set(names)) < len(names):
        names = list(config.cache)
    mix = _choose_mix(config, readers)
    given = config.cache_weights
    if mix == "data":
        weights = given or tuple(Fraction(len(reader), sum(map(len, readers))) for reader in readers)
        source = DataMixture(readers, names=names, weights=weights)
    else:
        weights = given or (1.0,) * len(readers)
        weights = tuple(weight / sum(weights) for weight in weights)
        source = SameExamples(readers, [_places(readers[0], other) for other in readers[1:]])
    return SeveralCaches(readers, tuple(names), mix, tuple(map(float, weights)), source)


def match_each(caches: SeveralCaches, match: Callable[[CacheReader], Matching]) -> list[Matching]:
    """The student held against each cache by ``match``; what is wrong names the cache."""
    return [_match(reader, match) for reader in caches.readers]


def check_teachings(caches: SeveralCaches, matchings: Sequence[Matching], teachings: Sequence[Teaching]) -> None:
    """CacheError or ValueError where what the loss reads of the caches doesn't fit together.

    What it doesn't read may differ: lens layers and their norm where only the final layer counts, and all that teachers
    say where only the text does.
    """
    first, *others = teachings
    for reader, other in zip(caches.readers[1:], others, strict=True):
        if first.objective.lens_pairs:
            _require_equal(caches.readers[0], reader, ("lens_norm",))
        folders = f"{caches.readers[0].folder} and {reader.folder}"
        pairs, theirs = first.objective.lens_pairs, other.objective.lens_pairs
        if caches.mix == "data" and pairs != theirs:
            depths = [one.manifest.identity.num_layers for one in (caches.readers[0], reader)]
            raise ValueError(
                f"{folders} have teachers of {depths[0]} and {depths[1]} layers and pairs {_text(pairs)} and "
                f"{_text(theirs)}: different data is trained on with one set of layers; name with --pairs what every "
                f"cache holds, or leave one out"
            )
        matched = [[student for student, _ in one] for one in (pairs, theirs)]
        if caches.mix == "probabilities" and matched[0] != matched[1]:
            raise ValueError(
                f"{folders} match the student's layers {matched[0]} and {matched[1]}: teachers are mixed as "
                f"probabilities where all match the same layers; give --pairs, or take --mix losses"
            )
    for reader, teaching, matching in zip(caches.readers, teachings, matchings, strict=True):
        if caches.mix == "probabilities" and not all(map(is_mixable, teaching.tails.values())):
            raise ValueError(
                f"--mix probabilities cannot mix the tail {matching.tail} of {reader.folder}: choose --tail bucket, "
                f"profile or sketch, or --mix losses"
            )


def _match(reader: CacheReader, match: Callable[[CacheReader], Matching]) -> Matching:
    try:
        return match(reader)
    except CacheError:
        raise
    except ValueError as error:
        raise ValueError(f"{reader.folder}: {error}") from None


def _require_equal(first: CacheReader, other: CacheReader, fields: Sequence[str]) -> None:
    """CacheError naming the field of the identity in which two caches differ."""
    ours, theirs = first.manifest.identity, other.manifest.identity
    for name in fields:
        if getattr(ours, name) != getattr(theirs, name):
            raise CacheError(
                f"{first.folder} and {other.folder} cannot train one student: {name} is {getattr(ours, name)!r} in the "
                f"first and {getattr(theirs, name)!r} in the other. Take caches that agree in it."
            )


def _choose_mix(config: TrainConfig, readers: Sequence[CacheReader]) -> Mix:
    if config.method == "sft" and config.mix in ("losses", "probabilities"):
        raise ValueError(f"--mix {config.mix} mixes teachers, and --method sft has none: drop one of the two")
    if config.mix != "auto":
        return config.mix
    if config.method == "sft":
        return "data"
    digests = [set(reader.example_digests) for reader in readers]
    if all(one == digests[0] for one in digests):
        return "losses"
    for number, other in enumerate(digests):
        for before in range(number):
            if shared := len(other & digests[before]):
                raise ValueError(
                    f"{readers[before].folder} and {readers[number].folder} share {shared} examples and differ in "
                    f"others: --mix data takes them for different data; several teachers need caches of the same rows"
                )
    return "data"


def _places(first: CacheReader, other: CacheReader) -> NDArray[np.int64]:
    """Where ``other`` holds each example of ``first``; the n-th of several equal ones is the n-th.

    CacheError with the first example that one of them lacks.
    """
    mine, theirs = first.example_digests, other.example_digests
    held: dict[str, list[int]] = {}
    for place, digest in reversed(list(enumerate(theirs))):
        held.setdefault(digest, []).append(place)
    places = np.empty(len(mine), dtype=np.int64)
    for place, digest in enumerate(mine):
        if not held.get(digest):
            raise _differ(first, place, other)
        places[place] = held[digest].pop()
    if left := sorted(place for some in held.values() for place in some):
        raise _differ(other, left[0], first)
    return places


def _differ(holder: CacheReader, place: int, other: CacheReader) -> CacheError:
    id, size = holder.ids[place], (int(holder.num_tokens[place]), int(holder.num_targets[place]))
    found = f"example {id} of {holder.folder} ({size[0]} tokens, {size[1]} targets) is not in {other.folder}"
    if id in other.ids:
        twin = other.ids.index(id)
        theirs = int(other.num_tokens[twin]), int(other.num_targets[twin])
        what = "other tokens" if theirs == size else f"{theirs[0]} tokens and {theirs[1]} targets"
        found += f", whose example {id} has {what}"
    return CacheError(
        f"{found}: teachers are mixed over the same examples. Cache the same rows with the same template and "
        f"lengths, or mix different data with --mix data."
    )


def _text(pairs: Sequence[tuple[int, int]]) -> str:
    return ",".join(f"{student}:{teacher}" for student, teacher in pairs) or "none"

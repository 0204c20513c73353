"""The records of a cache as models: what was written says how to read it."""

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, StringConstraints, ValidationError, model_validator

from distilllens_cache import layout
from distilllens_cache.errors import CacheError
from distilllens_cache.identity import Identity
from distilllens_cache.record import Count, Finite, Positive, Record, Sha256, Text
from distilllens_cache.sealed_json import seal, unseal
from distilllens_cache.tail_spec import MAX_RANK


class FileRecord(Record):
    """A file of the cache, and what its bytes must be."""

    name: Annotated[str, StringConstraints(max_length=240)]
    size: Count
    """Bytes."""
    sha256: Sha256

    @model_validator(mode="after")
    def _is_inside(self) -> Self:
        if not layout.is_safe_name(self.name):
            raise ValueError(f"{self.name[:80]!r} is not a plain relative name")
        return self


class LayerStats(Record):
    """Sums over target positions of one layer."""

    num_targets: Count
    num_ids: Count
    """Ids kept."""
    kept_mass: Finite
    """Sum of the probability of the kept ids."""
    entropy: Finite
    """Sum of the entropy over the kept ids and the rest as one cell, in nats: at most the true one."""
    bytes: Count
    """Compressed bytes of this layer's columns on disk."""

    def __add__(self, other: "LayerStats") -> "LayerStats":
        return LayerStats(**{name: getattr(self, name) + getattr(other, name) for name in LayerStats.model_fields})


class ShardRecord(FileRecord):
    """A shard: some consecutive examples with all their targets."""

    LATER: ClassVar[frozenset[str]] = frozenset({"tail_rows"})

    codec: Text
    num_examples: Positive
    num_tokens: Count
    num_targets: Count
    tails: FileRecord | None
    """Its tail sums, where the cache stores them."""
    tail_rows: FileRecord | None = None
    """What it stores of the tail of each target, where the cache does."""

    @property
    def files(self) -> "list[FileRecord]":
        """The shard's own file, then its tail sums and its tail rows."""
        return [part for part in (self, self.tails, self.tail_rows) if part is not None]

    def check_names(self, number: int, identity: Identity) -> None:
        """`CacheError` unless these are the files of shard ``number`` that ``identity`` asks for."""
        wanted = (
            layout.shard_name(number),
            layout.tails_name(number) if identity.profile_layers else None,
            layout.tail_rows_name(number) if identity.tail_row_layers else None,
        )
        found = (self.name, self.tails and self.tails.name, self.tail_rows and self.tail_rows.name)
        for what, name, expected in zip(("targets", "tail sums", "tail rows"), found, wanted, strict=True):
            if name != expected:
                raise CacheError(f"the file of the {what} of shard {number} is called {name}, not {expected}")


class SketchRecord(Record):
    """The sketch of one layer, and what its codes were computed with."""

    LATER: ClassVar[frozenset[str]] = frozenset({"num_examples"})

    rank: Annotated[int, Field(ge=1, le=MAX_RANK)]
    """Directions."""
    bits: Literal[4, 8]
    """Of each code."""
    hidden_size: Annotated[int, Field(ge=1, le=1 << 24)]
    """Size of the hidden states that the projection encodes."""
    softcap: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    """Logits x of the sketch stand for ``softcap * tanh(x / softcap)``, where there is one."""
    sketch: FileRecord
    projection: FileRecord
    num_examples: Count = 0
    """Where examples were added later: how many there were when the sketch was fitted, to some of them."""

    def check(self, layer: int, identity: Identity) -> None:
        """`CacheError` unless this is the sketch of ``layer`` that ``identity`` asks for."""
        spec = identity.tail_specs[layer].sketch if layer in identity.layers else None
        if spec is None or (spec.rank, spec.bits) != (self.rank, self.bits) or self.rank > self.hidden_size:
            raise CacheError(
                f"the sketch of layer {layer} has rank {self.rank}, {self.bits} bits and hidden size "
                f"{self.hidden_size}; expected is {spec or 'no sketch'}"
            )
        names = layout.sketch_name(layer), layout.projection_name(layer)
        if (self.sketch.name, self.projection.name) != names:
            raise CacheError(f"the files of layer {layer} are {self.sketch.name} and {self.projection.name}")


class PlannedShard(Record):
    """Which examples a shard holds: ``first`` to ``stop - 1``."""

    name: str
    first: Count
    stop: Positive


class Plan(Record):
    """Written before the teacher runs: what the cache will be."""

    kind: Literal["distilllens-plan"] = "distilllens-plan"
    format_version: Literal[1] = layout.FORMAT_VERSION
    identity: Identity
    index: FileRecord
    tokenizer_files: tuple[FileRecord, ...]
    shards: tuple[PlannedShard, ...]

    @property
    def num_examples(self) -> int:
        return self.shards[-1].stop

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        _check_files(self.index, self.tokenizer_files)
        at = 0
        for number, shard in enumerate(self.shards):
            if shard.name != layout.shard_name(number) or shard.first != at or shard.stop <= at:
                raise ValueError(f"shard {number} is not the next one: {shard.name} from {shard.first} to {shard.stop}")
            at = shard.stop
        if not at:
            raise ValueError("no shards")
        return self


class Sidecar(Record):
    """Commits one shard: written after its files."""

    LATER: ClassVar[frozenset[str]] = frozenset({"sketches_sha256"})

    kind: Literal["distilllens-shard"] = "distilllens-shard"
    format_version: Literal[1] = layout.FORMAT_VERSION
    plan_sha256: Sha256
    """Of the bytes of plan.json."""
    number: Count
    shard: ShardRecord
    layer_stats: dict[Positive, LayerStats]
    sketches_sha256: Sha256 | None = None
    """`sketches_digest` of the sketches that the codes of this shard belong to."""


class SketchCommit(Record):
    """Commits one sketch: written after its files."""

    kind: Literal["distilllens-sketch"] = "distilllens-sketch"
    format_version: Literal[1] = layout.FORMAT_VERSION
    plan_sha256: Sha256
    """Of the bytes of plan.json."""
    layer: Positive
    sketch: SketchRecord


class Manifest(Record):
    """Written once, last: the cache is whole."""

    LATER: ClassVar[frozenset[str]] = frozenset({"sketches"})

    kind: Literal["distilllens-cache"] = "distilllens-cache"
    format_version: Literal[1] = layout.FORMAT_VERSION
    identity: Identity
    plan_sha256: Sha256
    """Of the bytes of plan.json."""
    index: FileRecord
    tokenizer_files: tuple[FileRecord, ...]
    shards: tuple[ShardRecord, ...]
    tail_sums: FileRecord | None
    """Tail sums over all shards, where the cache stores them."""
    layer_stats: dict[Positive, LayerStats]
    sketches: dict[Positive, SketchRecord] = Field(default_factory=dict)
    """By layer, where the cache stores sketches."""

    @property
    def num_examples(self) -> int:
        return sum(shard.num_examples for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_targets(self) -> int:
        return sum(shard.num_targets for shard in self.shards)

    @property
    def files(self) -> list[FileRecord]:
        """Every file that the manifest names."""
        sketches = [part for record in self.sketches.values() for part in (record.sketch, record.projection)]
        shards = [part for shard in self.shards for part in shard.files]
        sums = [] if self.tail_sums is None else [self.tail_sums]
        return [self.index, *self.tokenizer_files, *sketches, *shards, *sums]

    @property
    def total_bytes(self) -> int:
        """Bytes of every file that the manifest names."""
        return sum(record.size for record in self.files)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        _check_files(self.index, self.tokenizer_files)
        if self.identity.format_version != self.format_version:
            raise ValueError(f"the identity has format_version {self.identity.format_version}")
        if not self.shards:
            raise ValueError("no shards")
        for number, shard in enumerate(self.shards):
            shard.check_names(number, self.identity)
        if (self.tail_sums and self.tail_sums.name) != (layout.TAIL_SUMS if self.identity.profile_layers else None):
            raise ValueError(f"the tail sums do not fit store_tail={self.identity.store_tail}")
        if tuple(sorted(self.sketches)) != self.identity.sketch_layers:
            raise ValueError(f"sketches of the layers {sorted(self.sketches)}, not {list(self.identity.sketch_layers)}")
        for layer, record in self.sketches.items():
            record.check(layer, self.identity)
            if record.num_examples and record.num_examples >= self.num_examples:
                raise ValueError(
                    f"the sketch of layer {layer} has num_examples {record.num_examples}, as if more were added, and "
                    f"there are {self.num_examples}"
                )
        if tuple(sorted(self.layer_stats)) != self.identity.layers:
            raise ValueError(f"layer_stats has the layers {sorted(self.layer_stats)}, not {list(self.identity.layers)}")
        return self


def _check_files(index: FileRecord, tokenizer_files: tuple[FileRecord, ...]) -> None:
    if index.name != layout.INDEX:
        raise ValueError(f"the index is called {index.name}, not {layout.INDEX}")
    names = [record.name for record in tokenizer_files]
    if len(set(names)) != len(names) or not all(name.startswith(f"{layout.TOKENIZER}/") for name in names):
        raise ValueError(f"tokenizer files must be different files below {layout.TOKENIZER}/; found {names[:5]}")


def sketches_digest(sketches: dict[int, SketchRecord], *, plan_sha256: str) -> str | None:
    """SHA-256 of the bytes of all sketches' commit files, layers ascending; None without sketches."""
    if not sketches:
        return None
    commits = (SketchCommit(plan_sha256=plan_sha256, layer=layer, sketch=sketches[layer]) for layer in sorted(sketches))
    return hashlib.sha256(b"".join(map(to_bytes, commits))).hexdigest()


Model = TypeVar("Model", Plan, Sidecar, SketchCommit, Manifest)


def to_bytes(record: Plan | Sidecar | SketchCommit | Manifest) -> bytes:
    """The file of ``record``: the same bytes whenever it is equal."""
    return seal(record.model_dump(mode="json"))


def from_bytes(model: type[Model], data: bytes, *, name: str) -> Model:
    """The record in a sealed file called ``name``; `CacheError` if it is damaged or impossible."""
    content = unseal(data, name=name)
    try:
        return model.model_validate_json(content, strict=True)
    except ValidationError as error:
        version = _version_in(content)
        if version is not None and version != layout.FORMAT_VERSION:
            raise CacheError(
                f"{name} has format version {version}, this distilllens reads version {layout.FORMAT_VERSION}. "
                f"Use the version of distilllens that wrote the cache, or write it again."
            ) from None
        problems = "; ".join(
            f"{'.'.join(str(part) for part in one['loc']) or 'file'}: {one['msg'][:200]}"
            for one in error.errors(include_url=False, include_context=False, include_input=False)[:3]
        )
        raise CacheError(
            f"{name} is not what version {layout.FORMAT_VERSION} of the format allows: {problems}."
        ) from None


def _version_in(content: bytes) -> Any:
    version = json.loads(content).get("format_version")
    return version if isinstance(version, int) else None

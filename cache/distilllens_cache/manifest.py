"""The records of a cache as models: what was written says how to read it."""

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from distilllens_cache import layout
from distilllens_cache.errors import CacheError
from distilllens_cache.sealed_json import seal, unseal

Count = Annotated[int, Field(ge=0, le=2**53)]
Positive = Annotated[int, Field(ge=1, le=2**53)]
VocabSize = Annotated[int, Field(ge=1, le=2**32 - 1)]
Text = Annotated[str, StringConstraints(max_length=4096)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenizerIdentity(_Record):
    """Which tokenizer the token ids belong to."""

    digest: Text
    vocab_size: VocabSize
    """The effective vocabulary: ids at or above it never occur."""


class Identity(_Record):
    """Everything that decides what a cache contains. A resumed run must agree in every field."""

    format_version: Positive = layout.FORMAT_VERSION
    teacher: Text
    """Where the teacher came from, for people."""
    teacher_digest: Text
    teacher_config_digest: Text
    num_layers: Positive
    """Layers of the teacher."""
    dtype: Text
    attn_implementation: Text
    torch_version: Text
    transformers_version: Text
    device: Text
    tokenizer_digest: Text
    template_digest: Text
    vocab_size: VocabSize
    """The effective vocabulary: ids at or above it never occur."""
    dataset_digest: Text
    layers: tuple[Positive, ...]
    """Cached layers, ascending, counted from 1; the last is the teacher's last."""
    lens_norm: Literal["final", "none"]
    top_k: dict[Positive, Positive]
    """By layer: the most ids that a row keeps."""
    store_tail: Literal["profile", "none"]
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    codec: Text
    batch_tokens: Count
    examples_per_shard: Count
    seed: int

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[-1] != self.num_layers:
            raise ValueError(
                f"layers must ascend and end with the teacher's last, {self.num_layers}; found {list(self.layers)}"
            )
        if tuple(sorted(self.top_k)) != self.layers:
            raise ValueError(f"top_k has the layers {sorted(self.top_k)}, the cache has {list(self.layers)}")
        widest = max(self.top_k.values())
        if widest > self.vocab_size:
            raise ValueError(f"top_k is {widest}, more than the vocabulary of {self.vocab_size} ids")
        return self


READER_FIELDS = ("format_version", "tokenizer_digest", "vocab_size", "layers", "lens_norm", "temperature")
"""Fields of an identity that a reader compares; the others are provenance to it."""


def compare_identity(found: Identity, wanted: Identity, fields: Iterable[str] | None = None) -> list[str]:
    """One sentence for each of ``fields`` (default: all) in which a cache differs from what a run wants."""
    names = Identity.model_fields if fields is None else fields
    return [
        f"{name}: cache has {getattr(found, name)!r}, this run has {getattr(wanted, name)!r}"
        for name in names
        if getattr(found, name) != getattr(wanted, name)
    ]


class FileRecord(_Record):
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


class LayerStats(_Record):
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

    codec: Text
    num_examples: Positive
    num_tokens: Count
    num_targets: Count
    tails: FileRecord | None
    """Its tail sums, where the cache stores them."""


class PlannedShard(_Record):
    """Which examples a shard holds: ``first`` to ``stop - 1``."""

    name: str
    first: Count
    stop: Positive


class Plan(_Record):
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


class Sidecar(_Record):
    """Commits one shard: written after its files."""

    kind: Literal["distilllens-shard"] = "distilllens-shard"
    format_version: Literal[1] = layout.FORMAT_VERSION
    plan_sha256: Sha256
    """Of the bytes of plan.json."""
    number: Count
    shard: ShardRecord
    layer_stats: dict[Positive, LayerStats]


class Manifest(_Record):
    """Written once, last: the cache is whole."""

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
        shards = [part for shard in self.shards for part in (shard, shard.tails) if part is not None]
        sums = [] if self.tail_sums is None else [self.tail_sums]
        return [self.index, *self.tokenizer_files, *shards, *sums]

    @property
    def total_bytes(self) -> int:
        """Bytes of every file that the manifest names."""
        return sum(record.size for record in self.files)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        _check_files(self.index, self.tokenizer_files)
        if not self.shards:
            raise ValueError("no shards")
        has_tails = self.identity.store_tail == "profile"
        for number, shard in enumerate(self.shards):
            if shard.name != layout.shard_name(number):
                raise ValueError(f"shard {number} is called {shard.name}")
            if (shard.tails and shard.tails.name) != (layout.tails_name(number) if has_tails else None):
                raise ValueError(f"shard {number} has the wrong tail sums for store_tail={self.identity.store_tail}")
        if (self.tail_sums and self.tail_sums.name) != (layout.TAIL_SUMS if has_tails else None):
            raise ValueError(f"the tail sums do not fit store_tail={self.identity.store_tail}")
        if tuple(sorted(self.layer_stats)) != self.identity.layers:
            raise ValueError(f"layer_stats has the layers {sorted(self.layer_stats)}, not {list(self.identity.layers)}")
        return self


def _check_files(index: FileRecord, tokenizer_files: tuple[FileRecord, ...]) -> None:
    if index.name != layout.INDEX:
        raise ValueError(f"the index is called {index.name}, not {layout.INDEX}")
    names = [record.name for record in tokenizer_files]
    if len(set(names)) != len(names) or not all(name.startswith(f"{layout.TOKENIZER}/") for name in names):
        raise ValueError(f"tokenizer files must be different files below {layout.TOKENIZER}/; found {names[:5]}")


Model = TypeVar("Model", Plan, Sidecar, Manifest)


def to_bytes(record: Plan | Sidecar | Manifest) -> bytes:
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

"""What decides the contents of a cache, and how two caches differ."""

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from distilllens_cache import layout
from distilllens_cache.record import Count, Positive, Record, Text, VocabSize
from distilllens_cache.tail_spec import TailSpec, parse_tail_spec


class TokenizerIdentity(Record):
    """Which tokenizer the token ids belong to."""

    digest: Text
    vocab_size: VocabSize
    """The effective vocabulary: ids at or above it never occur."""


class Identity(Record):
    """Everything that decides what a cache contains. A resumed run must agree in every field."""

    LATER: ClassVar[frozenset[str]] = frozenset({"min_k", "min_prob", "top_p", "calibration_targets"})

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
    min_k: dict[Positive, Positive] = Field(default_factory=dict)
    """By layer, where rows differ in width: the fewest ids that a row keeps."""
    min_prob: dict[Positive, Annotated[float, Field(ge=0, lt=1)]] = Field(default_factory=dict)
    """By layer: ids less likely than this are not kept beyond ``min_k``."""
    top_p: dict[Positive, Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=dict)
    """By layer: no more ids are kept, beyond ``min_k``, once they hold this much of the mass."""
    store_tail: Text | dict[Positive, Text]
    """What is stored of each layer's tail (see `tail_spec`): one text, or by layer where they differ."""
    calibration_targets: Count = 0
    """Target positions that the sketches were fitted to."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    codec: Text
    batch_tokens: Count
    examples_per_shard: Count
    seed: int

    @field_validator("store_tail")
    @classmethod
    def _canonical(cls, value: str | dict[int, str], info: ValidationInfo) -> str | dict[int, str]:
        """One way to say one thing: canonical texts, and a single one where all layers are alike."""
        if isinstance(value, str):
            return str(parse_tail_spec(value))
        layers = info.data.get("layers")
        if layers is not None and tuple(sorted(value)) != layers:
            raise ValueError(f"store_tail has the layers {sorted(value)}, the cache has {list(layers)}")
        texts = {layer: str(parse_tail_spec(text)) for layer, text in sorted(value.items())}
        return next(iter(texts.values())) if len(set(texts.values())) == 1 else texts

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
        for name in ("min_k", "min_prob", "top_p"):
            if unknown := sorted(set(getattr(self, name)) - set(self.layers)):
                raise ValueError(f"{name} has the layers {unknown}, the cache has {list(self.layers)}")
        for layer, least in self.min_k.items():
            if least > self.top_k[layer]:
                raise ValueError(f"min_k of layer {layer} is {least}, more than its top_k of {self.top_k[layer]}")
        return self

    @property
    def tail_specs(self) -> dict[int, TailSpec]:
        """What is stored of the tail of each layer."""
        text = self.store_tail
        return {layer: parse_tail_spec(text if isinstance(text, str) else text[layer]) for layer in self.layers}

    @property
    def profile_layers(self) -> tuple[int, ...]:
        """Layers with tail sums."""
        return tuple(layer for layer, spec in self.tail_specs.items() if spec.profile)

    @property
    def sketch_layers(self) -> tuple[int, ...]:
        """Layers with a sketch."""
        return tuple(layer for layer, spec in self.tail_specs.items() if spec.sketch is not None)

    @property
    def tail_row_layers(self) -> tuple[int, ...]:
        """Layers that store something of the tail of each target."""
        return tuple(layer for layer, spec in self.tail_specs.items() if spec.has_rows)


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

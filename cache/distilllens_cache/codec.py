"""Codecs: how the targets of a shard become columns of an Arrow file, and back."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from distilllens_cache.errors import CacheError


@dataclass(frozen=True)
class Codec:
    """How log-probabilities are stored."""

    name: str
    value_type: pa.DataType
    """Arrow type of log-probabilities and rests."""
    mass_tolerance: float
    """How far the mass of a stored row may be from 1: quantisation on top of `SOURCE_TOLERANCE`."""
    is_lossless: bool
    """Whether float32 comes back bit for bit. If not, decoding normalises each row's k + 1 cells."""

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.value_type.to_pandas_dtype())


SOURCE_TOLERANCE = 1e-4
"""How far the mass of a row may be from 1 when a writer gets it: float32 rounding over a large vocabulary."""

CODECS = {
    codec.name: codec
    for codec in (
        Codec("arrow-fp32", pa.float32(), SOURCE_TOLERANCE, is_lossless=True),
        # Half an ulp of fp16 is 2^-8 below a log-probability of -8, where the flattest rows lie: 0.4 % of
        # their mass.
        Codec("arrow-fp16", pa.float16(), 5e-3, is_lossless=False),
    )
}
"""Every codec of this version, by the name that plans and manifests use."""


def find_codec(name: str) -> Codec:
    """The codec called ``name``; `CacheError` with the known ones otherwise."""
    if name not in CODECS:
        raise CacheError(f"the codec {name[:60]!r} is unknown; this distilllens has {', '.join(CODECS)}.")
    return CODECS[name]


def shard_schema(codec: Codec, layers: tuple[int, ...], top_k: dict[int, int]) -> pa.Schema:
    """The exact columns of a shard. Nothing is nullable; lists hold one example's values."""

    def column(name: str, kind: pa.DataType) -> pa.Field:
        return pa.field(name, kind, nullable=False)

    def items(kind: pa.DataType) -> pa.DataType:
        return pa.list_(pa.field("item", kind, nullable=False))

    columns = [
        column("index", pa.int64()),
        column("id", pa.string()),
        column("token_ids", items(pa.uint32())),
        column("target_positions", items(pa.uint32())),
    ]
    for layer in layers:
        count_type = pa.uint16() if top_k[layer] <= 0xFFFF else pa.uint32()
        columns += [
            column(f"layer_{layer}_counts", items(count_type)),
            column(f"layer_{layer}_ids", items(pa.uint32())),
            column(f"layer_{layer}_log_probs", items(codec.value_type)),
            column(f"layer_{layer}_log_rest", items(codec.value_type)),
        ]
    return pa.schema(columns)

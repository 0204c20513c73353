"""The codecs of this version, by name."""

import pyarrow as pa

from distilllens_cache.errors import CacheError
from distilllens_cache.layer_codec import Codec, LayerShape, list_field
from distilllens_cache.meaning import SOURCE_TOLERANCE
from distilllens_cache.packed_codec import PackedCodec
from distilllens_cache.plain_codec import PlainCodec

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        PlainCodec("arrow-fp32", pa.float32(), SOURCE_TOLERANCE, is_lossless=True),
        # Half an ulp of fp16 is 2^-8 below a log-probability of -8, where the flattest rows lie: 0.4 % of
        # their mass.
        PlainCodec("arrow-fp16", pa.float16(), 5e-3, is_lossless=False),
        PackedCodec(),
    )
}
"""Every codec of this version, by the name that plans and manifests use."""


def find_codec(name: str) -> Codec:
    """The codec called ``name``; `CacheError` with the known ones otherwise."""
    if name not in CODECS:
        raise CacheError(f"the codec {name[:60]!r} is unknown; this distilllens has {', '.join(CODECS)}.")
    return CODECS[name]


def shard_schema(codec: Codec, layers: tuple[int, ...], top_k: dict[int, int], vocab_size: int) -> pa.Schema:
    """The exact columns of a shard. Nothing is nullable; lists hold one example's values."""
    columns = [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        list_field("token_ids", pa.uint32()),
        list_field("target_positions", pa.uint32()),
    ]
    for layer in layers:
        columns += codec.fields(LayerShape(layer, top_k[layer], vocab_size))
    return pa.schema(columns)

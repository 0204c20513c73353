"""A shard's file: examples in, bytes and sums out; and back, after everything was checked."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distilllens_cache.arrow_file import declared_buffers, from_arrow, num_buffers, to_arrow
from distilllens_cache.codec import find_codec, shard_schema
from distilllens_cache.errors import CacheError
from distilllens_cache.identity import Identity
from distilllens_cache.layer_codec import Codec, LayerPlace, LayerShape
from distilllens_cache.lists import bounds_of, lists_of, place_of
from distilllens_cache.manifest import LayerStats
from distilllens_cache.meaning import SOURCE_TOLERANCE, CheckedLayer, FlatLayer, check_layer, entropy_bound
from distilllens_cache.targets import CachedExample, LayerTargets, PlannedExample, example_digest


class EncodedShard(NamedTuple):
    """A shard ready to be written."""

    data: memoryview
    layer_stats: dict[int, LayerStats]


class Expected(NamedTuple):
    """What the plan says about the examples of a shard."""

    first: int
    """Place of its first example."""
    examples: Sequence[PlannedExample]

    @property
    def num_tokens(self) -> int:
        return sum(example.num_tokens for example in self.examples)

    @property
    def num_targets(self) -> int:
        return sum(example.num_targets for example in self.examples)


def encode_shard(
    examples: Sequence[CachedExample], expected: Expected, identity: Identity, *, name: str
) -> EncodedShard:
    """The file of ``examples``, which must be the expected ones and make sense.

    A layer's ``bytes`` are the compressed sizes of its columns' buffers as they lie in the file, without
    padding and metadata.
    """
    codec = find_codec(identity.codec)
    _check_examples(examples, expected, identity, name)
    schema = shard_schema(codec, identity.layers, identity.top_k, identity.vocab_size)
    row_bounds = bounds_of([len(example.target_positions) for example in examples])
    columns: list[pa.Array] = [
        pa.array([example.index for example in examples], pa.int64()),
        pa.array([example.id for example in examples], pa.string()),
        _joined([example.token_ids for example in examples], schema.field("token_ids")),
        _joined([example.target_positions for example in examples], schema.field("target_positions")),
    ]
    flats: dict[int, tuple[FlatLayer, CheckedLayer, slice]] = {}
    for layer in identity.layers:
        flat = _flat([example.targets[layer] for example in examples])
        shape = LayerShape(layer, identity.top_k[layer], identity.vocab_size)
        place = LayerPlace(row_bounds, f"{name}, layer {layer}", place_of(examples, name, layer))
        checked = check_layer(
            flat,
            top_k=shape.top_k,
            vocab_size=shape.vocab_size,
            mass_tolerance=SOURCE_TOLERANCE,
            where=place.where,
        )
        encoded = codec.encode(flat, shape, place)
        flats[layer] = flat, checked, slice(len(columns), len(columns) + len(encoded))
        columns += encoded
    data = to_arrow(pa.RecordBatch.from_arrays(columns, schema=schema), level=codec.compression_level)
    sizes = [buffer.stored for buffer in declared_buffers(data, name=name)]
    buffers = bounds_of([num_buffers(field.type) for field in schema])
    stats = {
        layer: LayerStats(
            num_targets=len(flat.counts),
            num_ids=len(flat.ids),
            kept_mass=float(checked.kept.sum()),
            entropy=entropy_bound(flat, checked),
            bytes=sum(sizes[buffers[own.start] : buffers[own.stop]]),
        )
        for layer, (flat, checked, own) in flats.items()
    }
    return EncodedShard(data, stats)


def decode_shard(
    data: bytes, expected: Expected, identity: Identity, codec: Codec, *, name: str
) -> list[CachedExample]:
    """The examples in a shard's file, which must have the digest of its record. Arrays are read-only."""
    num_rows = len(expected.examples)
    batch = from_arrow(
        data,
        shard_schema(codec, identity.layers, identity.top_k, identity.vocab_size),
        num_rows=num_rows,
        name=name,
        max_bytes=_most_bytes(expected, identity, codec),
    )
    tokens = _split(batch.column("token_ids"))
    positions = _split(batch.column("target_positions"))
    row_bounds = bounds_of([len(part) for part in positions])
    places, ids = batch.column("index").to_pylist(), batch.column("id").to_pylist()
    examples = [CachedExample(places[n], ids[n], tokens[n], positions[n], {}) for n in range(num_rows)]
    _check_examples(examples, expected, identity, name, has_targets=False)
    for layer in identity.layers:
        shape = LayerShape(layer, identity.top_k[layer], identity.vocab_size)
        place = LayerPlace(row_bounds, f"{name}, layer {layer}", place_of(examples, name, layer))
        columns = [batch.column(field.name) for field in codec.fields(shape)]
        _hand_out(codec.decode(columns, shape, place), examples, place, layer)
    return examples


def _flat(targets: Sequence[LayerTargets]) -> FlatLayer:
    return FlatLayer(
        np.concatenate([part.counts for part in targets]).astype(np.int64),
        np.concatenate([part.ids for part in targets]),
        np.concatenate([part.log_probs for part in targets]),
        np.concatenate([part.log_rest for part in targets]),
    )


def _hand_out(flat: FlatLayer, examples: Sequence[CachedExample], place: LayerPlace, layer: int) -> None:
    """Give each example its part."""
    counts = flat.counts.astype(np.int32)
    for array in (counts, flat.ids, flat.log_probs, flat.log_rest):
        array.flags.writeable = False
    row_at, cell_at = place.row_bounds.tolist(), place.cell_bounds(np.cumsum(flat.counts)).tolist()
    for number, example in enumerate(examples):
        rows = slice(row_at[number], row_at[number + 1])
        cells = slice(cell_at[number], cell_at[number + 1])
        example.targets[layer] = LayerTargets(counts[rows], flat.ids[cells], flat.log_probs[cells], flat.log_rest[rows])


def _check_examples(
    examples: Sequence[CachedExample],
    expected: Expected,
    identity: Identity,
    name: str,
    *,
    has_targets: bool = True,
) -> None:
    """Refuse examples that are not the planned ones."""
    if len(examples) != len(expected.examples):
        raise CacheError(f"{name} has {len(examples)} examples; expected are {len(expected.examples)}.")
    for number, (example, planned) in enumerate(zip(examples, expected.examples, strict=True)):
        found = f"{name}, example {example.index} ({example.id[:80]!r})"
        if example.index != expected.first + number or example.id != planned.id:
            raise CacheError(f"{found}: the plan has example {expected.first + number} ({planned.id[:80]!r}) here.")
        tokens, positions = example.token_ids, example.target_positions
        if tokens.dtype != np.uint32 or positions.dtype != np.uint32:
            raise CacheError(f"{found}: token ids and positions are uint32, not {tokens.dtype} and {positions.dtype}.")
        if len(tokens) != planned.num_tokens or len(positions) != planned.num_targets:
            raise CacheError(
                f"{found}: {len(tokens)} tokens and {len(positions)} targets; "
                f"the plan has {planned.num_tokens} and {planned.num_targets}."
            )
        if len(positions) and (int(positions[-1]) > len(tokens) - 2 or (positions[1:] <= positions[:-1]).any()):
            raise CacheError(f"{found}: target positions must ascend and end before the last token of {len(tokens)}.")
        if len(tokens) and int(tokens.max()) >= identity.vocab_size:
            raise CacheError(
                f"{found}: token id {int(tokens.max())}, but the vocabulary has {identity.vocab_size} ids."
            )
        if example_digest(tokens, positions) != planned.digest:
            raise CacheError(f"{found}: its tokens or target positions are not those of the plan.")
        if has_targets:
            _check_shapes(example, identity, found)


def _check_shapes(example: CachedExample, identity: Identity, found: str) -> None:
    if sorted(example.targets) != list(identity.layers):
        raise CacheError(
            f"{found}: targets of the layers {sorted(example.targets)}; expected are {list(identity.layers)}."
        )
    for layer, targets in example.targets.items():
        rows = len(example.target_positions)
        if len(targets.counts) != rows or len(targets.log_rest) != rows:
            raise CacheError(f"{found}, layer {layer}: {len(targets.counts)} rows for {rows} target positions.")
        cells = int(targets.counts.sum())
        if not len(targets.ids) == len(targets.log_probs) == cells:
            raise CacheError(f"{found}, layer {layer}: counts add up to {cells}, but there are {len(targets.ids)} ids.")
        kinds = (targets.counts.dtype, targets.ids.dtype, targets.log_probs.dtype, targets.log_rest.dtype)
        if kinds != (np.int32, np.uint32, np.float32, np.float32):
            raise CacheError(
                f"{found}, layer {layer}: counts int32, ids uint32 and float32 values are expected, not {kinds}."
            )


def _joined(parts: Sequence[NDArray[np.uint32]], field: pa.Field) -> pa.ListArray:
    """A column with one list for each example."""
    return lists_of(pa.array(np.concatenate(parts), pa.uint32()), bounds_of([len(part) for part in parts]), field)


def _split(column: pa.ListArray) -> list[NDArray]:
    values, at = column.values.to_numpy(), column.offsets.to_numpy()
    return [values[at[number] : at[number + 1]] for number in range(len(column))]


def _most_bytes(expected: Expected, identity: Identity, codec: Codec) -> int:
    """What a shard's buffers can at most inflate to."""
    rows, targets = len(expected.examples), expected.num_targets
    lists = 8 * (rows + 1) + 64
    strings = sum(len(example.id.encode()) for example in expected.examples)
    most = 8 * rows + strings + 4 * (expected.num_tokens + targets) + 6 * lists
    for layer in identity.layers:
        shape = LayerShape(layer, identity.top_k[layer], identity.vocab_size)
        most += targets * codec.row_bytes(shape) + codec.layer_bytes(shape) + 4 * lists
    # Every buffer may have a bitmap of validity beside it and is padded to 64 bytes.
    return 2 * most + 128 * (8 + 8 * len(identity.layers))

"""A shard's file: examples in, bytes and sums out; and back, after everything was checked."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distilllens_cache.arrow_file import declared_buffers, from_arrow, to_arrow
from distilllens_cache.codec import SOURCE_TOLERANCE, Codec, find_codec, shard_schema
from distilllens_cache.errors import CacheError
from distilllens_cache.manifest import Identity, LayerStats
from distilllens_cache.meaning import CheckedLayer, FlatLayer, check_layer, entropy_bound
from distilllens_cache.targets import LOG_FLOOR, CachedExample, LayerTargets, PlannedExample, example_digest

_BUFFERS_BEFORE_LAYERS = 2 + 3 + 4 + 4
_BUFFERS_PER_COLUMN = 4


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

    A layer's ``bytes`` are the compressed sizes of its four columns' buffers as they lie in the file, without
    padding and metadata.
    """
    codec = find_codec(identity.codec)
    _check_examples(examples, expected, identity, name)
    schema = shard_schema(codec, identity.layers, identity.top_k)
    row_bounds = _bounds([len(example.target_positions) for example in examples])
    columns: list[pa.Array] = [
        pa.array([example.index for example in examples], pa.int64()),
        pa.array([example.id for example in examples], pa.string()),
        _lists(
            np.concatenate([example.token_ids for example in examples]),
            _bounds([len(example.token_ids) for example in examples]),
            schema.field("token_ids"),
        ),
        _lists(
            np.concatenate([example.target_positions for example in examples]),
            row_bounds,
            schema.field("target_positions"),
        ),
    ]
    flats: dict[int, tuple[FlatLayer, CheckedLayer]] = {}
    for layer in identity.layers:
        targets = [example.targets[layer] for example in examples]
        flat = FlatLayer(
            np.concatenate([part.counts for part in targets]).astype(np.int64),
            np.concatenate([part.ids for part in targets]),
            np.concatenate([part.log_probs for part in targets]),
            np.concatenate([part.log_rest for part in targets]),
        )
        checked = check_layer(
            flat,
            top_k=identity.top_k[layer],
            vocab_size=identity.vocab_size,
            mass_tolerance=SOURCE_TOLERANCE,
            where=_where(examples, name, layer),
        )
        flats[layer] = flat, checked
        cell_bounds = _bounds([len(part.ids) for part in targets])
        columns += [
            _lists(flat.counts, row_bounds, schema.field(f"layer_{layer}_counts")),
            _lists(flat.ids, cell_bounds, schema.field(f"layer_{layer}_ids")),
            _lists(_quantised(flat.log_probs, codec), cell_bounds, schema.field(f"layer_{layer}_log_probs")),
            _lists(_quantised(flat.log_rest, codec), row_bounds, schema.field(f"layer_{layer}_log_rest")),
        ]
    data = to_arrow(pa.RecordBatch.from_arrays(columns, schema=schema))
    sizes = [buffer.stored for buffer in declared_buffers(data, name=name)]
    stats = {}
    for number, (layer, (flat, checked)) in enumerate(flats.items()):
        at = _BUFFERS_BEFORE_LAYERS + number * 4 * _BUFFERS_PER_COLUMN
        stats[layer] = LayerStats(
            num_targets=len(flat.counts),
            num_ids=len(flat.ids),
            kept_mass=float(checked.kept.sum()),
            entropy=entropy_bound(flat, checked),
            bytes=sum(sizes[at : at + 4 * _BUFFERS_PER_COLUMN]),
        )
    return EncodedShard(data, stats)


def decode_shard(
    data: bytes, expected: Expected, identity: Identity, codec: Codec, *, name: str
) -> list[CachedExample]:
    """The examples in a shard's file, which must have the digest of its record. Arrays are read-only."""
    num_rows = len(expected.examples)
    batch = from_arrow(
        data,
        shard_schema(codec, identity.layers, identity.top_k),
        num_rows=num_rows,
        name=name,
        max_bytes=_most_bytes(expected, identity, codec),
    )
    tokens = _split(batch.column("token_ids"))
    positions = _split(batch.column("target_positions"))
    bounds = _bounds([len(part) for part in positions])
    places, ids = batch.column("index").to_pylist(), batch.column("id").to_pylist()
    examples = [CachedExample(places[n], ids[n], tokens[n], positions[n], {}) for n in range(num_rows)]
    _check_examples(examples, expected, identity, name, has_targets=False)
    for layer in identity.layers:
        _decode_layer(batch, examples, bounds, layer, identity, codec, name)
    return examples


def _decode_layer(
    batch: pa.RecordBatch,
    examples: list[CachedExample],
    bounds: NDArray[np.int64],
    layer: int,
    identity: Identity,
    codec: Codec,
    name: str,
) -> None:
    def column(part: str) -> pa.ListArray:
        return batch.column(f"layer_{layer}_{part}")

    for part in ("counts", "log_rest"):
        if not np.array_equal(column(part).offsets.to_numpy(), bounds):
            raise CacheError(f"{name}, layer {layer}: the {part} are not one for each target position.")
    log_probs = column("log_probs").values.to_numpy().astype(np.float32, copy=False)
    log_rest = column("log_rest").values.to_numpy().astype(np.float32, copy=False)
    counts = column("counts").values.to_numpy().astype(np.int64)
    flat = FlatLayer(counts, column("ids").values.to_numpy(), log_probs, log_rest)
    where = _where(examples, name, layer)
    checked = check_layer(
        flat,
        top_k=identity.top_k[layer],
        vocab_size=identity.vocab_size,
        mass_tolerance=codec.mass_tolerance,
        where=where,
    )
    if not codec.is_lossless:
        log_mass = np.log(checked.mass).astype(np.float32)
        log_probs = np.minimum(log_probs - np.repeat(log_mass, counts), 0)
        log_rest = np.clip(log_rest - log_mass, LOG_FLOOR, 0)
    at = np.concatenate([checked.starts, [len(flat.ids)]])[bounds]
    for part in ("ids", "log_probs"):
        if not np.array_equal(column(part).offsets.to_numpy(), at):
            raise CacheError(f"{name}, layer {layer}: the {part} of an example are not as many as its counts say.")
    narrow = counts.astype(np.int32)
    for array in (narrow, flat.ids, log_probs, log_rest):
        array.flags.writeable = False
    for number, example in enumerate(examples):
        rows = slice(bounds[number], bounds[number + 1])
        cells = slice(at[number], at[number + 1])
        example.targets[layer] = LayerTargets(narrow[rows], flat.ids[cells], log_probs[cells], log_rest[rows])


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


def _where(examples: Sequence[CachedExample], name: str, layer: int) -> Callable[[int], str]:
    def where(row: int) -> str:
        for example in examples:
            if row < len(example.target_positions):
                place = f"example {example.index} ({example.id[:80]!r}), position {example.target_positions[row]}"
                return f"{name}, layer {layer}, {place}"
            row -= len(example.target_positions)
        return f"{name}, layer {layer}"

    return where


def _bounds(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _quantised(values: NDArray[np.float32], codec: Codec) -> NDArray:
    return values if codec.is_lossless else np.maximum(values, np.finfo(codec.dtype).min).astype(codec.dtype)


def _lists(values: NDArray, bounds: NDArray[np.int64], field: pa.Field) -> pa.ListArray:
    """One list for each example."""
    if bounds[-1] >= 2**31:
        raise CacheError(
            f"a shard has {bounds[-1]} values in {field.name}, too many for one file. Lower --examples-per-shard."
        )
    kind = field.type.value_type
    items = pa.array(values.astype(kind.to_pandas_dtype(), copy=False), kind)
    return pa.ListArray.from_arrays(pa.array(bounds.astype(np.int32)), items, type=field.type)


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
        cells = targets * identity.top_k[layer]
        most += targets * (4 + codec.dtype.itemsize) + cells * (4 + codec.dtype.itemsize) + 4 * lists
    # Every buffer may have a bitmap of validity beside it and is padded to 64 bytes.
    return 2 * most + 128 * (8 + 8 * len(identity.layers))

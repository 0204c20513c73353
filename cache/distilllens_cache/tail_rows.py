"""Tail rows: what a shard stores of the tail of each target, beside the kept ids.

They lie in a file of their own, so that training with another tail never reads them. Dimension key: R rows
(the targets of all examples of a shard after one another), r rank, w bytes of a row's codes.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distilllens_cache.arrow_file import from_arrow, to_arrow
from distilllens_cache.errors import CacheError
from distilllens_cache.identity import Identity
from distilllens_cache.lists import bounds_of, lists_of, place_of
from distilllens_cache.meaning import first, first_repeat
from distilllens_cache.tail_spec import SketchSpec
from distilllens_cache.targets import CachedExample, LayerTargets, TailSamples

NO_TAIL = -30.0
"""Log of a rest, in nats, up to which a row may go without draws: it has next to no tail to draw from."""

ROUNDED_NO_TAIL = -29.0
"""The same for a rest that was rounded on its way through a codec: by less than half a nat there."""

# Two 4-bit codes for each byte, low nibble first.
_PAIRS = np.array([[(n ^ 8) - 8 for n in (byte & 15, byte >> 4)] for byte in range(256)], np.int8).view("<u2").ravel()


def encode_tail_rows(
    examples: Sequence[CachedExample], identity: Identity, *, is_lossless: bool, name: str
) -> memoryview:
    """The file of the tail rows of a shard, whose examples and targets were checked before."""
    schema = _schema(identity, is_lossless)
    rows = [len(example.target_positions) for example in examples]
    columns: list[pa.Array] = []
    for layer, spec in identity.tail_specs.items():
        where = place_of(examples, name, layer)
        targets = [example.targets[layer] for example in examples]
        for example, part in zip(examples, targets, strict=True):
            found = f"{name}, layer {layer}, example {example.index} ({example.id[:80]!r})"
            _check_shapes(part, len(example.target_positions), spec.sketch, spec.draws, found)
        if spec.sketch is not None:
            codes = np.concatenate([part.codes for part in targets if part.codes is not None])
            _check_codes(codes, spec.sketch, where)
            columns.append(_code_lists(codes, spec.sketch, rows, schema.field(f"layer_{layer}_codes")))
        if spec.draws is not None:
            parts = [part.samples for part in targets if part.samples is not None]
            samples = _join(parts)
            _check_samples(samples, targets, spec.draws, NO_TAIL, identity.vocab_size, where)
            row_bounds, cell_bounds = bounds_of(rows), bounds_of([len(part.ids) for part in parts])
            for what, bounds in _SAMPLE_COLUMNS:
                field = schema.field(f"layer_{layer}_sample_{what}")
                kind, values = field.type.value_type, getattr(samples, what)
                if what == "log_probs" and not is_lossless:
                    values = np.maximum(values, np.finfo(np.float16).min)
                items = pa.array(values.astype(kind.to_pandas_dtype(), copy=False), kind)
                columns.append(lists_of(items, row_bounds if bounds == "rows" else cell_bounds, field))
    return to_arrow(pa.RecordBatch.from_arrays(columns, schema=schema))


def decode_tail_rows(
    data: bytes, examples: list[CachedExample], identity: Identity, *, is_lossless: bool, name: str
) -> None:
    """Put codes and samples into the targets of ``examples``, a shard that was read and checked before.

    ``data`` must have the digest of its record. Arrays are read-only.
    """
    rows = bounds_of([len(example.target_positions) for example in examples])
    most = _most_bytes(identity, num_examples=len(examples), num_targets=int(rows[-1]), is_lossless=is_lossless)
    schema = _schema(identity, is_lossless)
    batch = from_arrow(data, schema, num_rows=len(examples), name=name, max_bytes=most)
    for layer, spec in identity.tail_specs.items():
        where = place_of(examples, name, layer)
        if spec.sketch is not None:
            column = batch.column(f"layer_{layer}_codes")
            _check_bounds(column, rows, f"{name}, layer {layer}: the codes are not one for each target position.")
            try:
                codes = unpack_codes(_bytes_of(column.values), spec.sketch)
            except ValueError as error:
                raise CacheError(f"{name}, layer {layer}: {error}.") from None
            _check_codes(codes, spec.sketch, where)
            codes.flags.writeable = False
            for number, example in enumerate(examples):
                part = codes[rows[number] : rows[number + 1]]
                example.targets[layer] = dataclasses.replace(example.targets[layer], codes=part)
        if spec.draws is not None:
            samples, cells = _decode_samples(batch, layer, rows, name)
            limit = NO_TAIL if is_lossless else ROUNDED_NO_TAIL
            targets = [example.targets[layer] for example in examples]
            _check_samples(samples, targets, spec.draws, limit, identity.vocab_size, where)
            for number, example in enumerate(examples):
                row, cell = slice(rows[number], rows[number + 1]), slice(cells[number], cells[number + 1])
                part = TailSamples(samples.counts[row], samples.ids[cell], samples.draws[cell], samples.log_probs[cell])
                example.targets[layer] = dataclasses.replace(example.targets[layer], samples=part)


_SAMPLE_COLUMNS = (("counts", "rows"), ("ids", "cells"), ("draws", "cells"), ("log_probs", "cells"))
"""Parts of samples, and whether they are one for each row or one for each id."""


def _schema(identity: Identity, is_lossless: bool) -> pa.Schema:
    def column(name: str, kind: pa.DataType) -> pa.Field:
        return pa.field(name, pa.list_(pa.field("item", kind, nullable=False)), nullable=False)

    columns = []
    for layer, spec in identity.tail_specs.items():
        if spec.sketch is not None:
            columns.append(column(f"layer_{layer}_codes", pa.binary(spec.sketch.code_bytes)))
        if spec.draws is not None:
            columns += [
                column(f"layer_{layer}_sample_counts", pa.uint16()),
                column(f"layer_{layer}_sample_ids", pa.uint32()),
                column(f"layer_{layer}_sample_draws", pa.uint16()),
                column(f"layer_{layer}_sample_log_probs", pa.float32() if is_lossless else pa.float16()),
            ]
    return pa.schema(columns)


def _most_bytes(identity: Identity, *, num_examples: int, num_targets: int, is_lossless: bool) -> int:
    """What the buffers of a file can at most inflate to."""
    rows = sum(num_targets * spec.row_bytes(4 if is_lossless else 2) for spec in identity.tail_specs.values())
    lists = 5 * len(identity.tail_row_layers) * (4 * (num_examples + 1) + 64)
    # Every buffer may have a bitmap of validity beside it and is padded to 64 bytes.
    return 2 * (rows + lists) + 1024


def _check_shapes(targets: LayerTargets, rows: int, sketch: SketchSpec | None, draws: int | None, found: str) -> None:
    codes, samples = targets.codes, targets.samples
    if (codes is not None) != (sketch is not None):
        raise CacheError(f"{found}: codes are {'missing' if codes is None else 'given, but the cache has none here'}.")
    if (samples is not None) != (draws is not None):
        raise CacheError(
            f"{found}: samples are {'missing' if samples is None else 'given, but the cache has none here'}."
        )
    if codes is not None and sketch is not None and (codes.shape != (rows, sketch.rank) or codes.dtype != np.int8):
        raise CacheError(f"{found}: the codes are {codes.dtype} {codes.shape}; expected is int8 {(rows, sketch.rank)}.")
    if samples is not None:
        kinds = (samples.counts.dtype, samples.ids.dtype, samples.draws.dtype, samples.log_probs.dtype)
        if kinds != (np.int32, np.uint32, np.uint16, np.float32):
            raise CacheError(
                f"{found}: samples have counts int32, ids uint32, draws uint16 and log-probabilities float32, "
                f"not {', '.join(map(str, kinds))}."
            )
        if len(samples.counts) != rows:
            raise CacheError(f"{found}: {len(samples.counts)} rows of samples for {rows} target positions.")
        cells = int(samples.counts.sum(dtype=np.int64))
        if not len(samples.ids) == len(samples.draws) == len(samples.log_probs) == cells:
            raise CacheError(
                f"{found}: counts of samples add up to {cells}, but there are {len(samples.ids)} ids, "
                f"{len(samples.draws)} numbers of draws and {len(samples.log_probs)} log-probabilities."
            )


def _check_codes(codes: NDArray[np.int8], spec: SketchSpec, where: Callable[[int], str]) -> None:
    if codes.size and (int(codes.min()) < -spec.limit or int(codes.max()) > spec.limit):
        row, at = divmod(int(((codes < -spec.limit) | (codes > spec.limit)).argmax()), spec.rank)
        raise CacheError(
            f"{where(row)}: a code of {codes[row, at]}; with {spec.bits} bits, "
            f"expected are -{spec.limit} to {spec.limit}."
        )


def _check_samples(
    samples: TailSamples,
    targets: Sequence[LayerTargets],
    draws: int,
    no_tail: float,
    vocab_size: int,
    where: Callable[[int], str],
) -> None:
    """Refuse rows that are no ``draws`` from the tail of their target."""
    counts, ids = samples.counts, samples.ids
    bad = first((counts < 0) | (counts > draws))
    if bad is not None:
        raise CacheError(f"{where(bad)}: {int(counts[bad])} sampled ids from {draws} draws.")
    ends = np.cumsum(counts, dtype=np.int64)

    def refuse(at: int, what: str) -> CacheError:
        return CacheError(f"{where(int(np.searchsorted(ends, at, side='right')))}: {what}.")

    if len(ids) and int(ids.max()) >= vocab_size:
        at = int(ids.argmax())
        raise refuse(at, f"the sampled id {int(ids[at])}, but the vocabulary has {vocab_size} ids")
    bad = first(samples.draws == 0)
    if bad is not None:
        raise refuse(bad, "a sampled id that was never drawn")
    bad = first(~((samples.log_probs <= 0) & (samples.log_probs > -np.inf)))
    if bad is not None:
        raise refuse(bad, f"a sampled log-probability of {samples.log_probs[bad]}; expected are finite numbers up to 0")
    falls = ids[1:] <= ids[:-1]
    inner = ends[:-1][(ends[:-1] > 0) & (ends[:-1] < len(ids))]
    falls[inner - 1] = False
    bad = first(falls)
    if bad is not None:
        raise refuse(bad, "the sampled ids do not ascend")
    draws_before = bounds_of(samples.draws)
    drawn = draws_before[ends] - draws_before[ends - counts]
    log_rest = np.concatenate([part.log_rest for part in targets])
    bad = first((drawn != draws) & ~((drawn == 0) & (log_rest <= no_tail)))
    if bad is not None:
        raise CacheError(
            f"{where(bad)}: {int(drawn[bad])} draws, and a log of the rest of {log_rest[bad]:.4g}; expected are "
            f"{draws}, or none where that is at most {NO_TAIL:g}."
        )
    bad = _first_kept(samples, targets)
    if bad is not None:
        raise CacheError(f"{where(bad)}: a sampled id is one of those that the row keeps.")


def _first_kept(samples: TailSamples, targets: Sequence[LayerTargets]) -> int | None:
    """A row with the same id among its kept and its sampled ids; both are known to be unique alone."""
    kept = np.concatenate([part.counts for part in targets]).astype(np.int64)
    kept_ids = np.concatenate([part.ids for part in targets])
    drawn = samples.counts.astype(np.int64)
    ids = np.empty(len(kept_ids) + len(samples.ids), np.uint32)
    is_kept = np.repeat(np.tile([True, False], len(kept)), np.column_stack([kept, drawn]).ravel())
    ids[is_kept], ids[~is_kept] = kept_ids, samples.ids
    counts = kept + drawn
    return first_repeat(counts, np.cumsum(counts) - counts, ids)


def _decode_samples(
    batch: pa.RecordBatch, layer: int, rows: NDArray[np.int64], name: str
) -> tuple[TailSamples, NDArray[np.int64]]:
    """The samples of all rows, and where those of each example start."""

    def column(what: str) -> pa.ListArray:
        return batch.column(f"layer_{layer}_sample_{what}")

    _check_bounds(
        column("counts"), rows, f"{name}, layer {layer}: the counts of samples are not one for each target position."
    )
    counts = column("counts").values.to_numpy().astype(np.int32)
    cells = bounds_of(counts)[rows]
    for what in ("ids", "draws", "log_probs"):
        _check_bounds(
            column(what),
            cells,
            f"{name}, layer {layer}: the sampled {what} of an example are not as many as its counts say.",
        )
    log_probs = column("log_probs").values.to_numpy().astype(np.float32, copy=False)
    samples = TailSamples(counts, column("ids").values.to_numpy(), column("draws").values.to_numpy(), log_probs)
    for array in (samples.counts, samples.ids, samples.draws, samples.log_probs):
        array.flags.writeable = False
    return samples, cells


def _check_bounds(column: pa.ListArray, bounds: NDArray[np.int64], what: str) -> None:
    if not np.array_equal(column.offsets.to_numpy(), bounds):
        raise CacheError(what)


def _join(parts: Sequence[TailSamples]) -> TailSamples:
    return TailSamples(
        np.concatenate([part.counts for part in parts]),
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.draws for part in parts]),
        np.concatenate([part.log_probs for part in parts]),
    )


def _code_lists(codes: NDArray[np.int8], spec: SketchSpec, rows: Sequence[int], field: pa.Field) -> pa.ListArray:
    packed = pa.py_buffer(pack_codes(codes, spec))
    items = pa.Array.from_buffers(pa.binary(spec.code_bytes), len(codes), [None, packed])
    return lists_of(items, bounds_of(rows), field)


def pack_codes(codes: NDArray[np.int8], spec: SketchSpec) -> NDArray[np.uint8]:
    """(R, w) bytes of codes (R, r). With 4 bits: two to a byte, low nibble first, in two's complement."""
    bytes_ = np.ascontiguousarray(codes).view(np.uint8)
    if spec.bits == 8:
        return bytes_
    nibbles = bytes_ & np.uint8(15)
    if spec.rank % 2:
        nibbles = np.concatenate([nibbles, np.zeros((len(codes), 1), np.uint8)], axis=1)
    pairs = nibbles.view("<u2")
    return (pairs | (pairs >> np.uint16(4))).astype(np.uint8)


def unpack_codes(packed: NDArray[np.uint8], spec: SketchSpec) -> NDArray[np.int8]:
    """(R, r) codes of bytes (R, w), the opposite of `pack_codes`. `ValueError` if an unused nibble is not 0."""
    if spec.bits == 8:
        return packed.view(np.int8)
    if spec.rank % 2 and (packed[:, -1] >> 4).any():
        raise ValueError("the unused half of a last byte is not 0")
    codes = _PAIRS[packed].view(np.int8)
    return codes if codes.shape[1] == spec.rank else np.ascontiguousarray(codes[:, : spec.rank])


def _bytes_of(items: pa.FixedSizeBinaryArray) -> NDArray[np.uint8]:
    """(R, w) as they lie in the file."""
    width = items.type.byte_width
    if not len(items):
        return np.zeros((0, width), np.uint8)
    return np.frombuffer(items.buffers()[1], np.uint8, len(items) * width).reshape(-1, width)

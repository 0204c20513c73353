"""Arrow files as nobody's writer makes them: lying lengths, bad offsets, bombs, other types, impossible values."""

import random
import struct
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from faultlab.seals import Files

NUMBERS = (
    *(0, 1, -1, 2, 7, 8, 64, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, -(2**31)),
    *(2**32 - 1, 2**33, 2**40, 2**62, 2**63 - 1, -(2**63)),
)


def forged_arrow(rng: random.Random, files: Files) -> Files:
    """One Arrow file, most often a shard, with something wrong."""
    names = sorted(name for name in files if name.endswith(".arrow"))
    shards = [name for name in names if name.startswith("shards/") and name.count(".") == 1]
    name = rng.choice(shards if rng.random() < 0.6 else names)
    return {name: rng.choice(WAYS)(rng, files[name])}


def bytes_drawn_anew(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def numbers_overwritten(rng: random.Random, data: bytes) -> bytes:
    """Lengths, offsets and counts that lie: whole words of the flatbuffers, and the sizes before compressed buffers."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        width, code = rng.choice([(8, "<q"), (8, "<q"), (4, "<i"), (2, "<h"), (1, "<b")])
        at = _interesting(rng, data) // width * width
        if at + width <= len(data):
            bits = 8 * width
            number = rng.choice(
                [
                    *NUMBERS,
                    rng.getrandbits(bits),
                    len(data),
                    struct.unpack_from(code, data, at)[0] + rng.choice([-1, 1, 8]),
                ]
            )
            struct.pack_into(code, changed, at, (number + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1))
    return bytes(changed)


def sizes_inflated(rng: random.Random, data: bytes) -> bytes:
    """Compressed buffers that claim to inflate to something else."""
    changed = bytearray(data)
    frames = _frames(data)
    for at in rng.sample(frames, min(len(frames), rng.randint(1, 3))):
        true = struct.unpack_from("<q", data, at - 8)[0]
        claim = rng.choice([*NUMBERS, true + 1, true - 1, true * 2, true + 8, true * 1000, 1 << rng.randrange(63)])
        struct.pack_into("<q", changed, at - 8, claim)
    return bytes(changed)


def cut_or_lengthened(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return rng.choice(
        [
            data[:at],
            data[:at] + data[-10:],
            data + data,
            data[:at] + bytes(rng.randrange(64)) + data[at:],
            b"ARROW1\0\0" + data[at:],
        ]
    )


def pieces_moved(rng: random.Random, data: bytes) -> bytes:
    """A stretch of the file in another place of it."""
    changed = bytearray(data)
    length = rng.choice([4, 8, 16, 64])
    source, target = rng.randrange(len(data)), rng.randrange(len(data))
    changed[target : target + length] = data[source : source + length]
    return bytes(changed[: len(data)])


def values_changed(rng: random.Random, data: bytes) -> bytes:
    """A proper file with NaN, infinities, repeated ids, ids out of range, or other numbers that make no sense."""

    def change(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        if not len(values):
            return values
        at = rng.randrange(len(values))
        if values.dtype.kind == "f":
            values[at] = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-3, 100.0, -60000.0, -1e-8, values[at - 1]])
        else:
            info = np.iinfo(values.dtype)
            values[at] = rng.choice(
                [
                    info.min,
                    info.max,
                    0,
                    1,
                    values[at - 1],
                    min(info.max, int(values[at]) + 1),
                    rng.randint(info.min, info.max),
                ]
            )
        what = rng.randrange(8)
        if what == 0:
            values[:] = values[at]
        elif what == 1:
            values = values[::-1].copy()
        elif what == 2:
            np.random.default_rng(rng.getrandbits(32)).shuffle(values)
        return values

    return _with_a_column(rng, data, change)


def lists_moved(rng: random.Random, data: bytes) -> bytes:
    """A proper file with lists that begin and end elsewhere."""
    batch = _batch(data)
    lists = [n for n, field in enumerate(batch.schema) if pa.types.is_list(field.type)]
    if not lists:
        return values_changed(rng, data)
    place = rng.choice(lists)
    column = batch.column(place)
    offsets = column.offsets.to_numpy().copy()
    at = rng.randrange(len(offsets))
    offsets[at] = max(0, min(len(column.values), int(offsets[at]) + rng.choice([-2, -1, 1, 2, 1000])))
    offsets = np.sort(offsets)
    return _file(
        batch.set_column(
            place,
            batch.schema.field(place),
            pa.ListArray.from_arrays(pa.array(offsets), column.values, type=column.type),
        )
    )


def schema_changed(rng: random.Random, data: bytes) -> bytes:
    """Another type, name, order, number of columns or batches, metadata, an extension type, a dictionary, a stream."""
    batch = _batch(data)
    place = rng.randrange(batch.num_columns)
    name, column = batch.schema.names[place], batch.column(place)
    what = rng.randrange(12)
    if what == 0:
        return _file(batch.drop_columns([name]) if batch.num_columns > 1 else batch.slice(0, 0))
    if what == 1:
        return _file(batch.rename_columns([*batch.schema.names[:place], "x", *batch.schema.names[place + 1 :]]))
    if what == 2:
        return _file(batch.replace_schema_metadata({"ARROW:extension:name": "x", "a": "b"}))
    if what == 3:
        field = batch.schema.field(place).with_metadata(
            {
                "ARROW:extension:name": "arrow.py_extension_type",
                "ARROW:extension:metadata": b"cos\nsystem\n(S'false'\ntR.",
            }
        )
        return _file(pa.RecordBatch.from_arrays(batch.columns, schema=batch.schema.set(place, field)))
    if what == 4:
        return _file(
            batch.set_column(place, name, column.dictionary_encode() if not pa.types.is_nested(column.type) else column)
        )
    if what == 5:
        return _file(batch.set_column(place, batch.schema.field(place).with_nullable(True), column))
    if what == 6:
        return _file(batch.slice(0, rng.randrange(batch.num_rows)))
    if what == 7:
        return _file(batch, batches=rng.choice([0, 2, 3]))
    if what == 8:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return sink.getvalue().to_pybytes()
    if what == 9:
        return _file(pa.RecordBatch.from_arrays(batch.columns[::-1], schema=pa.schema(list(batch.schema)[::-1])))
    if what == 10:
        return _file(batch.set_column(place, name, pa.array([None] * batch.num_rows, column.type)))
    deep = column
    for _ in range(rng.choice([1, 50])):
        deep = pa.ListArray.from_arrays(pa.array(np.arange(batch.num_rows + 1, dtype=np.int32)), deep)
    return _file(batch.set_column(place, name, deep))


def bomb(rng: random.Random, data: bytes) -> bytes:
    """A small file that truly inflates to 64 MB or more."""
    batch = _batch(data)
    lists = [n for n, field in enumerate(batch.schema) if pa.types.is_list(field.type)]
    if not lists or rng.random() < 0.9:  # making one takes a while
        return sizes_inflated(rng, data)
    place = rng.choice(lists)
    column = batch.column(place)
    width = column.type.value_type.bit_width // 8
    number = (64 << 20) // width
    values = pa.Array.from_buffers(column.type.value_type, number, [None, pa.py_buffer(bytes(number * width))])
    offsets = pa.array([0] + [number] * batch.num_rows, pa.int32())
    return _file(
        batch.set_column(place, batch.schema.field(place), pa.ListArray.from_arrays(offsets, values, type=column.type))
    )


WAYS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    *(bytes_drawn_anew, numbers_overwritten, numbers_overwritten, sizes_inflated, cut_or_lengthened, pieces_moved),
    *(values_changed, values_changed, lists_moved, schema_changed, bomb),
)


def _batch(data: bytes) -> pa.RecordBatch:
    return pa.ipc.open_file(pa.BufferReader(data)).get_batch(0)


def _file(batch: pa.RecordBatch, *, batches: int = 1) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
    with pa.ipc.new_file(sink, batch.schema, options=options) as writer:
        for _ in range(batches):
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _with_a_column(rng: random.Random, data: bytes, change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """The file with the numbers of one column changed, if that column has numbers."""
    batch = _batch(data)
    place = rng.randrange(batch.num_columns)
    column, field = batch.column(place), batch.schema.field(place)
    values = column.values if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type) else column
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return bytes_drawn_anew(rng, data)
    new = pa.array(change(values.to_numpy(zero_copy_only=False)), values.type)
    if pa.types.is_list(column.type):
        new = pa.ListArray.from_arrays(column.offsets, new, type=column.type)
    elif pa.types.is_fixed_size_list(column.type):
        new = pa.FixedSizeListArray.from_arrays(new, type=column.type)
    return _file(batch.set_column(place, field, new))


def _frames(data: bytes) -> list[int]:
    """Where zstd frames begin; each has its decoded size before it."""
    found, at = [], data.find(b"\x28\xb5\x2f\xfd")
    while at >= 0:
        found.append(at)
        at = data.find(b"\x28\xb5\x2f\xfd", at + 1)
    return [at for at in found if at >= 8]


def _interesting(rng: random.Random, data: bytes) -> int:
    """A place where lengths stand: in the footer, in the metadata of the batch, before a buffer, or anywhere."""
    footer = struct.unpack_from("<i", data, len(data) - 10)[0]
    frames = _frames(data)
    where = rng.randrange(4)
    if where == 0:
        return len(data) - 10 - rng.randrange(footer)
    if where == 1 and frames:
        return max(0, frames[0] - 8 - rng.randrange(600))
    if where == 2 and frames:
        return rng.choice(frames) - 8
    return rng.randrange(len(data))

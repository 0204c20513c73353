"""Arrow IPC files of one record batch, and what they declare before anything is decompressed."""

import struct
from typing import NamedTuple

import pyarrow as pa
import pyarrow.ipc

from distilllens_cache.errors import CacheError
from distilllens_cache.layout import MAX_DECODED_BYTES

_MAGIC = b"ARROW1"
_RECORD_BATCH = 3
_MAX_BUFFERS = 1 << 17


class DeclaredBuffer(NamedTuple):
    """One buffer as its file declares it, in bytes."""

    stored: int
    decoded: int


def to_arrow(batch: pa.RecordBatch, *, level: int = 3) -> memoryview:
    """``batch`` as an Arrow IPC file, zstd-compressed: the same bytes whenever it is equal."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=level), use_threads=False)
    with pa.ipc.new_file(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    return memoryview(sink.getvalue())


def from_arrow(
    data: bytes, schema: pa.Schema, *, num_rows: int, name: str, max_bytes: int = MAX_DECODED_BYTES
) -> pa.RecordBatch:
    """The only batch of a file, after its declared sizes, exact schema, offsets and nulls were checked.

    ``data`` must already have the digest of its record. ``max_bytes`` caps what the buffers inflate to.
    """
    max_bytes = min(max_bytes, MAX_DECODED_BYTES)
    declared = sum(buffer.decoded for buffer in declared_buffers(data, name=name))
    if declared > max_bytes:
        raise CacheError(f"{name} would inflate to {declared} bytes; {max_bytes} are enough for what it should hold.")
    try:
        reader = pa.ipc.open_file(pa.BufferReader(data), options=pa.ipc.IpcReadOptions(use_threads=False))
        if not reader.schema.equals(schema, check_metadata=True):
            raise CacheError(f"{name} has the columns {_names(reader.schema)}; expected are {_names(schema)}.")
        batch = reader.get_batch(0)
        batch.validate(full=True)
    except CacheError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise CacheError(f"{name} is no proper Arrow file: {str(error)[:200]}.") from None
    if batch.num_rows != num_rows:
        raise CacheError(f"{name} has {batch.num_rows} rows; expected are {num_rows}.")
    for column in batch.columns:
        _check_column(column, name)
    return batch


def declared_buffers(data: bytes | memoryview, *, name: str) -> list[DeclaredBuffer]:
    """Sizes of the buffers of an Arrow IPC file with exactly one record batch and no dictionaries.

    pyarrow allocates whatever a compressed buffer claims to inflate to, and says nothing about it
    beforehand, so the few fields that say it are read here (flatbuffers of the Arrow columnar
    specification, "IPC file format").
    """
    view = memoryview(data).cast("B")
    try:
        return _declared_buffers(view)
    except (struct.error, IndexError, ValueError, OverflowError):
        raise CacheError(f"{name} is no Arrow file with one record batch.") from None


def num_buffers(kind: pa.DataType) -> int:
    """Buffers that a column of this type has in a file: validity, then offsets or values, then its children's."""
    own = 3 if pa.types.is_string(kind) else 2
    return own + sum(num_buffers(kind.field(number).type) for number in range(kind.num_fields))


def _declared_buffers(view: memoryview) -> list[DeclaredBuffer]:
    if bytes(view[:6]) != _MAGIC or bytes(view[-6:]) != _MAGIC:
        raise ValueError("no Arrow file")
    (footer_bytes,) = _unpack("<i", view, len(view) - 10)
    footer_at = len(view) - 10 - footer_bytes
    footer = _root(view, footer_at)
    dictionaries, batches = _vector(view, footer, 2), _vector(view, footer, 3)
    if (dictionaries is not None and dictionaries[1]) or batches is None or batches[1] != 1:
        raise ValueError("not one batch")
    offset, metadata_bytes, _, _ = _unpack("<qiiq", view, batches[0])
    mark, _ = _unpack("<Ii", view, offset)
    if mark != 0xFFFFFFFF:
        raise ValueError("no message")
    message = _root(view, offset + 8)
    kind_at, batch_at = _field(view, message, 1), _field(view, message, 2)
    if kind_at is None or batch_at is None or view[kind_at] != _RECORD_BATCH:
        raise ValueError("no record batch")
    batch = batch_at + _unpack("<I", view, batch_at)[0]
    buffers = _vector(view, batch, 2)
    is_compressed = _field(view, batch, 3) is not None
    body = offset + metadata_bytes
    result = []
    if buffers is None or buffers[1] > _MAX_BUFFERS:
        raise ValueError("no buffers, or absurdly many")
    for number in range(buffers[1]):
        start, length = _unpack("<qq", view, buffers[0] + 16 * number)
        if start < 0 or length < 0 or body + start + length > len(view):
            raise ValueError("a buffer lies outside the file")
        decoded = _unpack("<q", view, body + start)[0] if is_compressed and length else -1
        if decoded < -1:
            raise ValueError("a negative size")
        result.append(DeclaredBuffer(length, length if decoded == -1 else decoded))
    return result


def _unpack(layout: str, view: memoryview, at: int) -> tuple[int, ...]:
    if at < 0:
        raise ValueError("an offset before the file")
    return struct.unpack_from(layout, view, at)


def _root(view: memoryview, at: int) -> int:
    return at + _unpack("<I", view, at)[0]


def _field(view: memoryview, table: int, number: int) -> int | None:
    """Where field ``number`` of a flatbuffer table lies; None if the table leaves it out."""
    vtable = table - _unpack("<i", view, table)[0]
    (vtable_bytes,) = _unpack("<H", view, vtable)
    if 4 + 2 * number >= vtable_bytes:
        return None
    (offset,) = _unpack("<H", view, vtable + 4 + 2 * number)
    return table + offset if offset else None


def _vector(view: memoryview, table: int, number: int) -> tuple[int, int] | None:
    """Start and length of a vector field."""
    at = _field(view, table, number)
    if at is None:
        return None
    at += _unpack("<I", view, at)[0]
    return at + 4, _unpack("<I", view, at)[0]


def _check_column(column: pa.Array, name: str) -> None:
    """Refuse nulls, and lists that skip, share or leave over values."""
    if column.null_count:
        raise CacheError(f"{name} has {column.null_count} empty cells; none are allowed.")
    if isinstance(column, pa.ListArray):
        offsets = column.offsets
        if offsets[0].as_py() != 0 or offsets[-1].as_py() != len(column.values):
            raise CacheError(f"{name} has lists that do not cover their values.")
        _check_column(column.values, name)
    if isinstance(column, pa.FixedSizeListArray):
        if len(column.values) != len(column) * column.type.list_size:
            raise CacheError(f"{name} has lists that do not cover their values.")
        _check_column(column.values, name)


def _names(schema: pa.Schema) -> str:
    text = ", ".join(f"{field.name} {field.type}{'?' if field.nullable else ''}" for field in schema)
    return repr(text if len(text) <= 600 else text[:600] + "…")

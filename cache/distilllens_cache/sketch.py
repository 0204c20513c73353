"""Sketches: the logits of a layer's tail in low rank. One for each layer, shared by all targets.

Dimension key: N rows, D hidden size, r rank, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distilllens_cache.arrow_file import from_arrow, to_arrow
from distilllens_cache.errors import CacheError
from distilllens_cache.manifest import SketchRecord
from distilllens_cache.tail_spec import SketchSpec


@dataclass(frozen=True, eq=False)
class Sketch:
    """Reads codes as logits: ``basis @ codes + offset``, then the model's soft-cap."""

    basis: NDArray[np.float16]
    """(V, r), the step of each direction included."""
    offset: NDArray[np.float32]
    """(V,)."""
    softcap: float | None
    """Logits x stand for ``softcap * tanh(x / softcap)``, where there is one."""

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    def logits(self, codes: NDArray[np.int8]) -> NDArray[np.float32]:
        """(N, V) from codes (N, r). Meant for the tokens outside a row's kept ids."""
        logits = codes.astype(np.float32) @ self.basis.astype(np.float32).T + self.offset
        return logits if self.softcap is None else self.softcap * np.tanh(logits / self.softcap)


@dataclass(frozen=True, eq=False)
class Projection:
    """Turns the teacher's lens hidden states into codes."""

    weights: NDArray[np.float32]
    """(D, r), divided by the step of each direction."""
    mean: NDArray[np.float32]
    """(D,)."""
    bits: Literal[4, 8]

    @property
    def limit(self) -> int:
        """Codes lie in -limit..limit."""
        return SketchSpec(self.weights.shape[1], self.bits).limit

    def encode(self, h: NDArray[np.float32]) -> NDArray[np.int8]:
        """(N, r) codes of hidden states (N, D); what lies beyond the limit saturates. NaN is a `ValueError`."""
        with np.errstate(invalid="ignore"):
            codes = np.rint((h - self.mean) @ self.weights)
        if np.isnan(codes).any():
            raise ValueError("a hidden state with NaN has no codes")
        return np.clip(codes, -self.limit, self.limit).astype(np.int8)


def encode_sketch(sketch: Sketch, *, spec: SketchSpec, vocab_size: int, name: str) -> memoryview:
    """The file of a sketch, after it was checked."""
    _check("basis", sketch.basis, (vocab_size, spec.rank), np.float16, name)
    _check("offset", sketch.offset, (vocab_size,), np.float32, name)
    return _encode(sketch.basis, sketch.offset, _sketch_schema(spec.rank))


def decode_sketch(data: bytes, record: SketchRecord, *, vocab_size: int) -> Sketch:
    """The sketch in a file that has the digest of its record. Arrays are read-only."""
    name, schema = record.sketch.name, _sketch_schema(record.rank)
    basis, offset = _decode(data, schema, (vocab_size, record.rank), name)
    return Sketch(basis, offset, record.softcap)


def encode_projection(projection: Projection, *, spec: SketchSpec, name: str) -> memoryview:
    """The file of a projection, after it was checked."""
    hidden_size = len(projection.mean)
    if projection.bits != spec.bits:
        raise CacheError(f"{name}: the projection has {projection.bits} bits; expected are {spec.bits}.")
    if hidden_size < spec.rank:
        raise CacheError(f"{name}: a rank of {spec.rank} is more than the hidden size of {hidden_size}.")
    _check("weights", projection.weights, (hidden_size, spec.rank), np.float32, name)
    _check("mean", projection.mean, (hidden_size,), np.float32, name)
    return _encode(projection.weights, projection.mean, _projection_schema(spec.rank))


def decode_projection(data: bytes, record: SketchRecord) -> Projection:
    """The projection in a file that has the digest of its record. Arrays are read-only."""
    schema = _projection_schema(record.rank)
    weights, mean = _decode(data, schema, (record.hidden_size, record.rank), record.projection.name)
    return Projection(weights, mean, record.bits)


def _sketch_schema(rank: int) -> pa.Schema:
    return _schema(("basis", pa.float16()), ("offset", pa.float32()), rank)


def _projection_schema(rank: int) -> pa.Schema:
    return _schema(("weights", pa.float32()), ("mean", pa.float32()), rank)


def _schema(wide: tuple[str, pa.DataType], narrow: tuple[str, pa.DataType], rank: int) -> pa.Schema:
    row = pa.list_(pa.field("item", wide[1], nullable=False), rank)
    return pa.schema([pa.field(wide[0], row, nullable=False), pa.field(narrow[0], narrow[1], nullable=False)])


def _check(what: str, array: NDArray, shape: tuple[int, ...], dtype: type[np.floating], name: str) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise CacheError(
            f"{name}: the {what} is {array.dtype} {array.shape}; expected is {np.dtype(dtype).name} {shape}."
        )
    if not np.isfinite(array).all():
        raise CacheError(f"{name}: the {what} has numbers that are not finite.")


def _encode(wide: NDArray, narrow: NDArray, schema: pa.Schema) -> memoryview:
    rows = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(wide).ravel()), type=schema.field(0).type)
    columns = [rows, pa.array(np.ascontiguousarray(narrow))]
    return to_arrow(pa.RecordBatch.from_arrays(columns, schema=schema))


def _decode(data: bytes, schema: pa.Schema, shape: tuple[int, int], name: str) -> tuple[NDArray, NDArray]:
    num_rows, rank = shape
    value_bytes = schema.field(0).type.value_type.bit_width // 8
    # Each buffer may have a bitmap of validity beside it.
    most = num_rows * (rank * value_bytes + 4 + rank // 8 + 2) + 1024
    batch = from_arrow(data, schema, num_rows=num_rows, name=name, max_bytes=most)
    wide, narrow = batch.column(0).values.to_numpy().reshape(shape), batch.column(1).to_numpy()
    for field, array in zip(schema, (wide, narrow), strict=True):
        if not np.isfinite(array).all():
            raise CacheError(f"{name}: the {field.name} has numbers that are not finite.")
    return wide, narrow

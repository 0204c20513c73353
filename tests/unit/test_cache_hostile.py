"""Shards with correct digests but hostile contents: a typed error, bounded memory, never a wrong number."""

import hashlib
import json
import runpy
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest

from distilllens_cache import CacheError, CacheReader, verify_cache
from distilllens_cache.arrow_file import declared_buffers, from_arrow, to_arrow
from distilllens_cache.sealed_json import seal

TinyCache: Any = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_cache_v1.py"))["TinyCache"]
SHARD = "shards/00000.arrow"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return TinyCache().write(tmp_path / "cache")


def put(folder: Path, name: str, data: bytes) -> None:
    """Replace a file, and tell the manifest and the sidecar its new size and digest."""
    (folder / name).write_bytes(data)
    old_record = f'"name":"{name}"'
    for record in ("manifest.json", "shards/00000.json"):
        content = json.loads((folder / record).read_bytes())
        content.pop("sha256")
        assert record != "manifest.json" or old_record in json.dumps(content, separators=(",", ":"))
        _update(content, name, data)
        (folder / record).write_bytes(seal(content))


def _update(value: Any, name: str, data: bytes) -> None:
    if isinstance(value, dict):
        if value.get("name") == name:
            value |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            _update(part, name, data)


def mutated(original: bytes, times: int) -> Iterator[bytes]:
    """``original`` with one to three bytes drawn anew, ``times`` times over."""
    rng = np.random.default_rng(0)
    for _ in range(times):
        data = bytearray(original)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(0, 256)
        yield bytes(data)


def batch_of(folder: Path, name: str = SHARD) -> pa.RecordBatch:
    return pyarrow.ipc.open_file(pa.BufferReader((folder / name).read_bytes())).get_batch(0)


def with_values(batch: pa.RecordBatch, column: str, change: Callable[[np.ndarray], None]) -> pa.RecordBatch:
    """The batch with the values of one list column changed in place."""
    field = batch.schema.field(column)
    old = batch.column(column)
    values = old.values.to_numpy().copy()
    change(values)
    new = pa.ListArray.from_arrays(old.offsets, pa.array(values, field.type.value_type), type=field.type)
    return batch.set_column(batch.schema.get_field_index(column), field, new)


def set_first(value: Any) -> Callable[[np.ndarray], None]:
    return lambda values: values.__setitem__(0, value)


def test_a_shard_put_back_by_the_helper_is_still_accepted(folder: Path) -> None:
    put(folder, SHARD, bytes(to_arrow(batch_of(folder))))
    assert verify_cache(folder).problems == []
    put(folder, SHARD, bytes(to_arrow(with_values(batch_of(folder), "token_ids", lambda values: None))))
    assert verify_cache(folder).problems == []


NONSENSE: list[tuple[str, Callable[[np.ndarray], Any], str]] = [
    ("layer_4_ids", set_first(50), "token id 50, but the vocabulary has 50"),
    ("layer_4_ids", set_first(2**32 - 1), "token id 4294967295"),
    ("layer_4_ids", lambda values: values.fill(7), "occurs twice"),
    ("layer_4_log_probs", set_first(np.nan), "log-probability of nan"),
    ("layer_4_log_probs", set_first(-np.inf), "log-probability of -inf"),
    ("layer_4_log_probs", set_first(1e-3), "log-probability of 0.001"),
    ("layer_4_log_probs", lambda values: values.fill(-0.1), "add up to"),
    ("layer_4_log_probs", lambda values: values.sort(), "not sorted"),
    ("layer_4_log_rest", set_first(np.nan), "log of the rest is nan"),
    ("layer_4_log_rest", set_first(-np.inf), "log of the rest is -inf"),
    ("layer_4_log_rest", set_first(0.1), "log of the rest is 0.1"),
    ("layer_4_log_rest", set_first(-100), "add up to"),
    ("layer_4_counts", set_first(0), "keeps 0 ids"),
    ("layer_4_counts", set_first(7), "keeps 7 ids; expected are 1 to 6"),
    ("layer_4_counts", lambda values: values.fill(6), "counts add up to"),
    ("token_ids", lambda values: values.__setitem__(0, (values[0] + 1) % 50), "not those of the plan"),
    ("token_ids", set_first(50), "token id 50"),
    ("target_positions", lambda values: values.__setitem__(-1, 10**6), "end before the last token"),
    ("target_positions", lambda values: values.fill(1), "must ascend"),
]


@pytest.mark.parametrize(("column", "change", "what"), NONSENSE)
def test_values_that_make_no_sense_are_refused_where_they_are(
    folder: Path, column: str, change: Callable[[np.ndarray], Any], what: str
) -> None:
    put(folder, SHARD, bytes(to_arrow(with_values(batch_of(folder), column, change))))
    with pytest.raises(CacheError, match=what) as caught:
        CacheReader(folder).read_shard(0)
    assert str(caught.value).startswith(SHARD)
    assert SHARD in {problem.file for problem in verify_cache(folder).problems}


def test_rows_moved_between_examples_are_refused(folder: Path) -> None:
    batch = batch_of(folder)
    for column in ("layer_4_counts", "layer_4_ids", "layer_4_log_probs", "layer_4_log_rest"):
        field, old = batch.schema.field(column), batch.column(column)
        offsets = old.offsets.to_numpy().copy()
        offsets[1] += 1
        new = pa.ListArray.from_arrays(pa.array(offsets), old.values, type=field.type)
        place = batch.schema.get_field_index(column)
        put(folder, SHARD, bytes(to_arrow(batch.set_column(place, field, new))))
        with pytest.raises(CacheError, match=r"not one for each target position|not as many as its counts"):
            CacheReader(folder).read_shard(0)


def test_ids_out_of_order_in_the_columns_of_index_and_id_are_refused(folder: Path) -> None:
    batch = batch_of(folder)
    swapped = batch.take(pa.array([1, 0, 2]))
    put(folder, SHARD, bytes(to_arrow(swapped)))
    with pytest.raises(CacheError, match="the plan has example 0"):
        CacheReader(folder).read_shard(0)


def without_a_column(batch: pa.RecordBatch) -> bytes:
    return bytes(to_arrow(batch.drop_columns(["layer_2_ids"])))


def with_another_column(batch: pa.RecordBatch) -> bytes:
    return bytes(to_arrow(batch.append_column("more", pa.array([1, 2, 3]))))


def with_metadata(batch: pa.RecordBatch) -> bytes:
    return bytes(to_arrow(batch.replace_schema_metadata({"a": "b"})))


def with_a_wider_type(batch: pa.RecordBatch) -> bytes:
    return bytes(to_arrow(batch.set_column(0, "index", batch.column(0).cast(pa.float64()))))


def with_nulls(batch: pa.RecordBatch) -> bytes:
    index = pa.array([0, None, 2], pa.int64())
    return bytes(to_arrow(pa.RecordBatch.from_arrays([index, *batch.columns[1:]], schema=batch.schema)))


def with_nulls_in_a_list(batch: pa.RecordBatch) -> bytes:
    field, old = batch.schema.field("layer_4_ids"), batch.column("layer_4_ids")
    values = pa.array([None, *old.values.to_pylist()[1:]], pa.uint32())
    new = pa.ListArray.from_arrays(old.offsets, values, type=field.type)
    return bytes(to_arrow(batch.set_column(batch.schema.get_field_index("layer_4_ids"), field, new)))


def with_values_in_no_list(batch: pa.RecordBatch) -> bytes:
    """By hand, in the bytes of a file without compression: pyarrow would not write such a list."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data = sink.getvalue().to_pybytes()
    offsets = batch.column("layer_4_ids").offsets.to_numpy()
    shorter = offsets.copy()
    shorter[-1] -= 1
    assert data.count(offsets.tobytes()) == 2  # ids and log-probabilities
    return data.replace(offsets.tobytes(), shorter.tobytes())


def with_two_batches(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def with_no_batch(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema):
        pass
    return sink.getvalue().to_pybytes()


def with_a_row_less(batch: pa.RecordBatch) -> bytes:
    return bytes(to_arrow(batch.slice(0, 2)))


def as_a_stream(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def as_parquet(batch: pa.RecordBatch) -> bytes:
    from pyarrow.parquet import write_table

    sink = pa.BufferOutputStream()
    write_table(pa.Table.from_batches([batch]), sink)
    return sink.getvalue().to_pybytes()


def as_nothing(batch: pa.RecordBatch) -> bytes:
    return b""


def as_zeros(batch: pa.RecordBatch) -> bytes:
    return b"ARROW1\0\0" + bytes(4096) + b"ARROW1"


def as_a_pickle(batch: pa.RecordBatch) -> bytes:
    import pickle

    return pickle.dumps(batch)


@pytest.mark.parametrize(
    "make",
    [
        *(without_a_column, with_another_column, with_metadata, with_a_wider_type, with_nulls),
        *(with_two_batches, with_no_batch, with_a_row_less, as_a_stream, as_parquet),
        *(as_nothing, as_zeros, as_a_pickle),
        *(with_nulls_in_a_list, with_values_in_no_list),
    ],
)
def test_a_shard_of_another_shape_is_refused(folder: Path, make: Callable[[pa.RecordBatch], bytes]) -> None:
    put(folder, SHARD, make(batch_of(folder)))
    with pytest.raises(CacheError, match=r"^shards/00000\.arrow"):
        CacheReader(folder).read_shard(0)
    assert SHARD in {problem.file for problem in verify_cache(folder).problems}


def test_a_bomb_is_refused_before_it_inflates(folder: Path) -> None:
    batch = batch_of(folder)
    field = batch.schema.field("token_ids")
    zeros = np.zeros(50_000_000, np.uint32)
    offsets = pa.array([0, 50_000_000, 50_000_000, 50_000_000], pa.int32())
    bomb = pa.ListArray.from_arrays(offsets, pa.array(zeros), type=field.type)
    data = bytes(to_arrow(batch.set_column(batch.schema.get_field_index("token_ids"), field, bomb)))
    assert len(data) < 100_000
    put(folder, SHARD, data)
    del zeros, bomb
    reader = CacheReader(folder)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    with pytest.raises(CacheError, match="would inflate to 20000"):
        reader.read_shard(0)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    assert pa.total_allocated_bytes() <= before + 1_000_000


@pytest.mark.parametrize("size", [-2, -(2**63), 2**62, 2**40])
def test_a_buffer_that_lies_about_its_size_is_refused(folder: Path, size: int) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    body = bytes(to_arrow(batch_of(folder)))
    assert body == bytes(data)
    start = data.find(b"\x28\xb5\x2f\xfd")  # the first zstd frame; its decoded size stands before it
    data[start - 8 : start] = size.to_bytes(8, "little", signed=True)
    put(folder, SHARD, bytes(data))
    with pytest.raises(CacheError, match=r"^shards/00000\.arrow"):
        CacheReader(folder).read_shard(0)


def test_mutated_shards_with_correct_digests_give_typed_errors_or_right_shapes(folder: Path) -> None:
    """A few hundred of the mutations that the fault harness makes by the hundred thousand."""
    original = (folder / SHARD).read_bytes()
    refused = 0
    for data in mutated(original, 400):
        put(folder, SHARD, data)
        try:
            examples = CacheReader(folder).read_shard(0)
        except CacheError:
            refused += 1
        else:
            assert [example.id for example in examples] == ["row-0", "row-1", "row-2"]
    assert refused > 200


def test_declared_sizes_are_those_of_the_buffers(folder: Path) -> None:
    batch = batch_of(folder)
    declared = declared_buffers((folder / SHARD).read_bytes(), name=SHARD)
    assert len(declared) == 2 + 3 + 4 * (len(batch.schema) - 2)
    assert sum(one.stored for one in declared) < len((folder / SHARD).read_bytes())
    table = pa.RecordBatch.from_pydict({"a": pa.array(np.zeros(1000, np.int64))})
    assert [one.decoded for one in declared_buffers(to_arrow(table), name="x")] == [0, 8000]
    plain = pa.BufferOutputStream()
    with pa.ipc.new_file(plain, table.schema) as writer:
        writer.write_batch(table)
    assert [one.decoded for one in declared_buffers(memoryview(plain.getvalue()), name="x")] == [0, 8000]


def test_tail_sums_and_index_of_another_shape_are_refused(folder: Path) -> None:
    sums = batch_of(folder, "tail_sums.arrow")
    put(folder, "tail_sums.arrow", bytes(to_arrow(sums.slice(0, 49))))
    with pytest.raises(CacheError, match=r"tail_sums\.arrow has 49 rows; expected are 50"):
        CacheReader(folder).tail_sums()
    negative = pa.RecordBatch.from_arrays([pa.array([-1] + [0] * 49)] * 2, schema=sums.schema)
    put(folder, "tail_sums.arrow", bytes(to_arrow(negative)))
    with pytest.raises(CacheError, match=r"tail_sums\.arrow, layer 2: 26 targets cannot have"):
        CacheReader(folder).tail_sums()
    index = batch_of(folder, "index.arrow")
    put(folder, "index.arrow", bytes(to_arrow(index.slice(0, 4))))
    with pytest.raises(CacheError, match=r"index\.arrow has 4 rows; expected are 5"):
        CacheReader(folder)


def test_an_index_that_contradicts_itself_or_the_manifest_is_refused(folder: Path) -> None:
    index = batch_of(folder, "index.arrow")
    sound = index.column("num_targets").to_numpy()
    for change, what in (
        (index.column("num_tokens").to_numpy(), "as many targets as tokens"),
        (sound - 1, "gives shard 0"),
    ):
        place = index.schema.get_field_index("num_targets")
        changed = index.set_column(place, index.schema.field(place), pa.array(change, pa.uint32()))
        put(folder, "index.arrow", bytes(to_arrow(changed)))
        with pytest.raises(CacheError, match=what):
            CacheReader(folder)


def test_an_extension_type_is_never_made(folder: Path) -> None:
    metadata = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": b"cos\nsystem\n(S'false'\ntR.",
    }
    field = pa.field("a", pa.int64(), metadata=metadata)
    batch = pa.RecordBatch.from_arrays([pa.array([1])], schema=pa.schema([field]))
    with pytest.raises(CacheError, match="has the columns"):
        from_arrow(bytes(to_arrow(batch)), pa.schema([("a", pa.int64())]), num_rows=1, name="x")

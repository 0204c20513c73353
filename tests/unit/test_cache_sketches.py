"""Sketches: codes of hidden states, files of their own, written before the shards and resumed."""

import dataclasses
import json
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest

from distilllens_cache import CacheError, CacheReader, Projection, Sketch, layout, verify_cache
from distilllens_cache.arrow_file import from_arrow, to_arrow
from distilllens_cache.files import record_of
from distilllens_cache.manifest import Manifest, SketchCommit, from_bytes, sketches_digest, to_bytes
from distilllens_cache.sealed_json import seal

MADE: Any = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_cache_v1.py"))
TinyCache = MADE["TinyCache"]
mutated: Any = runpy.run_path(str(Path(__file__).with_name("test_cache_hostile.py")))["mutated"]
BASIS, PROJECTION, COMMIT = (f"sketches/layer_4{end}" for end in (".arrow", ".projection.arrow", ".json"))


@pytest.fixture
def cache() -> Any:
    return TinyCache(**MADE["SKETCHED"])


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def equal(one: Any, other: Any) -> bool:
    pairs = ((getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one))
    return all(np.array_equal(a, b) and getattr(a, "dtype", 0) == getattr(b, "dtype", 0) for a, b in pairs)


def test_codes_are_rounded_coordinates_that_saturate() -> None:
    weights, mean = np.array([[2.0, 0.0], [0.0, 1.0]], np.float32), np.array([1.0, -1.0], np.float32)
    h = np.array([[1.0, -1.0], [1.3, 0.4], [4.0, -7.6], [1e6, -1e30], [np.inf, 0.0]], np.float32)
    four, eight = (Projection(weights, mean, bits).encode(h[:4]) for bits in (4, 8))
    assert four.dtype == eight.dtype == np.int8
    assert four.tolist() == [[0, 0], [1, 1], [6, -7], [7, -7]]
    assert eight.tolist() == [[0, 0], [1, 1], [6, -7], [127, -127]]
    assert Projection(weights, mean, 4).encode(h[:0]).shape == (0, 2)
    with pytest.raises(ValueError, match="NaN"):
        Projection(weights, mean, 4).encode(h)


def test_codes_are_read_as_logits_with_the_soft_cap_last() -> None:
    basis, offset = np.array([[1, 0], [0, 2], [1, 1]], np.float16), np.array([0.5, 0, 10], np.float32)
    codes = np.array([[3, -2], [0, 0]], np.int8)
    wanted = [[3.5, -4, 11], [0.5, 0, 10]]
    assert Sketch(basis, offset, None).logits(codes).tolist() == wanted
    assert Sketch(basis, offset, 5.0).logits(codes) == pytest.approx(5 * np.tanh(np.array(wanted) / 5))


def test_sketches_come_before_the_shards_and_come_back_as_they_were(tmp_path: Path, cache: Any) -> None:
    writer = cache.writer(tmp_path / "cache")
    assert writer.missing_sketches() == [3, 4]
    assert writer.sketches() == {}
    for call in (writer.unfinished, writer.finish, lambda: cache.write_shards(writer, [0])):
        with pytest.raises(CacheError, match=r"lacks the sketches of the layers \[3, 4\]; write them before any shard"):
            call()
    writer.write_sketch(4, *cache.sketches[4])
    assert writer.missing_sketches() == [3]
    writer.write_sketch(3, *cache.sketches[3])
    assert writer.unfinished() == [0, 1]
    for layer in (4, 2, 7):
        with pytest.raises(CacheError, match=f"layer {layer} is not one whose sketch is still to be written"):
            writer.write_sketch(layer, *cache.sketches[4])
    found = writer.sketches()
    assert list(found) == [3, 4]
    for layer, (sketch, projection) in found.items():
        assert equal(sketch, cache.sketches[layer][0])
        assert equal(projection, cache.sketches[layer][1])
    cache.write_shards(writer, [1, 0])
    writer.finish()
    reader = CacheReader(tmp_path / "cache")
    assert all(equal(sketch, cache.sketches[layer][0]) for layer, sketch in reader.sketches().items())
    assert reader.sketches()[4].rank == 5
    with pytest.raises(ValueError, match="read-only"):
        reader.sketches()[4].basis[0] = 0
    assert verify_cache(tmp_path / "cache").problems == []


def test_a_cache_without_sketches_has_none(tmp_path: Path) -> None:
    folder = TinyCache().write(tmp_path / "cache")
    assert CacheReader(folder).sketches() == {}
    assert not (folder / "sketches").exists()
    assert TinyCache().writer(folder).missing_sketches() == []


def set_first(array: np.ndarray, value: float) -> np.ndarray:
    result = array.copy()
    result.flat[0] = value
    return result


NONSENSE: list[tuple[str, Callable[[Any], Any], str]] = [
    ("sketch", lambda s: dataclasses.replace(s, basis=s.basis[:, :4]), r"basis is float16 \(50, 4\); .* \(50, 5\)"),
    ("sketch", lambda s: dataclasses.replace(s, basis=s.basis[:49]), r"basis is float16 \(49, 5\)"),
    ("sketch", lambda s: dataclasses.replace(s, basis=s.basis.astype(np.float32)), "expected is float16"),
    ("sketch", lambda s: dataclasses.replace(s, basis=set_first(s.basis, np.nan)), "basis has numbers that are not"),
    ("sketch", lambda s: dataclasses.replace(s, basis=set_first(s.basis, np.inf)), "basis has numbers that are not"),
    ("sketch", lambda s: dataclasses.replace(s, offset=set_first(s.offset, -np.inf)), "offset has numbers"),
    ("sketch", lambda s: dataclasses.replace(s, offset=s.offset[:1]), r"offset is float32 \(1,\)"),
    ("sketch", lambda s: dataclasses.replace(s, softcap=0.0), "soft-cap is 0.0"),
    ("sketch", lambda s: dataclasses.replace(s, softcap=float("nan")), "soft-cap is nan"),
    ("projection", lambda p: dataclasses.replace(p, bits=8), "8 bits; expected are 4"),
    ("projection", lambda p: dataclasses.replace(p, mean=p.mean[:4]), "rank of 5 is more than the hidden size of 4"),
    ("projection", lambda p: dataclasses.replace(p, mean=p.mean[:7]), r"weights is float32 \(8, 5\); .* \(7, 5\)"),
    ("projection", lambda p: dataclasses.replace(p, weights=p.weights.astype(np.float64)), "weights is float64"),
    ("projection", lambda p: dataclasses.replace(p, weights=set_first(p.weights, np.nan)), "weights has numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("which", "change", "what"), NONSENSE)
def test_a_sketch_that_makes_no_sense_is_refused_before_anything_is_written(
    tmp_path: Path, cache: Any, which: str, change: Callable[[Any], Any], what: str
) -> None:
    writer = cache.writer(tmp_path / "cache")
    before = files_of(tmp_path)
    parts = dict(zip(("sketch", "projection"), cache.sketches[4], strict=True))
    parts[which] = change(parts[which])
    with pytest.raises(CacheError, match=rf"sketches/layer_4\..*{what}"):
        writer.write_sketch(4, **parts)
    assert files_of(tmp_path) == before
    assert writer.missing_sketches() == [3, 4]


def test_a_stopped_writer_goes_on_after_its_sketches(tmp_path: Path, cache: Any) -> None:
    wanted = files_of(cache.write(tmp_path / "undisturbed"))
    folder = tmp_path / "cache"
    cache.writer(folder).write_sketch(3, *cache.sketches[3])
    (folder / "sketches" / "layer_4.arrow.tmp-7").write_bytes(b"torn")
    writer = cache.writer(folder)
    assert writer.missing_sketches() == [4]
    assert not (folder / "sketches" / "layer_4.arrow.tmp-7").exists()
    writer.write_sketch(4, *cache.sketches[4])
    cache.write_shards(cache.writer(folder), [1])
    cache.write(folder)
    assert files_of(folder) == wanted


@pytest.mark.parametrize("name", [BASIS, PROJECTION, COMMIT])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_sketch_is_written_again_and_the_shards_are_kept(
    tmp_path: Path, cache: Any, name: str, damage: str
) -> None:
    folder = cache.write(tmp_path / "cache")
    wanted = files_of(folder)
    content = bytearray(wanted[name])
    content[30] ^= 4
    if damage == "gone":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if damage == "flip" else content[:-1])
    assert name in {problem.file for problem in verify_cache(folder).problems}
    if name == BASIS:
        with pytest.raises(CacheError, match=name):
            CacheReader(folder).sketches()
    writer = cache.writer(folder)
    if name == COMMIT:  # the manifest says all that it said
        assert writer.finished
    else:
        assert not writer.finished
        assert writer.missing_sketches() == [4]
        with pytest.raises(CacheError, match="unfinished"):
            CacheReader(folder)
        writer.write_sketch(4, *cache.sketches[4])
        assert writer.unfinished() == []
        writer.finish()
    assert files_of(folder) == wanted


def test_shards_whose_codes_belong_to_another_sketch_are_written_again(tmp_path: Path, cache: Any) -> None:
    folder = cache.write(tmp_path / "cache")
    wanted = files_of(folder)
    (folder / "manifest.json").unlink()
    (folder / COMMIT).unlink()
    sketch, projection = cache.sketches[4]
    writer = cache.writer(folder)
    writer.write_sketch(4, dataclasses.replace(sketch, softcap=31.0), projection)
    assert writer.unfinished() == [0, 1]
    cache.write_shards(writer, [0])
    (folder / COMMIT).unlink()
    writer = cache.writer(folder)
    writer.write_sketch(4, sketch, projection)
    assert writer.unfinished() == [0]
    cache.write(folder)
    assert files_of(folder) == wanted


def test_a_sketch_of_another_plan_is_not_taken(tmp_path: Path, cache: Any) -> None:
    other = TinyCache(**(MADE["SKETCHED"] | {"seed": 5})).write(tmp_path / "other")
    folder = tmp_path / "cache"
    cache.writer(folder).write_sketch(4, *cache.sketches[4])
    for path in (other / "sketches").iterdir():
        (folder / "sketches" / path.name).write_bytes(path.read_bytes())
    assert cache.writer(folder).missing_sketches() == [3, 4]
    assert {p.file for p in verify_cache(folder).problems} >= {COMMIT, "sketches/layer_3.json"}


def test_overwrite_deletes_sketches_and_scratch_but_nothing_else(tmp_path: Path, cache: Any) -> None:
    folder = cache.write(tmp_path / "cache")
    (folder / "calibration.bin").write_bytes(b"old")
    (folder / "sketches" / "notes.txt").write_text("my work")
    writer = cache.writer(folder, overwrite=True)
    assert writer.missing_sketches() == [3, 4]
    assert [p.name for p in (folder / "sketches").iterdir()] == ["notes.txt"]
    assert not (folder / "calibration.bin").exists()
    TinyCache().write(folder, overwrite=True)
    assert verify_cache(folder).problems == []


def test_a_linked_folder_of_sketches_is_refused(tmp_path: Path, cache: Any) -> None:
    folder = cache.write(tmp_path / "cache")
    (folder / "sketches").rename(tmp_path / "elsewhere")
    (folder / "sketches").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="no ordinary folder"):
        cache.writer(folder)
    with pytest.raises(CacheError, match="no ordinary folder"):
        CacheReader(folder).sketches()


def test_the_state_of_a_calibration_is_kept_until_the_last_sketch_is_written(tmp_path: Path, cache: Any) -> None:
    folder = tmp_path / "cache"
    writer = cache.writer(folder)
    assert writer.read_calibration() is None
    for content in (b"first", b"", os.urandom(100_000)):
        writer.write_calibration(content)
        assert cache.writer(folder).read_calibration() == content
    writer.write_sketch(3, *cache.sketches[3])
    assert writer.read_calibration() is not None
    writer.write_sketch(4, *cache.sketches[4])
    assert not (folder / "calibration.bin").exists()
    assert writer.read_calibration() is None
    with pytest.raises(CacheError, match="nothing left to calibrate"):
        writer.write_calibration(b"more")
    (folder / "calibration.bin").write_bytes(b"left by a writer that was killed just then")
    cache.writer(folder)
    assert not (folder / "calibration.bin").exists()


def test_a_damaged_or_foreign_state_of_a_calibration_is_not_believed(
    tmp_path: Path, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = cache.writer(tmp_path / "cache")
    writer.write_calibration(b"the state of it")
    path = tmp_path / "cache" / "calibration.bin"
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at])
        assert writer.read_calibration() is None
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert writer.read_calibration() is None
    path.write_bytes(data + b"x")
    assert writer.read_calibration() is None
    other = TinyCache(**(MADE["SKETCHED"] | {"seed": 5})).writer(tmp_path / "other")
    (tmp_path / "other" / "calibration.bin").write_bytes(data)
    assert other.read_calibration() is None
    path.unlink()
    path.symlink_to(tmp_path / "other" / "calibration.bin")
    assert writer.read_calibration() is None
    monkeypatch.setattr(layout, "MAX_CALIBRATION_BYTES", 10)
    with pytest.raises(CacheError, match="has 11 bytes; at most 10"):
        writer.write_calibration(b"x" * 11)


def put(folder: Path, name: str, data: bytes, *, layer: int = 4) -> None:
    """Replace a file of a sketch, and tell every record of it its new size and digest."""
    (folder / name).write_bytes(data)
    manifest = from_bytes(Manifest, (folder / "manifest.json").read_bytes(), name="manifest.json")
    part = "projection" if name == PROJECTION else "sketch"
    record = manifest.sketches[layer].model_copy(update={part: record_of(name, data)})
    manifest = manifest.model_copy(update={"sketches": manifest.sketches | {layer: record}})
    (folder / "manifest.json").write_bytes(to_bytes(manifest))
    commit = SketchCommit(plan_sha256=manifest.plan_sha256, layer=layer, sketch=record)
    (folder / COMMIT).write_bytes(to_bytes(commit))
    for path in (folder / "shards").glob("*.json"):
        sidecar = json.loads(path.read_bytes())
        sidecar.pop("sha256")
        sidecar["sketches_sha256"] = sketches_digest(manifest.sketches, plan_sha256=manifest.plan_sha256)
        path.write_bytes(seal(sidecar))


def batch_of(folder: Path, name: str) -> pa.RecordBatch:
    return pyarrow.ipc.open_file(pa.BufferReader((folder / name).read_bytes())).get_batch(0)


def with_values(batch: pa.RecordBatch, column: int, value: float) -> pa.RecordBatch:
    """The first number of a column changed."""
    field, old = batch.schema.field(column), batch.column(column)
    is_wide = isinstance(old, pa.FixedSizeListArray)
    values = set_first((old.values if is_wide else old).to_numpy(), value)
    new = pa.FixedSizeListArray.from_arrays(pa.array(values), type=field.type) if is_wide else pa.array(values)
    return batch.set_column(column, field, new)


def with_rank(batch: pa.RecordBatch, rank: int) -> pa.RecordBatch:
    kind = batch.schema.field(0).type.value_type
    field = pa.field("basis", pa.list_(pa.field("item", kind, nullable=False), rank), nullable=False)
    values = pa.array(np.zeros(rank * len(batch), np.float16))
    return batch.set_column(0, field, pa.FixedSizeListArray.from_arrays(values, type=field.type))


def with_nulls(batch: pa.RecordBatch) -> pa.RecordBatch:
    field, old = batch.schema.field(0), batch.column(0)
    values = pa.array([None, *old.values.to_pylist()[1:]], old.values.type)
    return batch.set_column(0, field, pa.FixedSizeListArray.from_arrays(values, type=field.type))


def test_a_sketch_put_back_by_the_helper_is_still_accepted(tmp_path: Path, cache: Any) -> None:
    folder = cache.write(tmp_path / "cache")
    for name in (BASIS, PROJECTION):
        put(folder, name, bytes(to_arrow(with_values(batch_of(folder, name), 0, 0.5))))
    assert verify_cache(folder).problems == []
    assert CacheReader(folder).sketches()[4].basis[0, 0] == 0.5
    assert cache.writer(folder).finished


HOSTILE: list[tuple[str, Callable[[pa.RecordBatch], pa.RecordBatch], str]] = [
    (BASIS, lambda b: with_values(b, 0, np.nan), "the basis has numbers that are not finite"),
    (BASIS, lambda b: with_values(b, 0, -np.inf), "the basis has numbers that are not finite"),
    (BASIS, lambda b: with_values(b, 1, np.nan), "the offset has numbers that are not finite"),
    (BASIS, lambda b: with_rank(b, 4), "has the columns"),
    (BASIS, lambda b: with_rank(b, 6), "has the columns"),
    (BASIS, lambda b: with_rank(b, 20_000), "would inflate to 200"),
    (BASIS, lambda b: b.slice(0, 49), "has 49 rows; expected are 50"),
    (BASIS, lambda b: b.drop_columns(["offset"]), "has the columns"),
    (BASIS, lambda b: b.replace_schema_metadata({"a": "b"}), "has the columns"),
    (BASIS, with_nulls, "empty cells|no proper Arrow"),
    (PROJECTION, lambda b: with_values(b, 0, np.nan), "the weights has numbers that are not finite"),
    (PROJECTION, lambda b: with_values(b, 1, np.inf), "the mean has numbers that are not finite"),
    (PROJECTION, lambda b: b.slice(0, 7), "has 7 rows; expected are 8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "what"), HOSTILE)
def test_a_hostile_sketch_with_a_correct_digest_is_refused_and_named(
    tmp_path: Path, cache: Any, name: str, change: Callable[[pa.RecordBatch], pa.RecordBatch], what: str
) -> None:
    folder = cache.write(tmp_path / "cache")
    put(folder, name, bytes(to_arrow(change(batch_of(folder, name)))))
    assert {problem.file for problem in verify_cache(folder).problems} == {name}
    with pytest.raises(CacheError, match=what) as caught:
        CacheReader(folder).sketches() if name == BASIS else cache.writer(folder).sketches()
    assert str(caught.value).startswith(name)


def test_a_basis_that_has_more_numbers_than_rows_is_refused() -> None:
    """By hand: pyarrow writes no such file, but finds one valid."""
    kind = pa.list_(pa.field("item", pa.float16(), nullable=False), 5)
    schema = pa.schema([pa.field("basis", kind, nullable=False)])
    rows = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(30, np.float16)), type=kind)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([rows], schema=schema))
    data = sink.getvalue().to_pybytes()
    assert from_arrow(data, schema, num_rows=6, name="x").num_rows == 6
    six, five, none = ((n).to_bytes(8, "little") for n in (6, 5, 0))
    assert (data.count(six), data.count(six + none + (30).to_bytes(8, "little"))) == (2, 1)
    fewer = data.replace(six, five)
    with pytest.raises(CacheError, match="do not cover their values"):
        from_arrow(fewer, schema, num_rows=5, name="x")


def test_mutated_sketches_with_correct_digests_give_typed_errors_or_right_shapes(tmp_path: Path, cache: Any) -> None:
    folder = cache.write(tmp_path / "cache")
    original = (folder / BASIS).read_bytes()
    refused = 0
    for data in mutated(original, 300):
        put(folder, BASIS, data)
        try:
            sketch = CacheReader(folder).sketches()[4]
        except CacheError:
            refused += 1
        else:
            assert sketch.basis.shape == (50, 5)
            assert np.isfinite(sketch.basis).all()
    assert refused > 100


def resealed(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_bytes())
    content.pop("sha256")
    change(content)
    path.write_bytes(seal(content))


PLANTED: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    (COMMIT, lambda c: c.update(layer=3), "another plan or layer"),
    (COMMIT, lambda c: c.update(plan_sha256="0" * 64), "another plan or layer"),
    (COMMIT, lambda c: c["sketch"].update(softcap=31.0), "contradict each other"),
    (COMMIT, lambda c: c["sketch"]["sketch"].update(sha256="0" * 64), "contradict each other"),
    (COMMIT, lambda c: c.update(more=1), "not what version 1"),
    ("shards/00001.json", lambda c: c.update(sketches_sha256="0" * 64), "other sketches"),
    ("shards/00001.json", lambda c: c.pop("sketches_sha256"), "other sketches"),
    ("shards/00001.json", lambda c: c["shard"].pop("tail_rows"), "contradict each other"),
]


@pytest.mark.parametrize(("name", "change", "what"), PLANTED)
def test_records_that_contradict_each_other_are_named(
    tmp_path: Path, cache: Any, name: str, change: Callable[[dict[str, Any]], Any], what: str
) -> None:
    folder = cache.write(tmp_path / "cache")
    resealed(folder / name, change)
    problems = verify_cache(folder).problems
    assert {problem.file for problem in problems} == {name}
    assert what in problems[0].what
    writer = cache.writer(folder)
    if name == COMMIT:  # the manifest is believed
        assert writer.finished
        assert verify_cache(folder).is_sound
    else:
        assert not writer.finished
        assert writer.missing_sketches() == [4] or writer.unfinished()


@pytest.mark.parametrize("name", [BASIS, PROJECTION, COMMIT, "shards/00000.tail_rows.arrow"])
def test_an_unfinished_cache_is_checked_too(tmp_path: Path, cache: Any, name: str) -> None:
    folder = tmp_path / "cache"
    writer = cache.writer(folder)
    cache.write_sketches(writer)
    cache.write_shards(writer, [0])
    assert {problem.file for problem in verify_cache(folder).problems} == {"manifest.json"}
    data = (folder / name).read_bytes()
    for content in (data[:-1], data[:40] + bytes([data[40] ^ 1]) + data[41:]):
        (folder / name).write_bytes(content)
        assert name in {problem.file for problem in verify_cache(folder).problems}
    (folder / name).write_bytes(data)
    resealed(folder / "shards/00000.json", lambda c: c.update(sketches_sha256="0" * 64))
    assert {problem.file for problem in verify_cache(folder).problems} == {"manifest.json", "shards/00000.json"}


def test_a_reader_of_targets_needs_no_sketch(tmp_path: Path, cache: Any) -> None:
    folder = cache.write(tmp_path / "cache")
    for path in (folder / "sketches").iterdir():
        path.unlink()
    assert len(list(CacheReader(folder))) == 5

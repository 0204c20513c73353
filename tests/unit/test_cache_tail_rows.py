"""Tail rows: codes and samples of each target, in a file of their own beside the shard."""

import dataclasses
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest

from distilllens_cache import CODECS, CacheError, CacheReader, Identity, LayerTargets, TailSamples, verify_cache
from distilllens_cache.arrow_file import to_arrow
from distilllens_cache.tail_rows import pack_codes, unpack_codes
from distilllens_cache.tail_spec import SketchSpec

MADE: Any = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_cache_v1.py"))
TinyCache = MADE["TinyCache"]
SHARDS: Any = runpy.run_path(str(Path(__file__).with_name("test_cache_hostile.py")))
mutated = SHARDS["mutated"]
ROWS = "shards/00000.tail_rows.arrow"


@pytest.fixture
def cache() -> Any:
    return TinyCache(**MADE["SKETCHED"])


@pytest.fixture
def folder(tmp_path: Path, cache: Any) -> Path:
    return cache.write(tmp_path / "cache")


def test_two_codes_share_a_byte_low_nibble_first() -> None:
    codes = np.array([[1, -1, 7], [-7, 0, -2]], np.int8)
    packed = pack_codes(codes, SketchSpec(3, 4))
    assert packed.tolist() == [[0xF1, 0x07], [0x09, 0x0E]]
    assert unpack_codes(packed, SketchSpec(3, 4)).tolist() == codes.tolist()
    assert pack_codes(codes, SketchSpec(3, 8)).tolist() == [[1, 255, 7], [249, 0, 254]]
    assert pack_codes(np.asfortranarray(codes), SketchSpec(3, 4)).tolist() == packed.tolist()
    with pytest.raises(ValueError, match="unused half"):
        unpack_codes(packed | np.uint8(0x80), SketchSpec(3, 4))


def test_codes_and_samples_come_back_bit_for_bit_and_read_only(folder: Path, cache: Any) -> None:
    for found, wanted in zip(CacheReader(folder), cache.examples, strict=True):
        assert found.targets[2].codes is None
        assert found.targets[3].samples is None
        for layer, old in wanted.targets.items():
            new = found.targets[layer]
            assert np.array_equal(new.ids, old.ids)
            assert (new.codes is None) == (old.codes is None)
            assert (new.samples is None) == (old.samples is None)
            arrays = [(new.codes, old.codes)] if old.codes is not None else []
            if old.samples is not None:
                parts = ("counts", "ids", "draws", "log_probs")
                arrays += [(getattr(new.samples, part), getattr(old.samples, part)) for part in parts]
                assert new.samples.offsets[-1] == len(old.samples.ids)
            for one, other in arrays:
                assert one.dtype == other.dtype
                assert one.tobytes() == other.tobytes()
                with pytest.raises(ValueError, match="read-only"):
                    one[0] = 0


@pytest.mark.parametrize("codec", [name for name, codec in CODECS.items() if not codec.is_lossless])
def test_a_lossy_codec_rounds_sampled_log_probabilities_only(tmp_path: Path, codec: str) -> None:
    cache = TinyCache(**(MADE["SKETCHED"] | {"codec": codec, "scale": 30.0}))
    folder = cache.write(tmp_path / "cache")
    assert verify_cache(folder).problems == []
    for found, wanted in zip(CacheReader(folder), cache.examples, strict=True):
        new, old = found.targets[4], wanted.targets[4]
        assert np.array_equal(new.codes, old.codes)
        assert np.array_equal(new.samples.ids, old.samples.ids)
        assert np.array_equal(new.samples.draws, old.samples.draws)
        assert np.abs(new.samples.log_probs - old.samples.log_probs).max() <= 0.07
        assert new.samples.log_probs.tolist() == old.samples.log_probs.astype(np.float16).tolist()


def test_a_log_probability_below_the_range_of_fp16_is_cut(tmp_path: Path) -> None:
    cache = TinyCache(**(MADE["SKETCHED"] | {"codec": "arrow-fp16"}))
    targets = cache.examples[0].targets[4]
    targets.samples.log_probs[0] = -1e5
    folder = cache.write(tmp_path / "cache")
    assert CacheReader(folder)[0].targets[4].samples.log_probs[0] == -65504


def test_a_reader_that_wants_no_tail_rows_does_not_open_them(folder: Path) -> None:
    for path in (folder / "shards").glob("*.tail_rows.arrow"):
        path.unlink()
    reader = CacheReader(folder, tail_rows=False)
    assert all(t.codes is None and t.samples is None for example in reader for t in example.targets.values())
    with pytest.raises(CacheError, match=r"shards/00000\.tail_rows\.arrow is missing"):
        CacheReader(folder)[0]
    later = CacheReader(folder)
    later.tail_rows = False
    assert later[0].targets[4].codes is None


def test_a_cache_that_stores_nothing_per_target_has_no_such_files(tmp_path: Path) -> None:
    folder = TinyCache(store_tail={2: "none", 4: "profile"}).write(tmp_path / "cache")
    assert not list(folder.rglob("*.tail_rows.arrow"))
    assert sorted(CacheReader(folder).tail_sums()) == [4]
    assert verify_cache(folder).problems == []
    folder = TinyCache(store_tail="sampled:3").write(tmp_path / "sampled")
    assert not list(folder.rglob("*tails.arrow"))
    assert CacheReader(folder).tail_sums() == {}
    assert verify_cache(folder).problems == []


def test_examples_without_targets_have_empty_tail_rows(tmp_path: Path, cache: Any) -> None:
    from distilllens_cache import PlannedExample, example_digest

    example = cache.examples[0]
    none = np.zeros(0, np.uint32)
    empty = {
        layer: LayerTargets(
            t.counts[:0],
            t.ids[:0],
            t.log_probs[:0],
            t.log_rest[:0],
            None if t.codes is None else t.codes[:0],
            None if t.samples is None else TailSamples(t.counts[:0], none, none.astype(np.uint16), t.log_probs[:0]),
        )
        for layer, t in example.targets.items()
    }
    bare = dataclasses.replace(example, target_positions=none, targets=empty)
    planned = [PlannedExample(bare.id, example_digest(bare.token_ids, none), len(bare.token_ids), 0)]
    writer = cache.writer(tmp_path / "cache", examples=planned, shards=[range(1)])
    cache.write_sketches(writer)
    writer.write_shard(0, [bare], {layer: np.zeros(50, np.int64) for layer in (2, 4)})
    writer.finish()
    assert verify_cache(tmp_path / "cache").problems == []
    found = CacheReader(tmp_path / "cache")[0].targets[4]
    assert found.codes is not None
    assert found.codes.shape == (0, 5)
    assert found.samples is not None
    assert len(found.samples.counts) == 0


def set_at(array: np.ndarray, at: Any, value: Any) -> np.ndarray:
    result = array.copy()
    result[at] = value
    return result


def samples(targets: Any, **arrays: Any) -> Any:
    return dataclasses.replace(targets, samples=dataclasses.replace(targets.samples, **arrays))


def codes(targets: Any, value: Any) -> Any:
    return dataclasses.replace(targets, codes=value)


def sampled(targets: Any, at: int, **values: Any) -> Any:
    return samples(
        targets, **{name: set_at(getattr(targets.samples, name), at, value) for name, value in values.items()}
    )


def without_a_row(targets: Any, row: int) -> Any:
    s = targets.samples
    cells = np.r_[0 : s.offsets[row], s.offsets[row + 1] : len(s.ids)]
    return samples(
        targets, counts=set_at(s.counts, row, 0), ids=s.ids[cells], draws=s.draws[cells], log_probs=s.log_probs[cells]
    )


def swapped(targets: Any) -> Any:
    """The first two ids of a row the other way round."""
    s = targets.samples
    at = int(s.offsets[np.flatnonzero(s.counts >= 2)[0]])
    return samples(targets, ids=set_at(s.ids, [at, at + 1], s.ids[[at + 1, at]]))


def repeated(targets: Any) -> Any:
    s = targets.samples
    at = int(s.offsets[np.flatnonzero(s.counts >= 2)[0]])
    return samples(targets, ids=set_at(s.ids, at + 1, s.ids[at]))


def negative(targets: Any) -> Any:
    """Counts that add up, one of them below 0."""
    counts = targets.samples.counts.copy()
    counts[1] += counts[0] + 1
    counts[0] = -1
    return samples(targets, counts=counts)


def kept(targets: Any) -> Any:
    """A row that draws only an id that it keeps."""
    s = targets.samples
    cells = np.r_[0, s.offsets[1] : len(s.ids)]
    new = TailSamples(set_at(s.counts, 0, 1), s.ids[cells], s.draws[cells], s.log_probs[cells])
    new.ids[0], new.draws[0] = targets.ids[0], 8
    return dataclasses.replace(targets, samples=new)


NONSENSE: list[tuple[Callable[[Any], Any], str]] = [
    (lambda t: codes(t, None), "codes are missing"),
    (lambda t: codes(t, t.codes[:, :4]), r"codes are int8 .* \(\d+, 5\)"),
    (lambda t: codes(t, t.codes[:-1]), r"codes are int8 "),
    (lambda t: codes(t, t.codes.astype(np.int16)), "codes are int16"),
    (lambda t: codes(t, set_at(t.codes, (1, 2), 8)), "position .*: a code of 8; with 4 bits, expected are -7 to 7"),
    (lambda t: codes(t, set_at(t.codes, (1, 2), -8)), "a code of -8"),
    (lambda t: dataclasses.replace(t, samples=None), "samples are missing"),
    (lambda t: samples(t, counts=t.samples.counts.astype(np.int64)), "not int64, uint32, uint16, float32"),
    (lambda t: samples(t, draws=t.samples.draws.astype(np.int32)), "not int32, uint32, int32, float32"),
    (lambda t: samples(t, counts=t.samples.counts[:-1]), "rows of samples for"),
    (lambda t: samples(t, ids=t.samples.ids[:-1]), "counts of samples add up to"),
    (lambda t: samples(t, draws=t.samples.draws[:-1]), "counts of samples add up to"),
    (negative, "-1 sampled ids from 8 draws"),
    (lambda t: sampled(t, 0, ids=50), "the sampled id 50, but the vocabulary has 50 ids"),
    (lambda t: sampled(t, -1, draws=0), "never drawn"),
    (lambda t: sampled(t, 0, log_probs=np.nan), "sampled log-probability of nan"),
    (lambda t: sampled(t, 0, log_probs=-np.inf), "sampled log-probability of -inf"),
    (lambda t: sampled(t, 0, log_probs=0.1), "sampled log-probability of 0.1"),
    (swapped, "do not ascend"),
    (repeated, "do not ascend"),
    (lambda t: sampled(t, 0, draws=t.samples.draws[0] + 1), "9 draws, and a log of the rest of .* expected are 8"),
    (lambda t: without_a_row(t, 1), "0 draws, and a log of the rest of"),
    (kept, "one of those that the row keeps"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "what"), NONSENSE)
def test_tail_rows_that_make_no_sense_are_refused_before_anything_is_written(
    tmp_path: Path, cache: Any, change: Callable[[Any], Any], what: str
) -> None:
    writer = cache.writer(tmp_path / "cache")
    cache.write_sketches(writer)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    example = cache.examples[1]
    bad = dataclasses.replace(example, targets=example.targets | {4: change(example.targets[4])})
    with pytest.raises(CacheError, match=rf"layer 4, example 1 .*{what}") as caught:
        writer.write_shard(0, [cache.examples[0], bad, cache.examples[2]], cache.tails[0])
    assert str(caught.value).startswith(ROWS)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_tail_rows_of_a_layer_that_stores_none_are_refused(tmp_path: Path, cache: Any) -> None:
    writer = cache.writer(tmp_path / "cache")
    cache.write_sketches(writer)
    example = cache.examples[1]
    for layer, part in ((2, "codes"), (3, "samples")):
        changed = dataclasses.replace(example.targets[layer], **{part: getattr(example.targets[4], part)})
        bad = dataclasses.replace(example, targets=example.targets | {layer: changed})
        with pytest.raises(CacheError, match=f"layer {layer}, example 1 .*: {part} are given, but the cache has none"):
            writer.write_shard(0, [cache.examples[0], bad, cache.examples[2]], cache.tails[0])


def test_a_row_with_next_to_no_tail_needs_no_draws(tmp_path: Path) -> None:
    cache = TinyCache(top_k={4: 50}, store_tail="sampled:4", scale=1000.0)
    bare = sum(int((t.samples.counts == 0).sum()) for e in cache.examples for t in e.targets.values())
    assert bare > 3
    for codec in CODECS:
        identity = Identity(**(cache.identity.model_dump() | {"codec": codec}))
        folder = cache.write(tmp_path / codec, identity=identity)
        assert verify_cache(folder).problems == []


@pytest.mark.parametrize("codec", CODECS)
def test_a_rest_just_at_the_limit_of_no_draws_is_read_as_it_was_written(tmp_path: Path, codec: str) -> None:
    cache = TinyCache(top_k={4: 50}, store_tail="sampled:4", scale=1000.0, codec=codec)
    for example in cache.examples:
        targets = example.targets[4]
        targets.log_rest[targets.samples.counts == 0] = -30
    assert verify_cache(cache.write(tmp_path / "cache")).problems == []


def put(folder: Path, data: bytes) -> None:
    """Replace the tail rows of the first shard, and tell manifest and sidecar their new size and digest."""
    SHARDS["put"](folder, ROWS, data)


def batch_of(folder: Path) -> pa.RecordBatch:
    return pyarrow.ipc.open_file(pa.BufferReader((folder / ROWS).read_bytes())).get_batch(0)


def replaced(batch: pa.RecordBatch, column: str, values: pa.Array, offsets: Any = None) -> pa.RecordBatch:
    field = batch.schema.field(column)
    offsets = batch.column(column).offsets if offsets is None else pa.array(offsets, pa.int32())
    new = pa.ListArray.from_arrays(offsets, values, type=pa.list_(pa.field("item", values.type, nullable=False)))
    return batch.set_column(batch.schema.get_field_index(column), field.with_type(new.type), new)


def with_values(column: str, change: Callable[[np.ndarray], Any]) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    def changed(batch: pa.RecordBatch) -> pa.RecordBatch:
        old = batch.column(column).values
        if pa.types.is_fixed_size_binary(old.type):
            values = np.array([list(code) for code in old.to_pylist()], np.uint8)
            change(values)
            return replaced(batch, column, pa.array([bytes(row) for row in values.tolist()], old.type))
        values = old.to_numpy().copy()
        change(values)
        return replaced(batch, column, pa.array(values, old.type))

    return changed


def set_first(value: Any) -> Callable[[np.ndarray], None]:
    return lambda values: values.__setitem__((0,) * values.ndim, value)


def moved(column: str) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    """A value of the second example given to the first."""

    def changed(batch: pa.RecordBatch) -> pa.RecordBatch:
        offsets = batch.column(column).offsets.to_numpy().copy()
        offsets[1] += 1
        return replaced(batch, column, batch.column(column).values, offsets)

    return changed


def with_wide_codes(batch: pa.RecordBatch) -> pa.RecordBatch:
    column = batch.column("layer_4_codes")
    values = pa.array([code + b"\0" for code in column.values.to_pylist()], pa.binary(4))
    return replaced(batch, "layer_4_codes", values)


def with_a_bomb(batch: pa.RecordBatch) -> pa.RecordBatch:
    values = pa.array(np.zeros(10_000_000, np.uint32))
    return replaced(batch, "layer_4_sample_ids", values, [0, len(values), len(values), len(values)])


def with_nulls(batch: pa.RecordBatch) -> pa.RecordBatch:
    old = batch.column("layer_4_codes").values
    return replaced(batch, "layer_4_codes", pa.array([None, *old.to_pylist()[1:]], old.type))


HOSTILE: list[tuple[Callable[[pa.RecordBatch], pa.RecordBatch], str]] = [
    (with_values("layer_4_codes", set_first(0x08)), "a code of -8; with 4 bits"),
    (with_values("layer_4_codes", set_first(0x80)), "a code of -8; with 4 bits"),
    (with_values("layer_4_codes", lambda v: v.__setitem__((0, 2), 0x10)), "unused half of a last byte is not 0"),
    (with_values("layer_3_codes", set_first(0x80)), "a code of -128; with 8 bits, expected are -127 to 127"),
    (with_values("layer_4_sample_counts", set_first(9)), "not as many as its counts say|sampled ids from"),
    (with_values("layer_4_sample_counts", lambda v: v.fill(0)), "not as many as its counts say"),
    (with_values("layer_4_sample_ids", set_first(2**32 - 1)), "the sampled id 4294967295"),
    (with_values("layer_4_sample_ids", lambda v: v.fill(7)), "do not ascend"),
    (with_values("layer_4_sample_draws", set_first(0)), "never drawn"),
    (with_values("layer_4_sample_draws", set_first(65535)), "draws, and a log of the rest"),
    (with_values("layer_4_sample_log_probs", set_first(np.nan)), "sampled log-probability of nan"),
    (with_values("layer_4_sample_log_probs", set_first(-np.inf)), "sampled log-probability of -inf"),
    (with_values("layer_4_sample_log_probs", set_first(1)), "sampled log-probability of 1.0"),
    (moved("layer_4_codes"), "the codes are not one for each target position"),
    (moved("layer_4_sample_counts"), "counts of samples are not one for each target position"),
    (moved("layer_4_sample_ids"), "the sampled ids of an example are not as many"),
    (moved("layer_4_sample_draws"), "the sampled draws of an example are not as many"),
    (moved("layer_4_sample_log_probs"), "the sampled log_probs of an example are not as many"),
    (with_wide_codes, "has the columns"),
    (with_a_bomb, "would inflate to 4"),
    (with_nulls, "empty cells|no proper Arrow"),
    (lambda b: b.slice(0, 2), "has 2 rows; expected are 3"),
    (lambda b: b.drop_columns(["layer_4_codes"]), "has the columns"),
    (lambda b: b.append_column("more", pa.array([1, 2, 3])), "has the columns"),
    (lambda b: b.replace_schema_metadata({"a": "b"}), "has the columns"),
]


def test_tail_rows_put_back_by_the_helper_are_still_accepted(folder: Path) -> None:
    put(folder, bytes(to_arrow(batch_of(folder))))
    for column in ("layer_4_codes", "layer_4_sample_ids"):
        put(folder, bytes(to_arrow(with_values(column, lambda values: None)(batch_of(folder)))))
    assert verify_cache(folder).problems == []


@pytest.mark.parametrize(("change", "what"), HOSTILE)
def test_hostile_tail_rows_with_a_correct_digest_are_refused_and_named(
    folder: Path, change: Callable[[pa.RecordBatch], pa.RecordBatch], what: str
) -> None:
    put(folder, bytes(to_arrow(change(batch_of(folder)))))
    with pytest.raises(CacheError, match=what) as caught:
        CacheReader(folder).read_shard(0)
    assert str(caught.value).startswith(ROWS)
    assert {problem.file for problem in verify_cache(folder).problems} == {ROWS}
    assert len(CacheReader(folder, tail_rows=False).read_shard(0)) == 3


def test_a_sampled_id_among_the_kept_ones_is_refused_when_read(folder: Path, cache: Any) -> None:
    column = batch_of(folder).column("layer_4_sample_ids")
    keeps = cache.examples[0].targets[4]
    least, first = int(keeps.ids[: keeps.counts[0]].min()), column.values.to_pylist()[:2]
    assert least < first[1]
    put(folder, bytes(to_arrow(with_values("layer_4_sample_ids", set_first(least))(batch_of(folder)))))
    with pytest.raises(CacheError, match=r"position .*: a sampled id is one of those that the row keeps"):
        CacheReader(folder).read_shard(0)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "other"])
def test_damaged_tail_rows_are_named_and_their_shard_is_written_again(folder: Path, cache: Any, damage: str) -> None:
    wanted = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    data = bytearray(wanted[folder / ROWS])
    data[50] ^= 8
    if damage == "gone":
        (folder / ROWS).unlink()
    else:
        other = wanted[folder / "shards" / "00001.tail_rows.arrow"]
        (folder / ROWS).write_bytes({"flip": bytes(data), "cut": data[:-1], "other": other}[damage])
    assert {problem.file for problem in verify_cache(folder).problems} == {ROWS}
    with pytest.raises(CacheError, match=r"00000\.tail_rows\.arrow"):
        CacheReader(folder)[1]
    writer = cache.writer(folder)
    assert writer.unfinished() == [0]
    cache.write(folder)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == wanted


def test_mutated_tail_rows_with_correct_digests_give_typed_errors_or_right_shapes(folder: Path) -> None:
    original = (folder / ROWS).read_bytes()
    refused = 0
    for data in mutated(original, 300):
        put(folder, data)
        try:
            examples = CacheReader(folder).read_shard(0)
        except CacheError:
            refused += 1
        else:
            for example in examples:
                found = example.targets[4].codes
                assert found is not None
                assert found.shape == (len(example.target_positions), 5)
                assert np.abs(found).max() <= 7
    assert refused > 100


def test_a_verify_of_damaged_targets_still_digests_their_tail_rows(folder: Path) -> None:
    data = (folder / ROWS).read_bytes()
    (folder / "shards" / "00000.arrow").unlink()
    assert {p.file for p in verify_cache(folder).problems} == {"shards/00000.arrow"}
    (folder / ROWS).write_bytes(data[:-1])
    assert {p.file for p in verify_cache(folder).problems} == {"shards/00000.arrow", ROWS}


def test_the_writer_counts_the_bytes_of_tail_rows(tmp_path: Path, cache: Any) -> None:
    writer = cache.writer(tmp_path / "cache")
    cache.write_sketches(writer)
    cache.write_shards(writer, [0, 1])
    files = (tmp_path / "cache" / "shards").glob("*.arrow")
    assert writer.bytes_written == sum(path.stat().st_size for path in files)

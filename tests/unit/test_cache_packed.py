"""The codec `packed`, stage by stage and as a whole; and hostile shards of it with correct digests."""

import math
import runpy
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest

from distilllens_cache import CacheError, CacheReader, verify_cache
from distilllens_cache.arrow_file import to_arrow
from distilllens_cache.codec import find_codec, shard_schema
from distilllens_cache.common_ids import LEAST, MOST, common_ids, ids_by_rank, ranks_by_id
from distilllens_cache.companding import LOG_PROBS, levels_of, mass_error
from distilllens_cache.gaps import from_gaps, from_planes, num_planes, to_gaps, to_planes
from distilllens_cache.layer_codec import LayerPlace, LayerShape
from distilllens_cache.meaning import FlatLayer
from distilllens_cache.ragged import Rows

TinyCache: Any = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_cache_v1.py"))["TinyCache"]
HOSTILE = runpy.run_path(str(Path(__file__).with_name("test_cache_hostile.py")))
SHARD, put, batch_of, with_values, set_first, mutated = (
    HOSTILE[name] for name in ("SHARD", "put", "batch_of", "with_values", "set_first", "mutated")
)
PACKED = find_codec("packed")


# the stages


def test_every_level_is_the_level_of_what_it_stands_for() -> None:
    assert levels_of(LOG_PROBS).tolist() == list(range(256))
    np.testing.assert_allclose(LOG_PROBS[[0, 1, 64, 255]], [0, -1 / 32, -3.4366, -105.5], rtol=0.01)


def test_a_log_probability_moves_by_at_most_half_a_step() -> None:
    log_probs = -np.random.default_rng(0).uniform(0, 105, 100_000).astype(np.float32)
    moved = np.abs(LOG_PROBS[levels_of(log_probs)] - log_probs)
    assert (moved <= (2 - log_probs) / 128 * 1.005).all()
    assert levels_of(np.float32([-0.0, 0.0, -106, -1e4, -3e38])).tolist() == [0, 0, 255, 255, 255]


def test_levels_are_settled_by_their_limits_and_not_by_a_logarithm() -> None:
    limits = (2 * np.expm1((np.arange(255) + 0.5) / 64)).astype(np.float32)
    assert levels_of(-limits).tolist() == list(range(1, 256))
    assert levels_of(-np.nextafter(limits, np.float32(0))).tolist() == list(range(255))


@pytest.mark.parametrize("cells", [2, 3, 65, 129, 50_000])
@pytest.mark.parametrize("flatness", [0.01, 1.0, 1e4])
def test_rounding_to_levels_never_changes_the_mass_by_more_than_its_bound(cells: int, flatness: float) -> None:
    rng = np.random.default_rng(cells)
    for _ in range(30):
        probs = np.maximum(rng.dirichlet(np.full(cells, flatness)), 1e-45)
        mass = np.exp(LOG_PROBS[levels_of(np.log(probs).astype(np.float32))].astype(np.float64)).sum()
        assert abs(mass - 1) <= mass_error(cells) + 1e-5
    assert mass_error(65) < 0.05


def test_common_ids_are_those_kept_often_by_number_where_they_tie() -> None:
    ids = np.repeat(np.array([9, 4, 7, 2, 5], np.uint32), [LEAST + 1, LEAST, LEAST, LEAST - 1, LEAST + 5])
    assert common_ids(np.random.default_rng(0).permutation(ids), 10).tolist() == [5, 9, 4, 7]
    assert common_ids(np.zeros(0, np.uint32), 10).tolist() == []
    assert len(common_ids(np.repeat(np.arange(2 * MOST, dtype=np.uint32), LEAST), 2 * MOST)) == MOST


def test_each_id_has_one_rank() -> None:
    common = np.array([5, 9, 4], np.uint32)
    assert ids_by_rank(common, 10).tolist() == [5, 9, 4, 0, 1, 2, 3, 6, 7, 8]
    assert ranks_by_id(common, 10)[ids_by_rank(common, 10)].tolist() == list(range(10))
    assert len(ids_by_rank(np.array([5, 5], np.uint32), 10)) == 11


def test_gaps_lead_back_to_the_numbers_and_any_gaps_ascend() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 9, 200)
    rows = Rows(counts)
    numbers = np.concatenate([np.sort(rng.choice(70_000, count, replace=False)) for count in counts]).astype(np.uint32)
    gaps = to_gaps(numbers, rows)
    assert gaps[rows.starts].tolist() == numbers[rows.starts].tolist()
    assert np.array_equal(from_gaps(gaps, rows), numbers)
    total = from_gaps(np.full(rows.num_cells, (1 << 32) // 9 - 1, np.uint32), rows)
    assert total[rows.ends - 1].tolist() == (counts * ((1 << 32) // 9) - 1).tolist()
    anything = from_gaps(rng.integers(0, 1 << 24, rows.num_cells).astype(np.uint32), rows)
    rises = np.diff(anything) > 0
    rises[rows.ends[:-1] - 1] = True
    assert rises.all()


@pytest.mark.parametrize("count", [255, 256, 257, 1000])
def test_the_widest_gaps_ascend_in_rows_that_pass_32_bits(count: int) -> None:
    rows = Rows(np.array([3, count, 1]))
    found = from_gaps(np.full(count + 4, (1 << 24) - 1, np.uint32), rows)
    assert found.tolist() == [(1 << 24) * n - 1 for length in (3, count, 1) for n in range(1, length + 1)]


@pytest.mark.parametrize(
    ("size", "planes"), [(1, 1), (2, 1), (256, 1), (257, 2), (65_536, 2), (65_537, 3), (1 << 24, 3)]
)
def test_planes_hold_every_number_below_a_size(size: int, planes: int) -> None:
    assert num_planes(size) == planes
    numbers = np.array([0, size // 2, size - 1], np.uint32)
    parts = to_planes(numbers, planes)
    assert [part.dtype for part in parts] == [np.uint8] * planes
    assert from_planes(parts).tolist() == numbers.tolist()


@pytest.mark.parametrize("counts", [[1], [3, 3, 3], [1, 4, 1, 2, 4, 300], [2] * 50 + [1] * 50, []])
def test_rows_are_sorted_and_summed_each_for_itself(counts: list[int]) -> None:
    rows = Rows(np.array(counts, np.int64))
    keys = np.random.default_rng(0).integers(0, 2**32, rows.num_cells).astype(np.uint32)
    parts = np.split(keys, rows.ends[:-1])
    wanted = np.concatenate([np.sort(part) for part in parts])
    assert rows.sums(keys.astype(np.float64)).tolist() == [float(part.sum(dtype=np.int64)) for part in parts if counts]
    assert rows.maxima((keys >> 24).astype(np.uint8)).tolist() == [part.max() >> 24 for part in parts if counts]
    rows.sort(keys)
    assert np.array_equal(keys, wanted)
    assert rows.spread(np.arange(len(counts))).tolist() == np.repeat(np.arange(len(counts)), counts).tolist()


# the whole


def layer_of(rows: list[dict[int, float]], vocab_size: int) -> tuple[FlatLayer, LayerShape, LayerPlace]:
    """One example whose rows keep these probabilities, likeliest first."""
    log_probs = [np.log(np.array(list(row.values()))) for row in rows]
    rest = [max(1 - sum(row.values()), 1e-40) for row in rows]
    flat = FlatLayer(
        np.array([len(row) for row in rows]),
        np.concatenate([list(row) for row in rows]).astype(np.uint32),
        np.concatenate(log_probs).astype(np.float32),
        np.log(rest).astype(np.float32),
    )
    shape = LayerShape(1, max(len(row) for row in rows), vocab_size)
    return flat, shape, LayerPlace(np.array([0, len(rows)]), "shard, layer 1", lambda row: f"row {row}")


def test_a_row_comes_back_by_falling_probability_and_ties_by_number() -> None:
    flat, shape, place = layer_of([{70_000: 0.5, 3: 0.2, 9: 0.1, 4: 0.1}, {8: 1.0}], 80_000)
    columns = PACKED.encode(flat, shape, place)
    assert [column.type for column in columns] == [field.type for field in PACKED.fields(shape)]
    found = PACKED.decode(columns, shape, place)
    assert found.counts.tolist() == [4, 1]
    assert found.ids.tolist() == [70_000, 3, 4, 9, 8]
    assert (found.ids.dtype, found.log_probs.dtype, found.log_rest.dtype) == (np.uint32, np.float32, np.float32)
    np.testing.assert_allclose(np.exp(found.log_probs), [0.5, 0.2, 0.1, 0.1, 1], rtol=0.05)
    assert found.log_probs[2] == found.log_probs[3]
    np.testing.assert_allclose(np.exp(found.log_rest), [0.1, 0], rtol=0.05, atol=1e-30)


def test_what_is_stored_of_a_row_is_what_the_format_says() -> None:
    flat, shape, place = layer_of([{7: 0.5, 3: 0.25}] * LEAST + [{3: 0.6}], 300)
    columns = zip(PACKED.fields(shape), PACKED.encode(flat, shape, place), strict=True)
    quarter, half = (round(64 * math.log(1 + math.log(n) / 2)) for n in (4, 2))
    last = round(64 * math.log(1 - math.log(0.6) / 2))
    assert {field.name: column.to_pylist() for field, column in columns} == {
        "layer_1_common": [[3, 7]],
        "layer_1_counts": [[2] * LEAST + [1]],
        "layer_1_deepest": [[quarter] * LEAST + [last]],
        "layer_1_rest": [[quarter] * LEAST + [round(64 * math.log(1 - math.log(0.4) / 2))]],
        "layer_1_gaps_0": [[0, 0] * LEAST + [0]],
        "layer_1_gaps_1": [[0, 0] * LEAST + [0]],
        "layer_1_above": [[0, quarter - half] * LEAST + [0]],
    }


def test_equal_rows_make_equal_bytes_and_constant_columns_cost_nothing(tmp_path: Path) -> None:
    first = TinyCache(codec="packed").write(tmp_path / "a")
    second = TinyCache(codec="packed").write(tmp_path / "b")
    assert (first / SHARD).read_bytes() == (second / SHARD).read_bytes()
    sizes = []
    for num_rows in (100, 100_000):
        flat, shape, place = layer_of([{n: 0.9 - n / 200 for n in range(1)}] * num_rows, 5000)
        batch = pa.RecordBatch.from_arrays(PACKED.encode(flat, shape, place), schema=pa.schema(PACKED.fields(shape)))
        sizes.append(to_arrow(batch, level=PACKED.compression_level).nbytes)
    assert sizes[1] - sizes[0] < 300


def test_a_cache_of_it_is_sound_and_counts_the_bytes_of_its_layers(tmp_path: Path) -> None:
    cache = TinyCache(codec="packed", num_examples=6, top_k={2: 6, 4: 20})
    folder = cache.write(tmp_path / "cache")
    assert verify_cache(folder).problems == []
    reader = CacheReader(folder)
    for before, after in zip(cache.examples, reader, strict=True):
        for layer, targets in after.targets.items():
            assert np.array_equal(targets.counts, before.targets[layer].counts)
            assert not targets.ids.flags.writeable
            assert not targets.log_probs.flags.writeable
    stored = sum(stats.bytes for stats in reader.manifest.layer_stats.values())
    assert stored < sum(shard.size for shard in reader.manifest.shards)
    plain = TinyCache(num_examples=6, top_k={2: 6, 4: 20}, codec="arrow-fp16").write(tmp_path / "plain")
    assert stored < sum(stats.bytes for stats in CacheReader(plain).manifest.layer_stats.values())


def test_rows_of_a_zipf_law_take_little_more_than_half_of_the_bytes_of_fp16() -> None:
    rng = np.random.default_rng(0)
    logits = -1.2 * np.log(np.arange(1, 5001)) + rng.gumbel(0, 1.5, (500, 5000))
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    order = np.argsort(-log_probs, axis=1)[:, :32]
    kept = np.take_along_axis(log_probs, order, 1)
    flat = FlatLayer(
        np.full(500, 32),
        order.ravel().astype(np.uint32),
        kept.ravel().astype(np.float32),
        np.log1p(-np.exp(kept).sum(1)).astype(np.float32),
    )
    shape, place = LayerShape(1, 32, 5000), LayerPlace(np.array([0, 500]), "shard, layer 1", str)
    sizes = {}
    for codec in (PACKED, find_codec("arrow-fp16")):
        schema = pa.schema(codec.fields(shape))
        batch = pa.RecordBatch.from_arrays(codec.encode(flat, shape, place), schema=schema)
        sizes[codec.name] = to_arrow(batch, level=codec.compression_level).nbytes / 500
    assert sizes["packed"] < 0.6 * sizes["arrow-fp16"]


def test_a_shard_without_targets_and_a_row_of_the_whole_vocabulary_are_kept() -> None:
    shape = LayerShape(1, 4, 4)
    empty = FlatLayer(*(np.zeros(0, kind) for kind in (np.int64, np.uint32, np.float32, np.float32)))
    place = LayerPlace(np.array([0, 0, 0]), "shard, layer 1", str)
    assert len(PACKED.decode(PACKED.encode(empty, shape, place), shape, place).ids) == 0
    flat, shape, place = layer_of([{2: 0.4, 0: 0.3, 3: 0.2, 1: 0.1}], 4)
    found = PACKED.decode(PACKED.encode(flat, shape, place), shape, place)
    assert found.ids.tolist() == [2, 0, 3, 1]
    assert found.log_rest[0] < -30


def test_columns_are_as_narrow_as_their_numbers() -> None:
    def types(top_k: int, vocab_size: int) -> tuple[str, int]:
        fields = PACKED.fields(LayerShape(1, top_k, vocab_size))
        return str(fields[1].type.value_type), sum("gaps" in field.name for field in fields)

    assert types(255, 256) == ("uint8", 1)
    assert types(256, 65_536) == ("uint16", 2)
    assert types(65_536, 262_144) == ("uint32", 3)


def test_a_vocabulary_beyond_24_bits_is_refused() -> None:
    assert shard_schema(PACKED, (1,), {1: 5}, 1 << 24)
    with pytest.raises(CacheError, match=r"vocabularies of up to 16777216 ids, not of 16777217. Use arrow-fp16"):
        shard_schema(PACKED, (1,), {1: 5}, (1 << 24) + 1)


# hostile shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six examples to a shard; at layer 4 at most 20 ids of 50 in a row, and some of them common."""
    return TinyCache(codec="packed", num_examples=7, examples_per_shard=6, top_k={2: 6, 4: 20}).write(
        tmp_path / "cache"
    )


def fill(value: int) -> Callable[[np.ndarray], None]:
    return lambda values: values.fill(value)


NONSENSE: list[tuple[str, Callable[[np.ndarray], None], str]] = [
    ("counts", set_first(0), "position 5: the row keeps 0 ids; expected are 1 to 20"),
    ("counts", set_first(21), "keeps 21 ids"),
    ("counts", fill(20), "not as many as its counts say"),
    ("gaps_0", fill(255), "the gaps between ids lead to .*, but the vocabulary has 50"),
    ("gaps_0", set_first(50), "the gaps between ids lead to"),
    ("above", set_first(255), "a level lies 255 above the deepest"),
    ("deepest", set_first(0), "above the deepest, 0"),
    ("deepest", fill(255), "add up to"),
    ("rest", fill(0), "add up to [12]"),
    ("above", fill(0), "add up to"),
    ("common", set_first(50), "a common id is 50, but the vocabulary has 50 ids"),
    ("common", set_first(2**32 - 1), "a common id is 4294967295"),
    ("common", fill(7), "a common id occurs twice"),
]
PARTS = ("common", "counts", "deepest", "rest", "gaps_0", "above")


def test_a_shard_put_back_by_the_helper_is_still_accepted(folder: Path) -> None:
    for part in PARTS:
        assert len(batch_of(folder).column(f"layer_4_{part}").values) > 1
        same = with_values(batch_of(folder), f"layer_4_{part}", lambda values: None)
        put(folder, SHARD, bytes(to_arrow(same, level=1)))
    assert verify_cache(folder).problems == []


@pytest.mark.parametrize(("part", "change", "what"), NONSENSE)
def test_bytes_that_make_no_sense_are_refused_where_they_are(
    folder: Path, part: str, change: Callable[[np.ndarray], None], what: str
) -> None:
    put(folder, SHARD, bytes(to_arrow(with_values(batch_of(folder), f"layer_4_{part}", change))))
    with pytest.raises(CacheError, match=what) as caught:
        CacheReader(folder).read_shard(0)
    assert str(caught.value).startswith(f"{SHARD}, layer 4")
    assert SHARD in {problem.file for problem in verify_cache(folder).problems}


def with_list(batch: pa.RecordBatch, part: str, values: np.ndarray, ends: list[int]) -> bytes:
    """The file with a part of layer 4 that holds other values, in lists that end there."""
    column = f"layer_4_{part}"
    field = batch.schema.field(column)
    items = pa.array(values, field.type.value_type)
    new = pa.ListArray.from_arrays(pa.array([0, *ends], pa.int32()), items, type=field.type)
    return bytes(to_arrow(batch.set_column(batch.schema.get_field_index(column), field, new)))


@pytest.mark.parametrize("part", PARTS)
def test_lists_anywhere_but_at_the_first_example_are_refused(folder: Path, part: str) -> None:
    batch = batch_of(folder)
    values = batch.column(f"layer_4_{part}").values.to_numpy()
    for ends in ([0, *[len(values)] * 5], [*[len(values) - 1] * 5, len(values)]):
        put(folder, SHARD, with_list(batch, part, values, ends))
        with pytest.raises(CacheError, match="layer 4: a column is not one list at the first example"):
            CacheReader(folder).read_shard(0)


@pytest.mark.parametrize(
    ("part", "what"),
    [
        *((part, r"are not one for each of \d+ targets") for part in ("counts", "deepest", "rest")),
        *((part, "not as many as its counts say") for part in ("gaps_0", "above")),
    ],
)
def test_lists_that_are_too_short_or_too_long_are_refused(folder: Path, part: str, what: str) -> None:
    batch = batch_of(folder)
    values = batch.column(f"layer_4_{part}").values.to_numpy()
    for other in (values[:-1], np.append(values, values[-1:]), values[:0]):
        put(folder, SHARD, with_list(batch, part, other, [len(other)] * 6))
        with pytest.raises(CacheError, match=what):
            CacheReader(folder).read_shard(0)


def test_more_common_ids_than_are_allowed_are_refused() -> None:
    flat, shape, place = layer_of([{0: 0.5}], 10_000)
    columns = PACKED.encode(flat, shape, place)
    many = pa.array(np.arange(MOST + 1, dtype=np.uint32))
    columns[0] = pa.ListArray.from_arrays(pa.array([0, MOST + 1], pa.int32()), many, type=columns[0].type)
    with pytest.raises(CacheError, match="4097 common ids; there are at most 4096"):
        PACKED.decode(columns, shape, place)


def test_as_many_common_ids_as_are_allowed_fit_a_shard_of_one_target(tmp_path: Path) -> None:
    cache = TinyCache(codec="packed", num_examples=1, top_k={2: 1}, vocab_size=5000, store_tail="none")
    folder = cache.write(tmp_path / "cache")
    column, batch = "layer_2_common", batch_of(folder)
    many = pa.array(np.arange(4999, 4999 - MOST, -1, dtype=np.uint32))
    new = pa.ListArray.from_arrays(pa.array([0, MOST], pa.int32()), many, type=batch.schema.field(column).type)
    other = batch.set_column(batch.schema.get_field_index(column), batch.schema.field(column), new)
    put(folder, SHARD, bytes(to_arrow(other)))
    first = CacheReader(folder).read_shard(0)[0].targets[2].ids[0]
    rank = batch.column("layer_2_gaps_0")[0][0].as_py() + 256 * batch.column("layer_2_gaps_1")[0][0].as_py()
    assert first == (4999 - rank if rank < MOST else rank - MOST)


def test_a_bomb_of_cells_is_refused_before_it_inflates(folder: Path) -> None:
    zeros = np.zeros(200_000_000, np.uint8)
    data = with_list(batch_of(folder), "above", zeros, [len(zeros)] * 6)
    assert len(data) < 100_000
    del zeros
    put(folder, SHARD, data)
    reader, before = CacheReader(folder), pa.total_allocated_bytes()
    tracemalloc.start()
    with pytest.raises(CacheError, match="would inflate to 2000"):
        reader.read_shard(0)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    assert pa.total_allocated_bytes() <= before + 1_000_000


def test_mutated_shards_with_correct_digests_give_typed_errors_or_sound_rows(folder: Path) -> None:
    """Without compression, so that mutations reach the bytes of the codec."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch_of(folder).schema) as writer:
        writer.write_batch(batch_of(folder))
    original = sink.getvalue().to_pybytes()
    refused = 0
    for data in mutated(original, 400):
        put(folder, SHARD, data)
        try:
            examples = CacheReader(folder).read_shard(0)
        except CacheError:
            refused += 1
            continue
        for targets in (targets for example in examples for targets in example.targets.values()):
            rows = np.split(targets.ids, targets.offsets[1:-1])
            assert all(len(set(row.tolist())) == len(row) and row.max() < 50 for row in rows)
            mass = np.add.reduceat(np.exp(targets.log_probs.astype(np.float64)), targets.offsets[:-1])
            np.testing.assert_allclose(mass + np.exp(targets.log_rest.astype(np.float64)), 1, atol=1e-5)
    assert 50 < refused < 400

"""Streams: the order of a run in batches, shared by ranks, restored exactly, decoded ahead within bounds."""

import json
import multiprocessing
import pickle
import runpy
import shutil
import threading
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilllens_cache import CacheError, CacheReader, CacheStream, Order, ReadAhead

TinyCache: Any = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_cache_v1.py"))["TinyCache"]
SIZE = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyCache(num_examples=SIZE, examples_per_shard=2).write(tmp_path_factory.mktemp("stream") / "cache")


@pytest.fixture(scope="module")
def reader(folder: Path) -> CacheReader:
    return CacheReader(folder)


class Bare:
    """What a stream asks of a reader, without files."""

    digest = "00" * 32
    shard_of = np.arange(SIZE) // 2
    num_tokens = np.random.default_rng(0).integers(2, 12, SIZE)

    def __len__(self) -> int:
        return SIZE

    def read_shard(self, number: int) -> Any:
        return [SimpleNamespace(index=index) for index in np.flatnonzero(self.shard_of == number).tolist()]


BARE: Any = Bare()


def ids(stream: CacheStream, num_batches: int | None = None) -> list[list[int]]:
    return [[example.index for example in batch] for batch in islice(stream, num_batches)]


def flat(parts: list[list[int]]) -> list[int]:
    return [index for part in parts for index in part]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 99), st.sampled_from([(4, 1), (2, 2), (1, 4)]), st.integers(1, 12))
def test_ranks_only_partition_a_step(seed: int, shape: tuple[int, int], steps: int) -> None:
    batch_size, world_size = shape
    ranks = [
        CacheStream(BARE, seed=seed, batch_size=batch_size, rank=r, world_size=world_size) for r in range(world_size)
    ]
    found = [flat(list(parts)) for parts in zip(*(ids(rank, steps) for rank in ranks), strict=True)]
    assert found == [Order(BARE.shard_of, seed=seed).indices(4 * step, 4 * step + 4) for step in range(steps)]
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("token_budget", [None, 40])
def test_every_rank_gets_as_many_batches_and_no_example_is_left_out(world_size: int, token_budget: int | None) -> None:
    streams = [
        CacheStream(BARE, batch_size=3, token_budget=token_budget, epochs=2, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    found = [ids(stream) for stream in streams]
    assert len({len(batches) for batches in found}) == 1
    run = flat([batch for group in zip(*found, strict=True) for batch in group])
    assert run == Order(BARE.shard_of, seed=0).indices(0, len(run))
    assert len(run) >= 2 * SIZE
    assert streams[0].epoch == 2


@pytest.mark.parametrize("token_budget", [1, 17, 40, 10_000])
def test_batches_by_tokens_stay_within_the_budget_and_end_with_their_epoch(token_budget: int) -> None:
    with CacheStream(BARE, seed=3, token_budget=token_budget, epochs=2) as stream:
        batches = ids(stream)
    assert sorted(flat(batches)) == sorted([*range(SIZE)] * 2)
    order = Order(BARE.shard_of, seed=3)
    assert flat(batches) == order.indices(0, 2 * SIZE)
    at = 0
    for batch, following in zip(batches, [*batches[1:], []], strict=True):
        sizes = [int(BARE.num_tokens[index]) for index in (*batch, *following[:1])]
        assert len(batch) == 1 or len(batch) * max(sizes[: len(batch)]) <= token_budget
        at += len(batch)
        is_full = (len(batch) + 1) * max(sizes) > token_budget
        assert is_full or at % SIZE == 0


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 30),
    st.sampled_from([None, 30]),
    st.sampled_from([(4, 1), (2, 2), (1, 4)]),
    st.sampled_from([(4, 1), (2, 2), (1, 4)]),
)
def test_a_restored_stream_goes_on_exactly_also_with_other_ranks(
    done: int, token_budget: int | None, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """With a token budget the batches of a step are counted, so the step is four of them."""

    def steps(shape: tuple[int, int], state: dict | None, count: int) -> tuple[list[list[int]], dict]:
        batch_size, world_size = (shape[0], shape[1]) if token_budget is None else (1, shape[1])
        streams = [
            CacheStream(BARE, seed=1, batch_size=batch_size, token_budget=token_budget, rank=r, world_size=world_size)
            for r in range(world_size)
        ]
        for stream in streams:
            if state is not None:
                stream.load_state_dict(json.loads(json.dumps(state)))
        rounds = 1 if token_budget is None else 4 // world_size
        found = [
            flat([batch for _ in range(rounds) for stream in streams for batch in ids(stream, 1)]) for _ in range(count)
        ]
        for stream in streams:
            stream.close()
        assert all(stream.state_dict() == streams[0].state_dict() for stream in streams)
        return found, streams[0].state_dict()

    whole, _ = steps((4, 1), None, done + 3)
    first, state = steps(before, None, done)
    rest, _ = steps(after, state, 3)
    assert first + rest == whole


def test_a_state_of_another_stream_is_refused_with_what_differs(reader: CacheReader, tmp_path: Path) -> None:
    stream = CacheStream(reader, seed=1)
    state = stream.state_dict()
    other = CacheReader(TinyCache(num_examples=5, examples_per_shard=2).write(tmp_path / "cache"))
    with pytest.raises(CacheError, match="cache: the state has"):
        CacheStream(other, seed=1).load_state_dict(state)
    with pytest.raises(CacheError, match="seed: the state has 1, this stream has 2"):
        CacheStream(reader, seed=2).load_state_dict(state)
    with pytest.raises(CacheError, match="token_budget: the state has None, this stream has 9"):
        CacheStream(reader, seed=1, token_budget=9).load_state_dict(state)
    with pytest.raises(CacheError, match="no state of a stream"):
        stream.load_state_dict({"place": 3})


def test_impossible_ranks_and_sizes_are_refused(reader: CacheReader) -> None:
    for mistake in ({"rank": 2, "world_size": 2}, {"batch_size": 0}, {"token_budget": 0}):
        with pytest.raises(ValueError, match=r"rank|batch_size"):
            CacheStream(reader, **mistake)
    with pytest.raises(ValueError, match="threads is 0"):
        CacheStream(reader, threads=0)


class Counted:
    """A reader that keeps count of the decoded shards that are alive."""

    def __init__(self, reader: CacheReader) -> None:
        self.reader = reader
        self.shard_of = reader.shard_of
        self.read: list[int] = []
        self.alive = self.most = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.reader)

    def read_shard(self, number: int) -> Any:
        with self._lock:
            self.read.append(number)
            self.alive += 1
            self.most = max(self.most, self.alive)
        return Alive(self, self.reader.read_shard(number))


class Alive(list):
    def __init__(self, counted: Counted, examples: list) -> None:
        super().__init__(examples)
        self.counted = counted

    def __del__(self) -> None:
        self.counted.alive -= 1


@pytest.mark.parametrize("shards_ahead", [0, 1, 4, 7])
def test_each_shard_is_read_once_an_epoch_and_few_are_alive(reader: CacheReader, shards_ahead: int) -> None:
    counted = Counted(reader)
    with ReadAhead(counted, Order(reader.shard_of, seed=0), shards_ahead=shards_ahead) as ahead:
        found = [ahead[place].index for place in range(2 * SIZE)]
        assert counted.most <= 4 + shards_ahead
    assert found == Order(reader.shard_of, seed=0).indices(0, 2 * SIZE)
    num_shards = len(reader.manifest.shards)
    # At the end of an epoch a shard may still be held when the next one wants it; read ahead may have gone on.
    assert len(counted.read) <= 2 * num_shards + shards_ahead
    assert counted.alive == 0


def test_shards_of_the_next_window_are_decoded_before_they_are_asked_for(reader: CacheReader) -> None:
    counted = Counted(reader)
    order = Order(reader.shard_of, seed=0)
    with ReadAhead(counted, order, shards_ahead=4, threads=1) as ahead:
        _ = ahead[0]
        expected = [shard for window in order.epoch(0).shards[:2] for shard in window]
        for future in [*ahead._decoded.values()]:
            future.result()
        assert counted.read == expected


def test_nothing_is_read_ahead_beyond_the_end(reader: CacheReader) -> None:
    counted = Counted(reader)
    with ReadAhead(counted, Order(reader.shard_of, seed=0), stop=SIZE, shards_ahead=8) as ahead:
        for place in range(SIZE):
            _ = ahead[place]
    assert sorted(counted.read) == sorted(set(counted.read))


def test_places_may_be_asked_for_in_any_order(reader: CacheReader) -> None:
    order = Order(reader.shard_of, seed=5)
    run = order.indices(0, 4 * SIZE)
    with ReadAhead(reader, order) as ahead:
        for place in np.random.default_rng(0).permutation(4 * SIZE):
            assert ahead[int(place)].index == run[place]
        with pytest.raises(IndexError, match="places count from 0"):
            ahead[-1]


def test_damage_surfaces_where_the_shard_is_first_needed_with_its_name(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "cache")
    reader = CacheReader(copy)
    bad = Order(reader.shard_of, seed=0).epoch(0).shards[1][0]
    (copy / f"shards/{bad:05d}.arrow").write_bytes(b"junk")
    run = Order(reader.shard_of, seed=0).indices(0, SIZE)
    first = next(place for place, index in enumerate(run) if reader.shard_of[index] == bad)
    with CacheStream(reader) as stream:
        assert flat(ids(stream, first)) == run[:first]
        with pytest.raises(CacheError, match=f"shards/{bad:05d}.arrow"):
            next(stream)
        assert stream.state_dict()["place"] == first >= 7


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_closing_stops_the_threads(reader: CacheReader) -> None:
    with CacheStream(reader) as stream:
        next(stream)
        assert reading_threads()
    assert reading_threads() == []
    assert ids(stream, 1)
    stream.close()
    assert reading_threads() == []


def test_a_stream_that_is_left_in_the_middle_does_not_keep_the_program_alive(folder: Path) -> None:
    import subprocess
    import sys

    code = f"from distilllens_cache import *; next(CacheStream(CacheReader({str(folder)!r}))); print('left')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


def _read_in_child(stream: CacheStream, queue: Any) -> None:
    queue.put(ids(stream, 3))
    stream.close()


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_copy_in_another_process_reads_on(reader: CacheReader, method: str) -> None:
    if method == "spawn":
        stream = CacheStream(reader, batch_size=2)
        next(stream)
        copy = pickle.loads(pickle.dumps(stream))
        assert ids(copy, 3) == ids(stream, 3)
        copy.close()
        stream.close()
        return
    context: Any = multiprocessing.get_context("fork")
    with CacheStream(reader, batch_size=2) as stream:
        next(stream)
        queue = context.Queue()
        child = context.Process(target=_read_in_child, args=(stream, queue))
        child.start()
        found = queue.get(timeout=60)
        child.join()
        assert found == ids(stream, 3)

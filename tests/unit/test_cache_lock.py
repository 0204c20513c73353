"""One run at a time in a folder: who holds it, who may join, and what a killed writer leaves."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distilllens_cache import (
    ALONE,
    CacheError,
    CacheReader,
    CacheWriter,
    Seat,
    atomic,
    lock,
    require_free,
    verify_cache,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "make_cache_v1.py"
TinyCache: Any = runpy.run_path(str(GOLDEN))["TinyCache"]

WRITER = f"""
import json, runpy, sys
from pathlib import Path
from distilllens_cache import ALONE, CacheError, Seat
cache = runpy.run_path({str(GOLDEN)!r})["TinyCache"](num_examples=8, examples_per_shard=1)

def tell(*words):
    print(*words, flush=True)

def hold(folder, seat):
    writer = None
    try:
        writer = cache.writer(folder, seat=seat)
        cache.write_shards(writer, [0])
        tell("holding")
    except CacheError as error:
        tell("refused", error)
    sys.stdin.readline()
    if writer is not None:
        writer.close()
    tell("left")

def write_all(folder, seat):
    writer = cache.writer(folder, seat=seat)
    cache.write_shards(writer, writer.unfinished())
    writer.finish()
    tell("finished")

def write_share(folder, seat):
    writer = cache.writer(folder, seat=seat)
    missing = writer.unfinished()
    writer.lock.mark("counted")
    while not all("counted" in writer.lock.marks(rank) for rank in range(seat.world_size)):
        pass
    cache.write_shards(writer, missing[seat.rank::seat.world_size])
    while not writer.look_again() and writer.unfinished():
        pass
    writer.finish()
    tell("finished")

def finish(folder, seat):
    writer = cache.writer(folder, seat=seat)
    tell("ready")
    sys.stdin.readline()
    writer.finish()
    tell("finished")

tell("here")
for line in sys.stdin:
    name, folder, *seat = json.loads(line)
    globals()[name](Path(folder), Seat(*seat))
"""
"""A process that runs one function after another, each as soon as it is told to."""


@pytest.fixture
def cache() -> Any:
    return TinyCache(num_examples=8, examples_per_shard=1)


class Writer:
    """A process of its own that writes caches."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid

    def run(self, name: str, folder: Path, seat: Seat = ALONE) -> None:
        """Begin a function of the process."""
        self.go(json.dumps([name, str(folder), seat.rank, seat.world_size, seat.run]))

    def go(self, line: str = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def said(self) -> str:
        """The next line that the process prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture(scope="module")
def crew() -> Iterator[list[Writer]]:
    """Four writers, each a process."""
    writers = [Writer() for _ in range(4)]
    assert [writer.said() for writer in writers] == ["here"] * 4
    yield writers
    for writer in writers:
        writer.kill()


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def locks_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.lock"))


def foreign_seat(folder: Path, *, rank: int = 0, run: str = "") -> Path:
    """What a writer on another host that shares no locks with this one leaves in a folder."""
    path = folder / f"writer.{rank}.lock"
    content = {"host": "elsewhere", "pid": 77, "since": "yesterday", "run": run, "world_size": 1}
    path.write_text(json.dumps(content) + "\n")
    return path


def test_a_second_run_is_told_who_holds_the_folder_and_changes_nothing(tmp_path, cache, crew) -> None:
    holder = crew[0]
    holder.run("hold", tmp_path / "cache")
    assert holder.said() == "holding"
    before = files_of(tmp_path)
    with pytest.raises(CacheError, match=rf"written by another run: process {holder.pid} on .*, at work since 20\d\d-"):
        cache.writer(tmp_path / "cache")
    with pytest.raises(CacheError, match=f"process {holder.pid} on"):
        cache.writer(tmp_path / "cache", overwrite=True)
    with pytest.raises(CacheError, match=f"process {holder.pid} on"):
        require_free(tmp_path / "cache")
    assert files_of(tmp_path) == before
    holder.go()
    assert holder.said() == "left"


def test_the_lock_of_a_killed_writer_is_taken_over(tmp_path, cache) -> None:
    holder = Writer()
    holder.run("hold", tmp_path / "cache")
    assert [holder.said(), holder.said()] == ["here", "holding"]
    holder.kill()
    assert locks_in(tmp_path / "cache") == ["writer.0.lock", "writers.lock"]
    require_free(tmp_path / "cache")
    writer = cache.writer(tmp_path / "cache")
    assert writer.unfinished() == list(range(1, 8))
    writer.close()
    assert files_of(cache.write(tmp_path / "cache")) == files_of(cache.write(tmp_path / "fresh"))


def test_a_finished_cache_has_no_lock_in_it_and_needs_none_to_be_read(tmp_path, cache) -> None:
    folder = cache.write(tmp_path / "cache")
    assert locks_in(folder) == []
    foreign_seat(folder)
    assert len(CacheReader(folder)) == 8
    assert verify_cache(folder).is_sound


def test_a_closed_or_failed_writer_holds_nothing(tmp_path, cache, crew) -> None:
    with cache.writer(tmp_path / "cache") as writer:
        assert locks_in(tmp_path / "cache") == ["writer.0.lock", "writers.lock"]
    assert locks_in(tmp_path / "cache") == []
    with pytest.raises(CacheError, match=r"no longer this run's"):
        cache.write_shards(writer, [0])
    with pytest.raises(CacheError, match="something else"):
        TinyCache(seed=4).writer(tmp_path / "cache")
    assert locks_in(tmp_path / "cache") == []
    crew[0].run("write_all", tmp_path / "cache")
    assert crew[0].said() == "finished"


def test_a_folder_with_nothing_but_locks_is_begun_anew(tmp_path, cache) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "writers.lock").touch()
    (folder / "writer.0.lock").touch()
    cache.write(folder)
    assert locks_in(folder) == []


@pytest.mark.parametrize("num", [2, 3, 4])
def test_of_runs_that_race_one_proceeds_and_the_others_say_who_holds_it(tmp_path, crew, num: int) -> None:
    for race in range(7):
        for number, racer in enumerate(crew[:num]):
            racer.run("hold", tmp_path / str(race), Seat(run=str(number)))
        said = [racer.said() for racer in crew[:num]]
        assert said.count("holding") == 1, said
        winner = said.index("holding")
        for line in said[:winner] + said[winner + 1 :]:
            assert f"process {crew[winner].pid} on" in line, said
        for racer in crew[:num]:
            racer.go()
        assert [racer.said() for racer in crew[:num]] == ["left"] * num
        assert locks_in(tmp_path / str(race)) == []


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_of_one_run_write_one_cache_with_the_bytes_of_a_single_writer(tmp_path, cache, crew, world_size) -> None:
    wanted = files_of(cache.write(tmp_path / "alone"))
    for race in range(5):
        for rank in range(world_size):
            crew[rank].run("write_share", tmp_path / str(race), Seat(rank, world_size, "one"))
        assert [crew[rank].said() for rank in range(world_size)] == ["finished"] * world_size
        assert files_of(tmp_path / str(race)) == wanted


def test_ranks_that_finish_at_once_leave_one_manifest(tmp_path, cache, crew) -> None:
    """Each finds every shard and no manifest, and then they are let go together."""
    wanted = files_of(cache.write(tmp_path / "alone"))
    for race in range(5):
        folder = tmp_path / str(race)
        with cache.writer(folder) as writer:
            cache.write_shards(writer, writer.unfinished())
        for rank in range(4):
            crew[rank].run("finish", folder, Seat(rank, 4, "one"))
        assert [writer.said() for writer in crew] == ["ready"] * 4
        for writer in crew:
            writer.go()
        assert [writer.said() for writer in crew] == ["finished"] * 4
        assert files_of(folder) == wanted


def test_a_rank_of_the_same_run_joins_and_another_of_its_number_does_not(tmp_path, cache) -> None:
    first = cache.writer(tmp_path / "cache", seat=Seat(0, 2, "one"))
    second = cache.writer(tmp_path / "cache", seat=Seat(1, 2, "one"), overwrite=True)
    cache.write_shards(first, [0])
    assert second.look_again() is False
    assert second.unfinished() == list(range(1, 8))
    assert first.lock.is_alive(1)
    with pytest.raises(CacheError, match="another run"):
        cache.writer(tmp_path / "cache", seat=Seat(1, 2, "two"))
    second.close()
    assert first.lock.is_alive(1) is False
    second = cache.writer(tmp_path / "cache", seat=Seat(1, 2, "one"))
    assert first.lock.is_alive(1)
    cache.write(tmp_path / "cache", seat=Seat(0, 2, "one"))
    assert second.look_again()
    assert first.lock.is_alive(1) is None
    assert locks_in(tmp_path / "cache") == []


def test_a_seat_of_another_host_counts_while_it_beats_and_is_taken_over_once_it_is_silent(
    tmp_path, cache, monkeypatch
) -> None:
    monkeypatch.setattr(lock, "SECONDS_BETWEEN_BEATS", 0.05)
    monkeypatch.setattr(lock, "SECONDS_OF_SILENCE", 0.5)
    with cache.writer(tmp_path / "cache") as writer:
        cache.write_shards(writer, [0])
    path = foreign_seat(tmp_path / "cache")
    looks: list[None] = []

    def sleep(seconds: float, original: Any = time.sleep) -> None:
        original(seconds)
        looks.append(None)
        if len(looks) == 2:
            os.utime(path)

    monkeypatch.setattr(lock.time, "sleep", sleep)
    with pytest.raises(CacheError, match=r"process 77 on elsewhere, at work since yesterday.*delete .*writer\.0\.lock"):
        cache.writer(tmp_path / "cache")
    writer = cache.writer(tmp_path / "cache")  # nobody touches it any more
    assert writer.unfinished() == list(range(1, 8))


def test_a_writer_whose_lock_was_taken_away_stops(tmp_path, cache) -> None:
    writer = cache.writer(tmp_path / "cache")
    (tmp_path / "cache" / "writer.0.lock").unlink()
    for attempt in (lambda: cache.write_shards(writer, [0]), writer.lock.require_held):
        with pytest.raises(CacheError, match="it was deleted, or another run took over"):
            attempt()


def test_a_lock_on_a_file_that_is_gone_meanwhile_is_none(tmp_path, cache, monkeypatch) -> None:
    """The last writer deletes the file of the door between another's opening and locking it."""
    opened: list[int] = []

    def too_late(handle: int, original: Any = atomic.try_lock) -> bool:
        opened.append(handle)
        if len(opened) == 1:
            (tmp_path / "cache" / "writers.lock").unlink()
        return original(handle)

    monkeypatch.setattr(atomic, "try_lock", too_late)
    writer = cache.writer(tmp_path / "cache")
    assert locks_in(tmp_path / "cache") == ["writer.0.lock", "writers.lock"]
    writer.close()


def test_a_file_system_without_locks_is_a_sentence(tmp_path, cache, monkeypatch) -> None:
    def refuse(handle: int) -> bool:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(atomic, "try_lock", refuse)
    with pytest.raises(CacheError, match=r"has no file locks \(flock\)"):
        cache.writer(tmp_path / "cache")


def test_writers_of_one_process_share_its_lock(tmp_path, cache) -> None:
    first = cache.writer(tmp_path / "cache")
    second: CacheWriter = cache.writer(tmp_path / "cache")
    cache.write_shards(first, [0])
    cache.write_shards(second, [1])
    del first
    second.lock.require_held()

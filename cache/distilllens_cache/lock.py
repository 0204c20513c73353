"""Who may write in a folder: the ranks of one run, and nobody else until they are gone.

Every writer holds a file of its own, its seat, `writer.RANK.lock`: locked (flock) while its process lives, so that no
kill leaves it behind as a living one, and touched every few seconds, so that hosts that share a folder but no locks
see it live. Who takes or leaves a seat holds the door, `writers.lock`, meanwhile: nobody decides on what another is
about to change. Both are gone when the last writer is.
"""

import errno
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distilllens_cache import atomic, layout
from distilllens_cache.errors import CacheError

SECONDS_BETWEEN_BEATS = 5.0
SECONDS_OF_SILENCE = 60.0
"""A writer on another host that has not touched its seat for so long is taken for dead."""
SECONDS_AT_THE_DOOR = 600.0
"""Longest wait for another process that takes its seat, and may have a large cache to delete before."""
SECONDS_TO_LEAVE = 5.0
"""Longest wait at the door on the way out, where nothing but its own file is at stake."""
LEFT = "left"
"""What a rank leaves in its seat that went before its part was done."""
MAX_SEAT_BYTES = 64 << 10


@dataclass(frozen=True)
class Seat:
    """One writer's place in a run."""

    rank: int = 0
    world_size: int = 1
    run: str = ""
    """What the ranks of one run have in common, and other runs that go on at the same time have not."""


ALONE = Seat()
"""A run of one process."""


@dataclass(frozen=True)
class Holder:
    """Who holds a seat, as its file says; without a run if its writer was killed before it said anything."""

    rank: int
    run: str | None = None
    host: str = "an unknown host"
    pid: int = 0
    since: str = "an unknown time"
    marks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"process {self.pid or '?'} on {self.host}, at work since {self.since}"


class WriterLock:
    """The seat of one process in a folder. `enter` takes it, `leave` or the end of the process gives it back.

    It keeps other processes out. Writers of one process with one rank share it: see `lock_of`.
    """

    def __init__(self, folder: Path, seat: Seat) -> None:
        self.folder = folder
        self.seat = seat
        self._path = folder / layout.seat_name(seat.rank)
        self._handle: int | None = None
        self._finalizer: Any = None
        self._beats: dict[str, tuple[int, float]] = {}
        """By seat of another host: when it was touched last by its own clock, and when we saw that by ours."""

    def enter(self, prepare: Callable[[], None]) -> None:
        """Take the seat. ``prepare`` is called before, unless another rank of this run was here first.

        Raises `CacheError` where another run is at work, or this rank of the same one.
        """
        while True:
            with _door(self.folder):
                others = self._others()
                if None not in others.values():
                    if not others:
                        for path in seats(self.folder):  # all dead: they were silent, or are surely gone
                            if self._handle is None or path != self._path:
                                atomic.remove(path)
                        prepare()
                    if self._handle is None:
                        atomic.remove(self._path)
                        self._take()
                    return
            time.sleep(SECONDS_BETWEEN_BEATS / 10)

    def require_held(self) -> None:
        """`CacheError` if the seat was taken away, so that this writer must not go on."""
        if self._handle is None or not atomic.is_at(self._handle, self._path):
            raise CacheError(
                f"{self._path} is no longer this run's: it was deleted, or another run took over. This run stops; "
                f"what it finished is kept."
            )

    def mark(self, text: str) -> None:
        """Tell the other ranks something, in one line; `marks` reads it."""
        assert self._handle is not None
        _append(self._handle, text)

    def marks(self, rank: int) -> tuple[str, ...]:
        """What a rank of this run has told, in its order."""
        holder = read_holder(self.folder / layout.seat_name(rank))
        return holder.marks if holder is not None and holder.run == self.seat.run else ()

    def is_alive(self, rank: int) -> bool | None:
        """Whether a rank of this run lives, as far as can be told; None if it has not come, or has done its part."""
        if rank == self.seat.rank:
            return self._handle is not None
        path = self.folder / layout.seat_name(rank)
        holder = read_holder(path)
        if holder is None or holder.run != self.seat.run:
            return None
        return self._lives(path, holder) is not False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While entered, no other process enters, leaves or is alone."""
        with _door(self.folder):
            yield

    def leave(self, *, is_done: bool) -> None:
        """Give the seat back. A rank whose part is not done leaves word for the others, until a run begins anew."""
        if self._finalizer is not None and (parts := self._finalizer.detach()) is not None:
            parts[1](is_done or self.seat.world_size == 1)
        self._handle = self._finalizer = None

    def _others(self) -> dict[Holder, bool | None]:
        """Living writers but this one; None for one of another run of which nobody knows yet."""
        found: dict[Holder, bool | None] = {}
        for path in seats(self.folder):
            if path == self._path and self._handle is not None:
                continue
            holder = read_holder(path)
            if holder is None:
                continue
            lives = self._lives(path, holder)
            is_ours = holder.run == self.seat.run and holder.rank != self.seat.rank
            if lives is False:
                continue
            if lives and not is_ours:
                raise held(self.folder, holder, path)
            found[holder] = True if is_ours else lives
        return found

    def _lives(self, path: Path, holder: Holder) -> bool | None:
        """Whether a seat's process lives; None as long as only its next beat can tell."""
        try:
            if atomic.is_locked(path):
                return True
            if holder.run is None or LEFT in holder.marks or holder.host == socket.gethostname():
                return False
            beat = path.stat().st_mtime_ns
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _explain(error, path) from error
        now = time.monotonic()
        first, seen = self._beats.setdefault(path.name, (beat, now))
        if beat != first:
            self._beats[path.name] = (beat, now)
            return True
        return False if now - seen > SECONDS_OF_SILENCE else None

    def _take(self) -> None:
        content = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            "run": self.seat.run,
            "world_size": self.seat.world_size,
        }
        try:
            handle = atomic.open_lock(self._path)
            try:
                atomic.lock(handle)
                atomic.write(handle, memoryview(f"{json.dumps(content)}\n".encode()))
            except BaseException:
                os.close(handle)
                raise
        except OSError as error:
            raise _explain(error, self._path) from error
        stop = threading.Event()
        beats = threading.Thread(target=_beat, args=(handle, stop), daemon=True, name="writer's lock")
        beats.start()
        self._handle = handle
        leave = _Leave(self.folder, self._path, handle, stop, beats, os.getpid())
        self._finalizer = weakref.finalize(self, leave, self.seat.world_size == 1)


_held: "weakref.WeakValueDictionary[tuple[int, Path, Seat], WriterLock]" = weakref.WeakValueDictionary()


def lock_of(folder: Path, seat: Seat) -> WriterLock:
    """The lock of this process for a seat: one object, however many writers ask for it."""
    key = (os.getpid(), folder.resolve(), seat)
    found = _held.get(key)
    if found is None:
        found = _held[key] = WriterLock(folder, seat)
    return found


@contextmanager
def holding(folder: Path, seat: Seat = ALONE) -> Iterator[WriterLock]:
    """Keep other runs out of ``folder``, which is made if need be, while what belongs to its cache is made elsewhere.

    `CacheError` if another run is at work there, or nothing can be written there.
    """
    atomic.make_folder(folder)
    lock = lock_of(folder, seat)
    lock.enter(lambda: None)
    try:
        yield lock
    finally:
        lock.leave(is_done=True)


def require_free(folder: Path, seat: Seat = ALONE) -> None:
    """`CacheError` if another run is surely at work in ``folder``: to be asked before anything costly."""
    lock = lock_of(folder, seat)
    for path in seats(folder):
        holder = read_holder(path)
        if holder is not None and (holder.run != seat.run or holder.rank == seat.rank) and lock._lives(path, holder):
            raise held(folder, holder, path)


def read_holder(path: Path) -> Holder | None:
    """What the file of a seat says; None if there is none."""
    rank = int(path.name.split(".")[1])
    try:
        with path.open("rb") as file:
            lines = file.read(MAX_SEAT_BYTES).split(b"\n")
    except OSError:
        return None
    try:
        content = json.loads(lines[0])
        return Holder(
            rank,
            str(content["run"]),
            str(content["host"])[:255],
            int(content["pid"]),
            str(content["since"])[:64],
            tuple(line.decode() for line in lines[1:-1]),
        )
    except (ValueError, KeyError, TypeError):
        return Holder(rank)


def held(folder: Path, holder: Holder, path: Path) -> CacheError:
    """The refusal of a second run."""
    return CacheError(
        f"{folder} is being written by another run: {holder}. Wait until it is done, stop it, or choose another "
        f"--output-dir. If you know that it is gone, delete {path}."
    )


def _append(handle: int, line: str) -> None:
    os.lseek(handle, 0, os.SEEK_END)
    atomic.write(handle, memoryview(f"{line}\n".encode()))


def _forget_dead(folder: Path) -> None:
    """Delete the seats of writers that are surely gone."""
    for path in seats(folder):
        holder = read_holder(path)
        if holder is None:
            continue
        is_of_here = holder.run is None or LEFT in holder.marks or holder.host == socket.gethostname()
        if is_of_here and not atomic.is_locked(path):
            atomic.remove(path)


def seats(folder: Path) -> list[Path]:
    """The files of all seats in ``folder``, those of dead writers among them."""
    return sorted(path for path in folder.glob("writer.*.lock") if layout.SEAT.fullmatch(path.name))


@contextmanager
def _door(folder: Path, *, seconds: float = SECONDS_AT_THE_DOOR) -> Iterator[None]:
    """Hold the folder's door: one process at a time is inside. `CacheError` after ``seconds`` of waiting."""
    path = folder / layout.DOOR
    handle = _open_door(path, seconds)
    try:
        yield
    finally:
        try:
            if not seats(folder):
                atomic.remove(path)
        finally:
            os.close(handle)


def _open_door(path: Path, seconds: float) -> int:
    until = time.monotonic() + seconds
    pause = 0.001
    while True:
        try:
            handle = atomic.open_lock(path)
            if atomic.try_lock(handle):
                # The last one may have taken the file away between the two calls; nobody else meets at this one.
                if atomic.is_at(handle, path):
                    return handle
                pause = 0.0
            os.close(handle)
        except OSError as error:
            raise _explain(error, path) from error
        if time.monotonic() > until:
            raise CacheError(
                f"{path} is held by another process for more than {seconds:.0f} seconds, though nobody "
                f"needs it for long: see what the other writers of this folder are doing."
            )
        time.sleep(pause)
        pause = min(0.5, 2 * pause + 0.001)


def _beat(handle: int, stop: threading.Event) -> None:
    while not stop.wait(SECONDS_BETWEEN_BEATS):
        try:
            atomic.touch(handle)
        except OSError:
            continue  # a file server that is away for a moment; others judge by the next beat


@dataclass(frozen=True)
class _Leave:
    """Gives a seat back; called once, at the latest when the process ends."""

    folder: Path
    path: Path
    handle: int
    stop: threading.Event
    beats: threading.Thread
    pid: int

    def __call__(self, is_done: bool) -> None:
        if os.getpid() != self.pid:
            return  # a fork: the seat is its parent's
        self.stop.set()
        self.beats.join()
        try:
            if not is_done:
                _append(self.handle, LEFT)
            elif atomic.is_at(self.handle, self.path):
                # First the seat, then the door: whoever is inside meanwhile takes the door's file away instead.
                atomic.remove(self.path)
                with _door(self.folder, seconds=SECONDS_TO_LEAVE):
                    _forget_dead(self.folder)
        except (CacheError, OSError):
            pass  # the next run finds a seat whose process is gone
        finally:
            os.close(self.handle)


def _explain(error: OSError, path: Path) -> CacheError:
    if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        return CacheError(
            f"the file system of {path.parent} has no file locks (flock), so nothing would keep two runs apart. Mount "
            f"it with them, or write the cache to another --output-dir and copy it."
        )
    return atomic.explain(error, path, 0)

"""Writing to a remote folder: whatever fails or dies on the way, readers see no cache or the whole one."""

import hashlib
import json
import os
import runpy
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from distilllens_cache import (
    CacheError,
    CacheReader,
    Spool,
    atomic,
    open_folder,
    remote_folder,
    remote_lock,
    verify_cache,
)
from distilllens_cache.download import Download
from distilllens_cache.remote_cache import RemoteCache
from distilllens_cache.remote_files import RemoteFiles
from distilllens_cache.remote_lock import RemoteLock
from distilllens_cache.upload import Upload

TinyCache: Any = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_cache_v1.py"))["TinyCache"]
ARGUMENTS: dict[str, Any] = {"store_tail": "profile+sketch:4+sampled:3", "more": {"calibration_targets": 9}}
SMALL: dict[str, Any] = {"store_tail": {2: "profile", 4: "profile+sketch:4"}, "more": {"calibration_targets": 9}}
STEP = int(os.environ.get("DISTILLLENS_TEST_STEP", "5"))
"""Of the remote operations, every fifth is made to fail. With 1 it is each of them."""


class Killed(BaseException):
    """The end of the process."""


class Flaky(MemoryFileSystem):
    """A store of this process whose N-th operation fails, with all later ones, or kills the process that asks."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    count = 0
    fails_at: int | None = None
    kills_at: int | None = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("flaky://"))

    @classmethod
    def step(cls) -> None:
        cls.count += 1
        if cls.kills_at is not None and cls.count >= cls.kills_at:
            raise Killed
        if cls.fails_at is not None and cls.count >= cls.fails_at:
            raise ConnectionResetError("reset by peer")

    @classmethod
    def heal(cls) -> None:
        cls.count, cls.fails_at, cls.kills_at = 0, None, None

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        Flaky.step()
        super().pipe_file(path, value, mode=mode)

    def rm_file(self, path: str) -> None:
        Flaky.step()
        super()._rm(path)

    def find(self, path: str, **kwargs: Any) -> Any:
        Flaky.step()
        return super().find(path, **kwargs)

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        Flaky.step()
        return super().cat_file(path, *args, **kwargs)

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "r" in mode:
            Flaky.step()
        return super().open(path, mode, **kwargs)


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture(scope="module")
def cache() -> Any:
    return TinyCache(num_examples=7, examples_per_shard=3, **ARGUMENTS)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, cache: Any) -> dict[str, bytes]:
    """The files of the cache in a local folder."""
    return files_of(cache.write(tmp_path_factory.mktemp("local") / "cache"))


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(remote_folder, "PAUSES", ())
    monkeypatch.setattr(remote_lock, "SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr(remote_lock, "SECONDS_TO_SETTLE", 0.0)
    monkeypatch.setattr(atomic, "fsync", lambda handle: None)  # no machine dies here, and there are thousands
    monkeypatch.setattr(atomic, "fsync_folder", lambda path: None)
    Flaky.heal()
    Flaky.store.clear()
    yield
    Flaky.heal()


@pytest.fixture
def url() -> str:
    return f"flaky://{uuid.uuid4().hex}/cache"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def remote_files(url: str) -> dict[str, bytes]:
    start = "/" + url.removeprefix("flaky://") + "/"
    return {name.removeprefix(start): file.getvalue() for name, file in Flaky.store.items() if name.startswith(start)}


def damage(url: str, name: str, data: bytes | None) -> None:
    path = "/" + url.removeprefix("flaky://") + "/" + name
    if data is None:
        del Flaky.store[path]
    else:
        fsspec.filesystem("memory").pipe_file("/scratch", data)
        Flaky.store[path] = fsspec.filesystem("memory").store["/scratch"]


def write(
    cache: Any, url: str, staging: Path, *, overwrite: bool = False, append: bool = False, damaged: Sequence[str] = ()
) -> list[str]:
    """What a run of one process does; the files that it put up."""
    files = RemoteFiles(url)
    lock = RemoteLock(files)
    contents = {name: getattr(cache, name) for name in ("identity", "tokenizer_files", "shards")}
    contents["examples"] = cache.planned
    lock.enter()
    try:
        remote = RemoteCache(files, damaged=damaged)
        if not overwrite:
            download = Download(remote, staging)
            download.bring_plan(append=append)
            if download.is_finished(append=append, **contents):
                return []
            download.bring()
        with cache.writer(staging, overwrite=overwrite, append=append) as writer:
            upload = Upload(remote, lock, staging, anew=overwrite)
            upload.push()
            if not writer.finished:
                cache.write_sketches(writer)
                for number in writer.unfinished():
                    cache.write_shards(writer, [number])
                    upload.push()
                writer.finish()
        upload.push_all()
    except Killed:
        lock._stop.set()  # a dead process does not beat
        raise
    finally:
        lock.leave()
    return upload.written


def interrupted(how: str, at: int, work: Any) -> bool:
    """Whether ``work`` did not come to its end, since its N-th remote operation failed or killed it."""
    Flaky.heal()
    setattr(Flaky, how, at)
    told = None
    try:
        work()
    except Killed:
        return True
    except CacheError as caught:
        told = str(caught)
    finally:
        Flaky.heal()
    if told is not None:
        assert "reset by peer" in told
        assert "\n" not in told
    return told is not None


def require_commits_hold(url: str) -> None:
    """Every sidecar that is there names files that are there as it says."""
    files = remote_files(url)
    for name, data in files.items():
        if name.startswith("shards/") and name.endswith(".json"):
            for record in json.loads(data)["shard"], json.loads(data)["shard"]["tails"]:
                assert hashlib.sha256(files.get(record["name"], b"")).hexdigest() == record["sha256"]


def require_right_or_no_cache(url: str, *whole: dict[str, bytes]) -> None:
    """A reader sees one of the ``whole`` caches, or is refused: never anything else."""
    files = remote_files(url)
    require_commits_hold(url)
    if "manifest.json" in files:
        assert any(files | expected == files for expected in whole)


def test_a_remote_cache_has_the_bytes_of_a_local_one(
    cache: Any, local: dict[str, bytes], url: str, tmp_path: Path
) -> None:
    written = write(cache, url, tmp_path / "staging")
    assert remote_files(url) == local
    assert sorted(written) == sorted(local)
    assert written[-1] == "manifest.json"
    assert files_of(tmp_path / "staging") == local
    assert CacheReader(open_folder(url, spool=Spool(tmp_path / "spool")))[3].id == "row-3"


def test_files_go_up_before_what_commits_them(cache: Any, url: str, tmp_path: Path) -> None:
    written = write(cache, url, tmp_path / "staging")
    assert written[0] == "plan.json"
    for number in range(3):
        shard = f"shards/{number:05d}"
        commit = written.index(f"{shard}.json")
        assert all(written.index(f"{shard}{end}") < commit for end in (".arrow", ".tails.arrow", ".tail_rows.arrow"))
    assert max(written.index(name) for name in written if name.startswith("sketches/")) < written.index(
        "shards/00000.arrow"
    )


@pytest.mark.parametrize("same_machine", [True, False])
@pytest.mark.parametrize("how", ["fails_at", "kills_at"])
def test_whatever_operation_fails_the_next_run_finishes_the_same_cache(
    url: str, tmp_path: Path, how: str, same_machine: bool
) -> None:
    cache = TinyCache(num_examples=4, examples_per_shard=2, **SMALL)
    local = files_of(cache.write(tmp_path / "local"))
    at = 2 * same_machine + (how == "fails_at")  # each case takes others of the operations
    while True:
        at += STEP
        Flaky.store.clear()
        first, second = tmp_path / f"{at}", tmp_path / (f"{at}" if same_machine else f"{at}-other")
        if not interrupted(how, at, lambda first=first: write(cache, url, first)):
            break
        require_right_or_no_cache(url, local)
        write(cache, url, second)
        assert remote_files(url) == local
    assert at > 30


@pytest.mark.parametrize("same_machine", [True, False])
@pytest.mark.parametrize("what", ["append", "overwrite"])
def test_a_run_that_replaces_a_whole_cache_leaves_the_old_one_or_none_or_the_new_one(
    url: str, tmp_path: Path, what: str, same_machine: bool
) -> None:
    """An appended cache stays readable until its manifest is replaced; an overwritten one goes at once."""
    old = TinyCache(num_examples=4, examples_per_shard=2, **SMALL)
    new = TinyCache(num_examples=6, examples_per_shard=2, **SMALL, seed=0 if what == "append" else 1)
    expected = files_of(new.write(old.write(tmp_path / "expected"), **{what: True}))
    write(old, url, tmp_path / "old")
    replaced = remote_files(url)
    before = dict(Flaky.store)
    at = 3 * same_machine
    while True:
        at += STEP
        Flaky.store.clear()
        Flaky.store.update(before)
        first, second = tmp_path / f"{at}", tmp_path / (f"{at}" if same_machine else f"{at}-other")
        if not interrupted("kills_at", at, lambda first=first: write(new, url, first, **{what: True})):
            break
        require_right_or_no_cache(url, replaced, expected)
        write(new, url, second, **{what: True})
        assert remote_files(url) == expected
    assert at > 30
    assert remote_files(url) == expected


@pytest.mark.parametrize(
    "name",
    """plan.json index.arrow shards/00001.arrow shards/00001.json sketches/layer_4.arrow tail_sums.arrow manifest.json
    tokenizer/tokenizer.json""".split(),
)
@pytest.mark.parametrize("junk", [b"junk", None, "same size"])
def test_damage_there_is_written_anew(
    cache: Any, local: dict[str, bytes], url: str, tmp_path: Path, name: str, junk: Any
) -> None:
    write(cache, url, tmp_path / "first")
    damage(url, name, bytes(len(local[name])) if junk == "same size" else junk)
    problems = verify_cache(open_folder(url, spool=Spool(tmp_path / "spool"))).problems
    assert [problem.file for problem in problems] == [name] or name in ("plan.json", "manifest.json")
    written = write(cache, url, tmp_path / "second", damaged=[name])
    assert remote_files(url) == local
    assert name in written
    assert not any(one.startswith("shards/00000") for one in written)


def test_an_unfinished_cache_with_a_damaged_shard_goes_on_elsewhere(
    cache: Any, local: dict[str, bytes], url: str, tmp_path: Path
) -> None:
    write(cache, url, tmp_path / "first")
    damage(url, "manifest.json", None)
    damage(url, "shards/00001.arrow", bytes(len(local["shards/00001.arrow"])))
    written = write(cache, url, tmp_path / "second")
    assert remote_files(url) == local
    assert {"shards/00001.arrow", "shards/00001.json"} <= set(written)
    assert "shards/00002.arrow" not in written


def test_a_finished_cache_is_neither_fetched_nor_written_again(
    cache: Any, local: dict[str, bytes], url: str, tmp_path: Path
) -> None:
    write(cache, url, tmp_path / "first")
    assert write(cache, url, tmp_path / "second") == []
    assert not (tmp_path / "second" / "shards").exists()
    assert remote_files(url) == local


def test_two_machines_whose_teachers_differ_do_not_mix_their_shards(cache: Any, url: str, tmp_path: Path) -> None:
    """Each finishes what the other began; whoever comes last has a whole cache there."""
    other = TinyCache(num_examples=7, examples_per_shard=3, **ARGUMENTS, scale=2.0)
    other.planned, other.shards = cache.planned, cache.shards
    for example, ours in zip(other.examples, cache.examples, strict=True):
        object.__setattr__(example, "token_ids", ours.token_ids)
        object.__setattr__(example, "target_positions", ours.target_positions)
    for at in (24, 38):
        Flaky.store.clear()
        here, there = tmp_path / f"{at}-here", tmp_path / f"{at}-there"
        assert interrupted("kills_at", at, lambda here=here: write(cache, url, here))
        require_commits_hold(url)
        interrupted("kills_at", at + 9, lambda there=there: write(other, url, there))
        for again in range(9, 30, 3):
            interrupted("kills_at", again, lambda here=here: write(cache, url, here))
            require_commits_hold(url)
        write(cache, url, here)
        assert verify_cache(open_folder(url, spool=Spool(tmp_path / "spool"))).is_sound


def test_other_files_there_are_left_alone(cache: Any, local: dict[str, bytes], url: str, tmp_path: Path) -> None:
    fsspec.filesystem("flaky").pipe_file(f"{url}/notes.txt", b"mine")
    with pytest.raises(CacheError, match=r"holds something that is not a cache \(notes.txt\); nothing was changed"):
        write(cache, url, tmp_path / "staging")
    assert remote_files(url) == {"notes.txt": b"mine"}
    Flaky.store.clear()
    write(cache, url, tmp_path / "staging")
    fsspec.filesystem("flaky").pipe_file(f"{url}/notes.txt", b"mine")
    write(cache, url, tmp_path / "staging", overwrite=True)
    assert remote_files(url) == local | {"notes.txt": b"mine"}


def test_another_cache_there_is_refused_by_its_field(
    cache: Any, local: dict[str, bytes], url: str, tmp_path: Path
) -> None:
    other = TinyCache(num_examples=7, examples_per_shard=3, **ARGUMENTS, seed=1)
    write(cache, url, tmp_path / "first")
    with pytest.raises(CacheError, match="holds a cache of something else:\n  seed"):
        write(other, url, tmp_path / "second")
    other.write(tmp_path / "third")
    with pytest.raises(CacheError, match=f"third holds another cache than {url} does:\n  seed"):
        write(other, url, tmp_path / "third")
    assert remote_files(url) == local


def test_a_second_run_is_told_who_holds_the_folder(
    cache: Any, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = RemoteFiles(url)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(remote_lock.socket, "gethostname", lambda: "far-away")
        first = RemoteLock(files)
        first.enter()
    second = RemoteLock(files)
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        holder = remote_lock._from_bytes(files.read_if_there("remote.lock", max_bytes=999) or b"")
        files.put("remote.lock", remote_lock._to_bytes(remote_lock.replace(holder, beat=1)))

    with pytest.raises(CacheError, match=f"{url} is being written by another run: process .* on far-away"):
        second.enter(tell)
    assert "far-away" in told[0]
    assert list(remote_files(url)) == ["remote.lock"]
    monkeypatch.setattr(remote_lock, "SECONDS_OF_SILENCE", 0.0)
    second.enter()
    with pytest.raises(CacheError, match="is being written by another run"):
        first.require_held()
    first.leave()
    second.require_held()
    second.leave()
    assert remote_files(url) == {}


def test_a_run_whose_lock_was_taken_writes_nothing_more(cache: Any, url: str, tmp_path: Path) -> None:
    cache.write(tmp_path / "staging")
    files = RemoteFiles(url)
    lock, other = RemoteLock(files), RemoteLock(files)
    lock.enter()
    upload = Upload(RemoteCache(files), lock, tmp_path / "staging")
    other.enter()  # of this process, so the first is taken for gone
    with pytest.raises(CacheError, match="is being written by another run"):
        upload.push()
    assert list(remote_files(url)) == ["remote.lock"]
    lock.leave()
    other.leave()


def test_a_change_that_is_tried_again_looks_first_who_holds_the_folder(
    cache: Any, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two tries lie seconds, in which another run may have begun."""
    cache.write(tmp_path / "staging")
    files = RemoteFiles(url)
    lock, other = RemoteLock(files), RemoteLock(files)
    lock.enter()
    upload = Upload(RemoteCache(files), lock, tmp_path / "staging")
    original = Flaky.pipe_file

    def pipe_file(self: Any, path: str, value: bytes, **kwargs: Any) -> None:
        if path.endswith("plan.json"):
            other.enter()
            raise ConnectionResetError("reset by peer")
        original(self, path, value, **kwargs)

    monkeypatch.setattr(Flaky, "pipe_file", pipe_file)
    monkeypatch.setattr(remote_folder, "PAUSES", (0.0,))
    with pytest.raises(CacheError, match="is being written by another run"):
        upload.push()
    lock.leave()
    other.leave()


class Turns:
    """Lets two threads take their remote operations in the given order, as long as the one whose turn it is can.

    Thread 1 is the slower one: when it goes on, all sleep of thread 0 is over.
    """

    def __init__(self, order: Sequence[int]) -> None:
        self.order = list(order)
        self.here = threading.local()
        self.counts = [0, 0]
        self.wakes_at = 0
        """Thread 1 sleeps until the other one has done so many operations."""
        self.ended: set[int] = set()
        self.busy: int | None = None
        self.changed = threading.Condition()

    def run(self, *works: Callable[[], Any]) -> list[Any]:
        """What each of both gives or raises."""
        found: list[Any] = [None, None]

        def one(number: int) -> None:
            self.here.number = number
            try:
                found[number] = works[number]()
            except CacheError as error:
                found[number] = error
            finally:
                with self.changed:
                    self.ended.add(number)
                    self._pass_on(number)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return found

    def step(self) -> None:
        me = self.here.number
        with self.changed:
            self._pass_on(me)
            assert self.changed.wait_for(lambda: self.busy is None and self._next() == me, timeout=60)
            if self.order and self.order[0] == me:
                del self.order[0]
            self.counts[me] += 1
            self.busy = me

    def sleep(self, seconds: float) -> None:
        """Until the other one surely got through a change that it was at, as it does in seconds."""
        if self.here.number == 1:
            with self.changed:
                self.wakes_at = self.counts[0] + 4
                self._pass_on(1)
                assert self.changed.wait_for(lambda: not self._sleeps(), timeout=60)

    def _pass_on(self, me: int) -> None:
        self.busy = None if self.busy == me else self.busy
        self.changed.notify_all()

    def _sleeps(self) -> bool:
        return 0 not in self.ended and self.counts[0] < self.wakes_at

    def _next(self) -> int:
        able = {0, 1} - self.ended - ({1} if self._sleeps() else set())
        return self.order[0] if self.order and self.order[0] in able else min(able)


def test_of_two_runs_that_take_over_a_dead_one_at_most_one_writes_a_manifest(
    cache: Any, local: dict[str, bytes], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower one is stopped anywhere in the taking over, the faster one anywhere after it."""
    dead = remote_lock._to_bytes(remote_lock.RemoteHolder("dead", 1, "long ago", "dead"))
    folders = [cache.write(tmp_path / name) for name in ("here", "there")]
    manifests: list[str] = []
    original = Flaky.pipe_file

    def pipe_file(self: Any, path: str, value: bytes, **kwargs: Any) -> None:
        original(self, path, value, **kwargs)
        if path.endswith("manifest.json"):
            manifests.append(path)

    def both(order: Sequence[int]) -> tuple[Turns, list[Any]]:
        Flaky.store.clear()
        manifests.clear()
        RemoteFiles(url).put("remote.lock", dead)
        turns = Turns(order)
        with monkeypatch.context() as patch:
            patch.setattr(Flaky, "step", turns.step)
            patch.setattr(Flaky, "pipe_file", pipe_file)
            patch.setattr(remote_lock, "_is_gone", lambda holder: holder.host == "dead")
            patch.setattr(remote_lock, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=turns.sleep))
            return turns, turns.run(*(lambda folder=folder: write(cache, url, folder) for folder in folders))

    total = both([0] * 99)[0].counts[0]
    for of_slower in range(1, 5):
        for of_faster in {*range(0, total, 2 * STEP), *range(total - 12, total)}:
            _, found = both([1] * of_slower + [0] * of_faster + [1] * 99)
            assert len(manifests) == 1, (of_slower, of_faster, found)
            assert local.items() <= remote_files(url).items()
            assert any(not isinstance(one, CacheError) for one in found)


def test_what_arrives_in_part_is_put_again(
    cache: Any, local: dict[str, bytes], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, cut = Flaky.pipe_file, []

    def pipe_file(self: Any, path: str, value: bytes, **kwargs: Any) -> None:
        is_first = path.endswith("00001.arrow") and path not in cut
        cut.append(path)
        original(self, path, value[:-1] if is_first else value, **kwargs)

    monkeypatch.setattr(Flaky, "pipe_file", pipe_file)
    with pytest.raises(CacheError, match=r"shards/00001.arrow in .* could not be written: .* bytes arrived"):
        write(cache, url, tmp_path / "staging")
    write(cache, url, tmp_path / "staging")
    assert remote_files(url) == local


def test_what_disappears_meanwhile_is_found_before_the_manifest(
    cache: Any, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Upload.push

    def push(self: Upload, **kwargs: Any) -> None:
        original(self, **kwargs)
        if (self.staging / "manifest.json").exists():
            damage(url, "shards/00000.arrow", None)

    monkeypatch.setattr(Upload, "push", push)
    with pytest.raises(CacheError, match=r"shards/00000\.arrow in .* is missing, though it was put there"):
        write(cache, url, tmp_path / "staging")
    assert "manifest.json" not in remote_files(url)

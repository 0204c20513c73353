"""Remote folders: read through a spool that is verified, bounded and shared; every failure is one sentence."""

import multiprocessing
import runpy
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from distilllens_cache import CacheError, CacheReader, CacheStream, Spool, open_folder, remote_folder, verify_cache

TinyCache: Any = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_cache_v1.py"))["TinyCache"]
SHARDS = [f"shards/{number:05d}.arrow" for number in range(5)]


@pytest.fixture(scope="module")
def cache() -> Any:
    more = {"calibration_targets": 9}
    return TinyCache(num_examples=9, examples_per_shard=2, store_tail="profile+sketch:4+sampled:3", more=more)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, cache: Any) -> Path:
    return cache.write(tmp_path_factory.mktemp("local") / "cache")


@pytest.fixture
def url(local: Path) -> Iterator[str]:
    """The cache in the memory of this process, under an address of its own."""
    memory, folder = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}/cache"
    memory.put(str(local), folder, recursive=True)
    yield f"memory:/{folder}"
    memory.rm(folder, recursive=True)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was opened at its remote place, by name."""
    found: Counter[str] = Counter()
    memory = type(fsspec.filesystem("memory"))
    original = memory.open

    def counting(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        found[path.partition("/cache/")[2]] += 1
        return original(self, path, *args, **kwargs)

    monkeypatch.setattr(memory, "open", counting)
    monkeypatch.setattr(remote_folder, "PAUSES", (0.0,))
    return found


@pytest.fixture(autouse=True)
def own_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user"


def open_reader(url: str, spool: Spool) -> CacheReader:
    return CacheReader(open_folder(url, spool=spool))


def everything(reader: CacheReader) -> list[Any]:
    examples = [(one.id, one.targets[4].ids.tolist(), one.targets[4].codes.tolist()) for one in reader]
    tails = [values.tolist() for values in reader.tail_sums().values()]
    files = sorted((path.name, path.read_bytes()) for path in reader.tokenizer_folder.rglob("*"))
    sketches = [sketch.basis.tolist() for sketch in reader.sketches().values()]
    return [reader.digest, examples, tails, files, sketches]


def spooled(spool: Spool) -> int:
    return sum(path.stat().st_size for path in (spool.folder / "files").glob("*"))


def test_a_remote_cache_reads_like_a_local_one_and_is_fetched_once(
    local: Path, url: str, fetched: Counter[str], tmp_path: Path
) -> None:
    spool = Spool(tmp_path / "spool")
    expected = everything(CacheReader(local))
    for _ in range(2):
        assert everything(open_reader(url, spool)) == expected
    assert fetched.pop("manifest.json") == 2
    assert set(fetched) >= {"index.arrow", "tail_sums.arrow", *SHARDS}
    assert set(fetched.values()) == {1}


def test_nothing_is_fetched_before_it_is_needed(url: str, fetched: Counter[str], tmp_path: Path) -> None:
    reader = open_reader(url, Spool(tmp_path / "spool"))
    _ = reader[0]
    assert sorted(fetched) == ["index.arrow", "manifest.json", SHARDS[0], "shards/00000.tail_rows.arrow"]


def test_the_spool_stays_within_its_bound_and_drops_what_was_used_longest_ago(
    local: Path, url: str, fetched: Counter[str], tmp_path: Path
) -> None:
    size = max((local / name).stat().st_size for name in SHARDS)
    largest = max(path.stat().st_size for path in local.rglob("*") if path.is_file())
    spool = Spool(tmp_path / "spool", max_bytes=max(3 * size, largest))
    reader = CacheReader(open_folder(url, spool=spool), tail_rows=False)
    for number in (0, 1, 0, 2, 0, 3, 0, 4, 0):
        reader.read_shard(number)
        assert spooled(spool) <= spool.max_bytes
    assert [fetched[name] for name in SHARDS] == [1, 1, 1, 1, 1]
    reader.read_shard(1)
    assert fetched[SHARDS[1]] == 2


def test_a_file_larger_than_the_spool_is_read_and_not_kept(url: str, fetched: Counter[str], tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", max_bytes=1)
    reader = open_reader(url, spool)
    assert [reader.read_shard(0)[0].id for _ in range(2)] == ["row-0", "row-0"]
    assert fetched[SHARDS[0]] == 2
    assert spooled(spool) == 0


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"\0" + data[1:]])
def test_a_damaged_copy_in_the_spool_is_fetched_again(
    url: str, fetched: Counter[str], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    spool = Spool(tmp_path / "spool")
    reader = open_reader(url, spool)
    expected = everything(reader)
    for path in (spool.folder / "files").glob("*"):
        path.write_bytes(damage(path.read_bytes()))
    assert everything(reader) == expected
    assert fetched[SHARDS[0]] == 2
    assert everything(reader) == expected
    assert fetched[SHARDS[0]] == 2


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"\0" + data[1:]])
@pytest.mark.parametrize("times", [1, 2])
def test_a_damaged_download_is_fetched_once_more_and_then_refused_by_name(
    url: str, fetched: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, times: int
) -> None:
    reader = open_reader(url, Spool(tmp_path / "spool"))
    original = remote_folder.RemoteFolder._fetch

    def fetch(self: Any, name: str, max_bytes: int) -> bytes:
        data = original(self, name, max_bytes)
        return damage(data) if name == SHARDS[0] and fetched[name] <= times else data

    monkeypatch.setattr(remote_folder.RemoteFolder, "_fetch", fetch)
    if times == 1:
        assert reader.read_shard(0)[0].id == "row-0"
    else:
        with pytest.raises(CacheError, match=rf"{SHARDS[0]} in memory://.* (bytes|damaged)"):
            reader.read_shard(0)
    assert fetched[SHARDS[0]] == 2


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, times: int) -> list[str]:
    calls: list[str] = []
    memory = type(fsspec.filesystem("memory"))
    original = memory.open

    def fail(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        calls.append(path)
        if len(calls) <= times:
            raise error
        return original(self, path, *args, **kwargs)

    monkeypatch.setattr(memory, "open", fail)
    return calls


class LibraryError(Exception):
    """What libraries behind fsspec raise: no OSError."""


@pytest.mark.parametrize(
    "error", [ConnectionResetError("reset by peer"), LibraryError("no route\nto host"), TimeoutError()]
)
def test_an_outage_is_waited_for_and_then_told_in_one_sentence(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    reader = open_reader(url, Spool(tmp_path / "spool"))
    monkeypatch.setattr(remote_folder, "PAUSES", (0.0, 0.0))
    calls = failing(monkeypatch, error, times=2)
    assert reader.read_shard(0)[0].id == "row-0"
    calls.clear()
    calls = failing(monkeypatch, error, times=99)
    with pytest.raises(CacheError, match=rf"{SHARDS[1]} in memory://.* could not be read: .*network") as caught:
        reader.read_shard(1)
    assert "\n" not in str(caught.value)
    assert len(calls) == 3


def test_what_waiting_does_not_mend_is_told_at_once(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_reader(url, Spool(tmp_path / "spool"))
    calls = failing(monkeypatch, PermissionError("forbidden"), times=99)
    with pytest.raises(CacheError, match=f"{SHARDS[0]} .*forbidden.*credentials"):
        reader.read_shard(0)
    assert len(calls) == 1
    with pytest.raises(CacheError, match=r"nosuch://.*could not be read: Protocol not known"):
        open_reader("nosuch://bucket/cache", Spool(tmp_path / "spool"))
    with pytest.raises(CacheError, match=r"memory://nothing/here has no manifest\.json"):
        open_reader("memory://nothing/here", Spool(tmp_path / "spool"))


def test_a_file_that_is_gone_is_named(url: str, tmp_path: Path) -> None:
    reader = open_reader(url, Spool(tmp_path / "spool"))
    fsspec.filesystem("memory").rm(f"{url}/{SHARDS[3]}")
    with pytest.raises(CacheError, match=f"{SHARDS[3]} is missing in memory://"):
        reader.read_shard(3)


def test_a_spool_that_cannot_be_written_is_told_with_its_flag(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"the spool .*file/spool cannot be written: .*--spool-dir"):
        open_reader(url, Spool(tmp_path / "file" / "spool"))


def _read_all(url: str, spool: Spool, opened: Any) -> None:
    memory = type(fsspec.filesystem("memory"))
    original = memory.open

    def counting(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        opened.put(path.partition("/cache/")[2])
        return original(self, path, *args, **kwargs)

    memory.open = counting
    with CacheStream(open_reader(url, spool), epochs=2) as stream:
        assert len(list(stream)) == 18


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_processes_that_share_a_spool_fetch_every_file_once(url: str, tmp_path: Path) -> None:
    context: Any = multiprocessing.get_context("fork")
    opened, spool = context.Queue(), Spool(tmp_path / "spool")
    children = [context.Process(target=_read_all, args=(url, spool, opened)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    found: Counter[str] = Counter()
    while not opened.empty():
        found[opened.get()] += 1
    assert found.pop("manifest.json") == 3
    assert set(found) >= {"index.arrow", *SHARDS}
    assert set(found.values()) == {1}


def test_what_a_killed_process_left_half_written_goes(url: str, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    (spool.folder / "files").mkdir(parents=True)
    half = spool.folder / "files" / f"{'0' * 64}.tmp-1"
    half.write_bytes(b"half")
    open_reader(url, spool).read_shard(0)
    assert not half.exists()


def test_a_remote_cache_is_verified_like_a_local_one(url: str, tmp_path: Path) -> None:
    report = verify_cache(open_folder(url, spool=Spool(tmp_path / "spool")))
    assert report.is_sound
    memory = fsspec.filesystem("memory")
    memory.pipe(f"{url}/{SHARDS[2]}", b"junk")
    memory.pipe(f"{url}/shards/00003.json", b"junk")
    report = verify_cache(open_folder(url, spool=Spool(tmp_path / "other")))
    assert {problem.file for problem in report.problems} == {SHARDS[2], "shards/00003.json"}
    memory.rm(f"{url}/manifest.json")
    assert verify_cache(url).problems[0].file == "manifest.json"


def test_without_a_choice_the_spool_is_in_the_users_cache_directory(url: str, own_cache_directory: Path) -> None:
    assert CacheReader(url)[3].id == "row-3"
    assert len(list((own_cache_directory / "distilllens" / "spool" / "files").iterdir())) == 3


def test_a_hostile_name_is_not_asked_for(url: str, tmp_path: Path) -> None:
    for name in ("../secret", "/etc/passwd", "a//b", "."):
        with pytest.raises(CacheError, match="no name of a file"):
            open_folder(url, spool=Spool(tmp_path / "spool")).read(name, max_bytes=9)

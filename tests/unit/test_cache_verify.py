"""`verify_cache`: the same report on any number of cores, every bad shard named, progress on the way."""

import runpy
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from distilllens_cache import verify, verify_cache

made = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_cache_v1.py"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings: dict[str, Any] = made["SKETCHED"]
    folder = tmp_path_factory.mktemp("cache") / "cache"
    return made["TinyCache"](num_examples=14, examples_per_shard=2, **settings).write(folder)


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    for path in written.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(written)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path


def damage(folder: Path, *names: str) -> None:
    for name in names:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)


BAD = ("shards/00001.arrow", "shards/00002.json", "shards/00003.tails.arrow", "shards/00006.tail_rows.arrow")


@pytest.mark.parametrize("bad", [(), BAD])
def test_the_report_is_the_same_on_any_number_of_cores(folder: Path, bad: tuple[str, ...]) -> None:
    damage(folder, *bad)
    alone = verify_cache(folder, workers=1)
    assert [problem.file for problem in alone.problems] == list(bad)
    for workers in (2, 3, 16):
        assert verify_cache(folder, workers=workers) == alone


def test_progress_is_told_in_the_order_of_the_shards_and_ends_with_all_bytes(folder: Path) -> None:
    told: dict[int, list[tuple[str, int, int]]] = {1: [], 4: []}
    for workers, calls in told.items():
        report = verify_cache(folder, lambda *call, to=calls: to.append(call), workers=workers)
        assert calls[-1][1] == report.num_bytes == calls[-1][2]
        assert len(calls) == report.files
    assert told[1] == told[4]
    assert [done for _, done, _ in told[4]] == sorted(done for _, done, _ in told[4])


def test_shards_are_checked_at_the_same_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards wait for each other, which one worker would do for ever."""
    both, original = threading.Barrier(2, timeout=60), verify._check_shard

    def check(reader: Any, number: int, **options: Any) -> Any:
        if number < 2:
            both.wait()
        return original(reader, number, **options)

    monkeypatch.setattr(verify, "_check_shard", check)
    assert verify_cache(folder, workers=2).is_sound


def test_no_more_shards_than_workers_are_in_memory_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, original = [], verify._check_shard

    def check(reader: Any, number: int, **options: Any) -> Any:
        begun.append(number)
        return original(reader, number, **options)

    monkeypatch.setattr(verify, "_check_shard", check)
    seen = []

    def progress(name: str, *_: int) -> None:
        if name == "shards/00000.arrow":
            time.sleep(0.05)  # time enough to begin all others
            seen.append(max(begun))

    verify_cache(folder, progress, workers=2)
    assert seen == [1]

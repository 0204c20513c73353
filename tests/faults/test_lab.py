"""The fault lab finds what it looks for: a check taken out of the cache is missed by the trials that rely on it."""

import faulthandler
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distilllens_cache import CacheError, atomic, files, folder, meaning, verify
from faultlab import (
    damage,
    failures,
    forged_arrow,
    forged_json,
    hostile,
    identities,
    kills,
    races,
    surroundings,
    watch,
)
from faultlab.material import Material, files_of, handmade, put_files
from faultlab.outcome import Outcome, Tally
from faultlab.pool import run
from faultlab.seals import resealed
from faultlab.table import ROWS, Bench, Row


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return handmade(tmp_path_factory.mktemp("lab") / "cache", codec="arrow-fp32")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return handmade(tmp_path_factory.mktemp("lab") / "tiny", codec="arrow-fp32", size="tiny")


def strange(number: int) -> Outcome:
    """Trials that die, hang, raise and eat memory."""
    faulthandler.disable()  # the death is meant
    if number == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 2:
        time.sleep(60)
    if number == 3:
        raise KeyError("x")
    if number == 4:
        bytearray(1 << 30)
    return Outcome("fine")


def test_a_trial_that_dies_hangs_raises_or_eats_memory_is_a_fault_and_the_others_go_on() -> None:
    tally = run(strange, range(7), workers=2, memory_mb=300, seconds=2)
    assert tally.counts == {"fine": 3, "crashed": 2, "raised": 2}
    assert tally.num_faults == 4
    text = "\n".join(tally.faults)
    assert all(word in text for word in ("signal 11", "nothing heard for 2 s", "KeyError", "MemoryError"))


def test_no_trial_starts_after_the_time_is_over() -> None:
    assert run(strange, range(7), until=time.monotonic() - 1).trials == 0


def test_a_replay_gives_the_bytes_of_the_cache(cache: Path, tmp_path: Path) -> None:
    Material.of(cache).write(tmp_path / "again", order=random.Random(0))
    assert files_of(tmp_path / "again") == files_of(cache)


REPLAYED = [
    row for row in ROWS if row.name.startswith(("kill -9 at", "failing", "disk full", "races", "determinism: hash"))
]


@pytest.mark.parametrize("row", REPLAYED, ids=lambda row: row.name)
def test_disturbed_writers_replay_the_cache_that_is_given(cache, tmp_path, monkeypatch, row: Row) -> None:
    trials = []
    monkeypatch.setattr(failures, "may_mount", lambda scratch: True)
    monkeypatch.setattr(Bench, "run", lambda bench, trial, numbers, **_: trials.append(trial) or Tally())
    bench = Bench(tmp_path, more=[cache])
    row.run(bench, 1)
    assert [trial.cache for trial in trials] == [cache]
    assert bench.used == {cache.name}


def test_resealed_files_are_sound_again(cache: Path, tmp_path: Path) -> None:
    original = files_of(cache)
    copy = damage.Copy(cache, tmp_path)
    changes = resealed(original, {"index.arrow": original["index.arrow"] + b"\0" * 8})
    assert {"manifest.json", "plan.json", "shards/00001.json", "sketches/layer_4.json"} < changes.keys()
    for name, data in changes.items():
        (copy.folder / name).write_bytes(data)
    problems = verify.verify_cache(copy.folder).problems
    assert [problem.file for problem in problems] == ["index.arrow"]
    assert "no Arrow file" in problems[0].what


def test_what_lies_beside_a_cache_is_not_harmed(cache: Path, tmp_path: Path) -> None:
    beside = {"README.md": b"about these targets", "config.resolved.yaml": b"top_k: 4"}
    folder = put_files(tmp_path / "cache", files_of(cache) | beside)
    assert damage.Copy(folder, tmp_path / "copy").files == files_of(cache)


def test_the_script_keeps_what_it_found_and_does_not_do_it_again(tmp_path: Path) -> None:
    script = [sys.executable, str(Path(__file__).parents[2] / "scripts" / "faults.py")]
    run_it = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, check=True)
    first = run_it([*script, "--trials", "2", "--rows", "appended junk"])
    assert "| bursts: appended junk | handmade | 2 | 0 | 0 | 2 refused |" in first.stdout
    again = run_it([*script, "--trials", "2", "--rows", "appended junk"])
    assert (again.stdout, again.stderr) == (first.stdout, "")
    assert len((tmp_path / "faults.jsonl").read_text().splitlines()) == 1


def found(tally: Tally, *words: str) -> bool:
    return tally.num_faults > 0 and any(word in tally.counts for word in words)


def without_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(folder: Path, record: Any, *, max_bytes: int) -> bytes:
        return files.read_plain(folder, record.name, max_bytes=max_bytes)

    monkeypatch.setattr(files, "read_recorded", read)


def test_a_reader_without_digests_is_found_out_by_flips(cache, tmp_path, monkeypatch) -> None:
    without_digests(monkeypatch)
    assert found(run(damage.Damage([cache], damage.flip, 0, tmp_path), range(40)), "silent", "not named")


def test_a_writer_that_is_not_atomic_is_found_out_by_kills(cache, tmp_path, monkeypatch) -> None:
    trial = kills.KillsAtCalls(cache, 0, tmp_path)

    def write_file(path: Path, data: bytes) -> None:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(handle, data)
        os.close(handle)

    monkeypatch.setattr(atomic, "write_file", write_file)
    points = [n for n, (start, nth, moment) in enumerate(trial.points) if start == "nothing" and 2 < nth < 8]
    assert run(trial, points, memory_mb=4096).num_faults > 0


def test_an_error_that_is_not_explained_is_found_out_by_failing_calls(cache, tmp_path, monkeypatch) -> None:
    trial = failures.FailingCalls(cache, 0, tmp_path)
    monkeypatch.setattr(atomic, "explain", lambda error, path, num_bytes: error)
    points = [n for n, (start, nth, error, _) in enumerate(trial.points) if (start, error) == ("nothing", "EIO")]
    assert found(run(trial, points[4:10], memory_mb=4096), "raised")


def test_short_writes_that_are_taken_for_whole_are_found_out(cache, tmp_path, monkeypatch) -> None:
    trial = failures.FailingCalls(cache, 0, tmp_path)
    original = atomic.write
    monkeypatch.setattr(atomic, "write", lambda handle, data: (original(handle, data), len(data))[1])
    points = [n for n, (start, _, error, _) in enumerate(trial.points) if (start, error) == ("nothing", "short")]
    assert run(trial, points[:10], memory_mb=4096).num_faults > 0


def test_an_identity_that_is_not_compared_is_found_out(cache, tmp_path, monkeypatch) -> None:
    from distilllens_cache import writer

    trial = identities.OtherIdentities(cache, 0, tmp_path)
    assert {name for name, _ in trial.neighbours} == set(identities.Identity.model_fields)
    module = next(m for m in (sys.modules.get("distilllens_cache.resume"), writer) if hasattr(m, "compare_identity"))
    original = module.compare_identity
    monkeypatch.setattr(module, "compare_identity", lambda *a: [t for t in original(*a) if not t.startswith("seed")])
    seeds = [number for number, (name, _) in enumerate(trial.neighbours) if name == "seed"]
    assert found(run(trial, seeds), "silent")


def _changed_values(rng: random.Random, original: dict[str, bytes]) -> dict[str, bytes]:
    name = "shards/00000.arrow"
    return {name: forged_arrow.values_changed(rng, original[name])}


def test_targets_that_make_no_sense_are_found_out_by_forged_shards(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(meaning, "first_repeat", lambda *a, **k: None)
    tally = run(hostile.Forged((tiny,), _changed_values, 0, tmp_path), range(60))
    assert found(tally, "nonsense", "raised", "disagree")


def test_an_exception_of_another_type_is_found_out_by_forged_manifests(tiny, tmp_path, monkeypatch) -> None:
    def unseal(data: bytes, *, name: str) -> bytes:
        import json

        json.loads(data)
        return data

    from distilllens_cache import manifest

    monkeypatch.setattr(manifest, "unseal", unseal)
    assert found(run(hostile.Forged((tiny,), forged_json.forged_json, 0, tmp_path), range(40)), "raised")


def test_links_that_are_followed_are_found_out(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files.stat, "S_ISDIR", lambda mode: True)
    monkeypatch.setattr(files.os, "O_NOFOLLOW", 0)
    monkeypatch.setattr(files.stat, "S_ISREG", lambda mode: True)
    trial = hostile.Trapped((tiny,), hostile.no_forgery, 0, tmp_path)
    assert run(trial, range(30), seconds=10).num_faults > 0


def test_a_watch_sees_code_run_files_written_and_files_opened_outside(tmp_path: Path) -> None:
    seen = []
    assert run(lambda number: seen.append(number) or Outcome(str(watch.catches(tmp_path))), [0]).counts == {"True": 1}


def test_a_cache_that_depends_on_its_surroundings_is_found_out(cache, tmp_path, monkeypatch) -> None:
    code = surroundings.CODE + "import os; Path(sys.argv[1], 'index.arrow').write_text(os.environ['TZ'])"
    monkeypatch.setattr(surroundings, "CODE", code)
    assert surroundings.Surroundings(cache, 0, tmp_path)(0).fault


def test_writers_that_ruin_each_others_files_are_found_out_by_races(cache, tmp_path, monkeypatch) -> None:
    def clear(path: Path, **_: Any) -> None:
        raise FileNotFoundError(path)

    trial = races.Races(cache, 0, tmp_path)
    monkeypatch.setattr(folder, "clear", clear)
    assert found(run(trial, range(2), memory_mb=4096), "raised")


def test_refusals_that_name_no_file_are_found_out(cache, tmp_path, monkeypatch) -> None:
    checked = files.read_recorded

    def read(folder: Path, record: Any, *, max_bytes: int) -> bytes:
        try:
            return checked(folder, record, max_bytes=max_bytes)
        except CacheError:
            raise CacheError("something is wrong") from None

    monkeypatch.setattr(files, "read_recorded", read)
    copy = damage.Copy(cache, tmp_path)
    assert copy.judge({"shards/00000.arrow": b"x"}).what == "not named"

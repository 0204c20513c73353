"""Several ranks, several devices, several goes: one cache, with the bytes of a single undisturbed pass."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distilllens import device_map, free_space, ranks
from distilllens.cache_teacher import run_cache_teacher, write_cache
from distilllens.config import APPEND_DATASET, CacheTeacherConfig, load_config
from distilllens.free_space import NoSpaceError
from distilllens.pass_plan import Plan, open_plan
from distilllens.ranks import Ranks, ranks_of_environment
from distilllens_cache import CacheError, CacheReader, Seat, verify_cache

SETTINGS: dict[str, Any] = {
    "layers": "2",
    "top_k": "16",
    "max_length": 300,
    "examples_per_shard": 3,
    "batch_tokens": 600,
    "store_tail": "final=profile+sketch:8,lens=profile+sampled:4",
    "calibration_targets": 60,
}


@pytest.fixture(scope="module")
def teacher(tiny_model_folder) -> Path:
    return tiny_model_folder("llama")


@pytest.fixture(scope="module")
def rows(tmp_path_factory, tiny_rows, write_jsonl) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny_rows)


@pytest.fixture(scope="module")
def alone(teacher, rows, tmp_path_factory) -> dict[str, bytes]:
    """The files of a cache that one process wrote."""
    return files_of(run_cache_teacher(config_of(teacher, rows, tmp_path_factory.mktemp("alone") / "cache")))


def config_of(teacher: Path, rows: Path, folder: Path, **settings: Any) -> CacheTeacherConfig:
    return CacheTeacherConfig(teacher=str(teacher), dataset=str(rows), output_dir=folder, **(SETTINGS | settings))


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of the cache; the copy of the run's config names the folder itself and is left out."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "config.resolved.yaml")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def start(plan: Plan, rank: Ranks) -> str | Path | BaseException:
    try:
        return write_cache(plan, rank)
    except (Exception, KeyboardInterrupt) as error:  # or the other ranks would wait for this one
        return error


def run_ranks(config: CacheTeacherConfig, world_size: int, tmp_path: Path, *, stop: int | None = None) -> list[Any]:
    """What becomes of each rank, a thread with a teacher of its own; rank ``stop`` is stopped at its second shard.

    Two passes over one example come before, to see whether they agree.
    """
    plans = [open_plan(config, tmp_path / f"tokenizer-{rank}") for rank in range(world_size)]
    if stop is not None:
        passes: list[object] = []

        def run_once(*args: Any, run: Any = plans[stop].teacher.__class__.run, **settings: Any) -> Any:
            passes.append(None)
            if len(passes) == 4:
                raise KeyboardInterrupt
            return run(*args, **settings)

        interrupted = type("Interrupted", (plans[stop].teacher.__class__,), {"run": run_once})
        object.__setattr__(plans[stop], "teacher", interrupted(**vars(plans[stop].teacher)))
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda rank: start(plans[rank], Ranks(rank, world_size, "one")), range(world_size)))


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_cache_has_the_same_bytes_from_any_number_of_ranks(
    teacher, rows, alone, tmp_path, capsys, world_size: int
) -> None:
    config = config_of(teacher, rows, tmp_path / "cache")
    assert run_ranks(config, world_size, tmp_path) == [tmp_path / "cache"] * world_size
    assert files_of(tmp_path / "cache") == alone
    assert len(capsys.readouterr().out.splitlines()) == 1  # the main rank's
    assert run_ranks(config, world_size, tmp_path) == [tmp_path / "cache"] * world_size
    assert "nothing to do" in capsys.readouterr().out


def test_what_a_rank_that_died_left_is_finished_by_another_number_of_ranks(teacher, rows, alone, tmp_path) -> None:
    config = config_of(teacher, rows, tmp_path / "cache")
    first, second = run_ranks(config, 2, tmp_path, stop=1)
    assert isinstance(second, KeyboardInterrupt)
    assert "rank 1 stopped, so rank 0 waits in vain for them to write their shards" in str(first)
    assert not (tmp_path / "cache" / "manifest.json").exists()
    assert run_ranks(config, 3, tmp_path) == [tmp_path / "cache"] * 3
    assert files_of(tmp_path / "cache") == alone


def test_ranks_that_begin_anew_delete_nothing_of_each_other(teacher, rows, alone, tmp_path) -> None:
    run_cache_teacher(config_of(teacher, rows, tmp_path / "cache", seed=3))
    config = config_of(teacher, rows, tmp_path / "cache", overwrite=True)
    assert run_ranks(config, 2, tmp_path) == [tmp_path / "cache"] * 2
    assert files_of(tmp_path / "cache") == alone


def test_a_rank_that_never_comes_is_not_awaited_for_ever(teacher, rows, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(ranks, "SECONDS_TO_COME", 0.2)
    monkeypatch.setattr(ranks, "SECONDS_IN_SILENCE", 0.0)
    plan = open_plan(config_of(teacher, rows, tmp_path / "cache", store_tail="none"), tmp_path / "tokenizer")
    with pytest.raises(CacheError, match=r"rank 1 of 2 did not come within 0 minutes.*RANK is each number from 0 to 1"):
        write_cache(plan, Ranks(0, 2, "one"))
    assert "Rank 0 waits for rank 1 to begin" in capsys.readouterr().err


def test_a_folder_in_use_is_refused_before_the_teacher_is_opened(rows, tmp_path, monkeypatch) -> None:
    plan = {"teacher": "nowhere", "dataset": str(rows), "output_dir": tmp_path}
    (tmp_path / "writer.0.lock").write_text(
        json.dumps({"host": socket.gethostname(), "pid": 5, "since": "today", "run": "other"}) + "\n"
    )
    with (tmp_path / "writer.0.lock").open("r+") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CacheError, match=r"written by another run: process 5 on .*, at work since today"):
            run_cache_teacher(CacheTeacherConfig(**plan))
    with pytest.raises(ValueError, match="nowhere"):
        run_cache_teacher(CacheTeacherConfig(**plan))


def test_the_rank_is_the_launchers(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", *ranks.RUN_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    assert ranks_of_environment().seat == Seat()
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    by_hand = ranks_of_environment()
    assert (by_hand.rank, by_hand.world_size) == (1, 2)
    monkeypatch.setenv("MASTER_PORT", "29501")
    assert ranks_of_environment().run != by_hand.run


def test_ranks_by_hand_that_lack_a_variable_are_a_sentence(tmp_path, monkeypatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"RANK=0, WORLD_SIZE=2; not set: MASTER_ADDR, MASTER_PORT\. Start with"):
        run_cache_teacher(CacheTeacherConfig(teacher="nowhere", dataset="nothing", output_dir=tmp_path / "cache"))


@pytest.mark.slow
def test_torchrun_starts_the_ranks(teacher, rows, alone, tmp_path) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "distilllens",
        "cache-teacher",
    ]
    paths = [f"--teacher={teacher}", f"--dataset={rows}", f"--output-dir={tmp_path / 'cache'}"]
    done = subprocess.run(
        [sys.executable, *command, *paths, *flags], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("24 examples") == 1
    assert files_of(tmp_path / "cache") == alone


SPREAD = {
    "model.embed_tokens": "disk",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "cpu",
    "model.layers.3": "disk",
    "model.norm": "disk",
    "lm_head": "disk",
}


@pytest.mark.parametrize("places", ["auto", json.dumps(SPREAD)], ids=["auto", "parts"])
def test_a_teacher_spread_over_devices_gives_the_same_cache(teacher, rows, alone, tmp_path, places: str) -> None:
    pytest.importorskip("accelerate")
    run_cache_teacher(config_of(teacher, rows, tmp_path / "cache", device_map=places))
    assert files_of(tmp_path / "cache") == alone


def test_a_device_map_that_cannot_be_is_a_sentence(teacher, rows, tmp_path, monkeypatch) -> None:
    def run(**settings: Any) -> None:
        run_cache_teacher(config_of(teacher, rows, tmp_path / "cache", **settings))

    for text in ("everywhere", "[1]", "{}", '{"lm_head": null}'):
        with pytest.raises(ValueError, match="expected auto, balanced, balanced_low_0, sequential, or parts"):
            run(device_map=text)
    with pytest.raises(ValueError, match="--device cpu and --device-map auto: give one of them"):
        run(device_map="auto", device="cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="each of 4 ranks on this machine"):
        run(device_map="auto")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(device_map.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package accelerate: pip install 'distilllens\[large\]'"):
        device_map.require_device_map("auto")
    assert not (tmp_path / "cache").exists()


def test_a_device_map_in_yaml_is_a_mapping(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("teacher: t\ndataset: d\noutput_dir: o\ndevice_map:\n  model: 0\n  lm_head: cpu\n")
    config = load_config(CacheTeacherConfig, file=file, flags={})
    assert config.device_map is not None
    assert device_map.parse_device_map(config.device_map) == {"model": 0, "lm_head": "cpu"}


@pytest.fixture
def halves(tmp_path, tiny_rows, write_jsonl) -> tuple[Path, Path]:
    """The rows in two files; the first half fills whole shards."""
    return write_jsonl(tmp_path / "old.jsonl", tiny_rows[:12]), write_jsonl(tmp_path / "new.jsonl", tiny_rows[12:])


def test_rows_of_another_file_are_added(teacher, rows, halves, tmp_path, capsys) -> None:
    old, new = halves
    run_cache_teacher(config_of(teacher, old, tmp_path / "cache"))
    before = files_of(tmp_path / "cache")
    run_cache_teacher(config_of(teacher, old, tmp_path / "cache", append=str(new)))
    reader = CacheReader(tmp_path / "cache")
    assert reader.ids == [str(n) for n in range(12)] + [f"new.jsonl:{n}" for n in range(12)]
    assert verify_cache(tmp_path / "cache").is_sound
    after = files_of(tmp_path / "cache")
    kept = [name for name in before if name.startswith(("shards/", "sketches/")) and name.endswith(".arrow")]
    assert all(after[name] == before[name] for name in kept)
    capsys.readouterr()
    run_cache_teacher(config_of(teacher, old, tmp_path / "cache", append=str(new)))
    assert "nothing to do" in capsys.readouterr().out
    assert files_of(tmp_path / "cache") == after


def test_a_dry_run_of_an_append_tells_what_is_added_and_writes_nothing(
    teacher, rows, halves, tmp_path, capsys, monkeypatch
) -> None:
    old, new = halves

    def told(**settings: Any) -> dict[str, str]:
        capsys.readouterr()
        run_cache_teacher(config_of(teacher, old, tmp_path / "cache", dry_run=True, append=str(new), **settings))
        return {line[:19].strip(): line[19:] for line in capsys.readouterr().out.splitlines()}

    with pytest.raises(CacheError, match="holds no cache to add examples to"):
        told()
    before = run_cache_teacher(config_of(teacher, old, tmp_path / "cache"))
    files = files_of(before)
    with pytest.raises(CacheError, match="top_k: cache has"):
        told(top_k="8")
    lines = told()
    with monkeypatch.context() as full:
        full.setattr(free_space.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
        with pytest.raises(NoSpaceError):  # the old rows' bytes are no room for the new
            told()
    assert files_of(before) == files
    run_cache_teacher(config_of(teacher, old, tmp_path / "cache", append=str(new)))
    growth = sum(map(len, files_of(before).values())) - sum(map(len, files.values()))
    shards = CacheReader(before).manifest.shards[4:]
    assert lines["rows"] == "12 more, after 12 in the cache"
    assert lines["shards"] == f"{len(shards)}"
    assert lines["target positions"] == f"{sum(shard.num_targets for shard in shards)}"
    size, unit, more, *_ = lines["bytes"].removeprefix("about ").split()
    assert (unit, more) == ("kB", "more")
    assert float(size) * 1000 == pytest.approx(growth, rel=0.4)
    run_cache_teacher(config_of(teacher, old, tmp_path / "cache", append=str(new), dry_run=True))
    assert "holds all 24 rows already: nothing to add" in capsys.readouterr().out


def test_a_dataset_that_grew_gives_the_cache_of_the_whole(teacher, rows, halves, tmp_path) -> None:
    settings = {"store_tail": "profile"}  # a sketch would be fitted to other rows
    old = halves[0]
    run_cache_teacher(config_of(teacher, old, tmp_path / "cache", **settings))
    old.write_bytes(rows.read_bytes())
    with pytest.raises(CacheError, match="--append adds the others"):
        run_cache_teacher(config_of(teacher, old, tmp_path / "cache", **settings))
    config = config_of(teacher, old, tmp_path / "cache", append=APPEND_DATASET, **settings)
    assert run_ranks(config, 2, tmp_path) == [tmp_path / "cache"] * 2
    run_cache_teacher(config_of(teacher, rows, tmp_path / "whole", **settings))
    assert files_of(tmp_path / "cache") == files_of(tmp_path / "whole")


def test_a_cache_that_grew_beyond_a_shard_that_was_not_full_is_what_its_dataset_makes(
    teacher, rows, halves, tmp_path, capsys
) -> None:
    settings = {"store_tail": "none", "examples_per_shard": 5}
    old, new = halves
    run_cache_teacher(config_of(teacher, old, tmp_path / "cache", **settings))
    old.write_text(old.read_text() + new.read_text())
    run_cache_teacher(config_of(teacher, old, tmp_path / "cache", append=APPEND_DATASET, **settings))
    assert [shard.num_examples for shard in CacheReader(tmp_path / "cache").manifest.shards] == [5, 5, 2, 5, 5, 2]
    capsys.readouterr()
    run_cache_teacher(config_of(teacher, old, tmp_path / "cache", **settings))
    assert "nothing to do" in capsys.readouterr().out


def test_another_teacher_cannot_add_rows(teacher, tiny_model_folder, halves, tmp_path) -> None:
    old, new = halves
    run_cache_teacher(config_of(teacher, old, tmp_path / "cache", store_tail="none"))
    before = files_of(tmp_path / "cache")
    other = tiny_model_folder("llama", seed=5)
    with pytest.raises(CacheError, match="teacher_digest: cache has"):
        run_cache_teacher(config_of(other, old, tmp_path / "cache", store_tail="none", append=str(new)))
    with pytest.raises(ValueError, match="--append adds to the cache that --overwrite deletes"):
        config_of(teacher, old, tmp_path / "cache", append=str(new), overwrite=True)
    assert files_of(tmp_path / "cache") == before

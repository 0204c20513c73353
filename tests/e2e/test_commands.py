"""The commands as a user types them: exit codes, sentences, no tracebacks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def distilllens(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distilllens", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_folder, tiny_rows, write_jsonl) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    (folder / "teacher").symlink_to(tiny_model_folder("llama"))
    write_jsonl(folder / "rows.jsonl", tiny_rows)
    flags = ["--layers", "2", "--top-k", "8", "--max-length", "300", "--examples-per-shard", "4", "--device", "cpu"]
    done = distilllens(
        "cache-teacher", "--teacher", "teacher", "--dataset", "rows.jsonl", *flags, "--output-dir", "cache", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_whole_way_in_four_commands(folder: Path) -> None:
    made = distilllens("new-student", "--from", "teacher", "--layers", 2, "--output-dir", "student", cwd=folder)
    assert made.returncode == 0, made.stderr
    trained = distilllens(
        "train", "--student", "student", "--cache", "cache", "--output-dir", "run", "--max-steps", 2, cwd=folder
    )
    assert trained.returncode == 0, trained.stderr
    assert "Self-check passed" in trained.stderr
    checked = distilllens("inspect", "verify", "cache", cwd=folder)
    assert checked.returncode == 0, checked.stderr
    scored = distilllens(
        "evaluate", "--model", "student,run", "--cache", "cache", "--device", "cpu", "--output-dir", "out", cwd=folder
    )
    assert scored.returncode == 0, scored.stderr
    assert (folder / "out" / "results.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["cache-teacher", "--teacher", "teacher", "--output-dir", "x"], 1, "dataset: is required: give --dataset"),
        (["cache-teacher", "--teachr", "t"], 2, "No such option"),
        (["train", "--student", "teacher", "--cache", "rows.jsonl", "--output-dir", "x"], 1, "rows.jsonl"),
        (["train", "--config", "absent.yaml"], 1, "absent.yaml is not a file"),
        (["inspect", "summary", "absent"], 2, "absent"),
        (["new-student", "--from", "teacher", "--layers", "99", "--output-dir", "x"], 1, "99"),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_bad_input_is_one_sentence_and_an_exit_code(folder: Path, arguments: list, code: int, words: str) -> None:
    done = distilllens(*arguments, cwd=folder)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "x").exists()


def test_a_flipped_shard_fails_verification_with_code_3(folder: Path, tmp_path) -> None:
    import shutil

    copy = shutil.copytree(folder / "cache", tmp_path / "cache")
    shard = copy / "shards" / "00001.arrow"
    data = bytearray(shard.read_bytes())
    data[100] ^= 16
    shard.write_bytes(bytes(data))
    done = distilllens("inspect", "verify", copy, cwd=tmp_path)
    assert done.returncode == 3
    assert "shards/00001.arrow" in done.stdout + done.stderr


def test_training_stopped_by_a_signal_saves_and_exits_130(folder: Path) -> None:
    command = [sys.executable, "-m", "distilllens", "train", "--student", "teacher", "--cache", "cache"]
    command += ["--output-dir", "stopped", "--max-steps", "100000", "--logging-steps", "1", "--device", "cpu"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        metrics = folder / "stopped" / "metrics.jsonl"
        for _ in range(600):
            if metrics.exists() and metrics.read_text().count("\n") > 3:
                break
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume-from-checkpoint continues" in errors
    assert len(list((folder / "stopped").glob("checkpoint-*/trainer_state.json"))) == 1


@pytest.mark.parametrize("limit", [20_000, 200_000])
def test_a_full_disk_while_saving_is_one_sentence_and_loses_nothing(folder: Path, tmp_path, limit: int) -> None:
    """A limit on the size of files stands for the full disk: the checkpoint cannot be written beyond it."""
    base = ["train", "--student", "teacher", "--cache", "cache", "--output-dir", tmp_path / "run", "--device", "cpu"]
    base += ["--save-steps", "1", "--max-steps", "2"]
    code = (
        "import resource, sys; from distilllens.cli import main;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *map(str, base)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    again = distilllens(*base, "--resume-from-checkpoint", cwd=folder)
    assert again.returncode == 0, again.stderr

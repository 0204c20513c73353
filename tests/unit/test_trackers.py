"""Trackers get what metrics.jsonl gets, a resumed run goes on in them, and none of them can stop a run."""

import json
from pathlib import Path

import pytest

import distilllens.trackers as trackers_module
from distilllens.trackers import TrackedRun, Tracker, Trackers, check_trackers


def tracked(folder: Path, *, resumed_step: int = 0) -> TrackedRun:
    return TrackedRun(folder, "a-run", {"learning_rate": 0.1}, resumed_step)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: [(one.step, one.value) for one in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_reads_back_every_value_and_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    first = Trackers(("tensorboard",), tracked(tmp_path))
    for step in range(1, 5):
        first.log(step, {"train/loss": 4.0 / step, "eval/kl": float(step)})
    first.close()
    assert scalars(tmp_path)["train/loss"] == [(step, pytest.approx(4.0 / step)) for step in range(1, 5)]
    resumed = Trackers(("tensorboard",), tracked(tmp_path, resumed_step=2))
    for step in (3, 4, 5):
        resumed.log(step, {"train/loss": 10.0 * step})
    resumed.close()
    found = scalars(tmp_path)
    assert found["train/loss"] == [(1, 4.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    assert [step for step, _ in found["eval/kl"]] == [1, 2]


class Failing(Tracker):
    """Works once, then never again."""

    def __init__(self, run: TrackedRun) -> None:
        self.calls = 0

    def log(self, step: int, values: dict[str, float]) -> None:
        self.calls += 1
        if self.calls > 1:
            raise ConnectionError("the network is down\nand more")

    def close(self) -> None:
        raise AssertionError("a tracker that failed is closed no more")


def test_a_tracker_that_fails_on_the_way_is_left_out_with_one_warning(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(trackers_module.KINDS, "wandb", Failing)
    both = Trackers(("wandb", "tensorboard"), tracked(tmp_path))
    for step in range(1, 6):
        both.log(step, {"train/loss": float(step)})
    both.close()
    said = capsys.readouterr().err
    assert said.count("wandb failed and gets no more metrics (the network is down)") == 1
    assert len(scalars(tmp_path)["train/loss"]) == 5


def test_a_tracker_that_cannot_start_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(ValueError, match="--report-to tensorboard could not be started"):
        Trackers(("tensorboard",), tracked(tmp_path))


def test_a_missing_package_is_named_with_its_extra(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--report-to trackio needs .* pip install 'distilllens\[track\]'"):
        check_trackers(("trackio",))
    check_trackers(())


def test_a_run_keeps_its_name_at_a_service(tmp_path: Path) -> None:
    assert tracked(tmp_path).known_as("wandb", lambda: "first") == "first"
    assert tracked(tmp_path, resumed_step=3).known_as("wandb", lambda: "second") == "first"
    assert tracked(tmp_path).known_as("trackio", lambda: "third") == "third"
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "first", "trackio": "third"}


@pytest.mark.slow
def test_wandb_offline_writes_a_run_under_one_id(tmp_path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    for resumed_step in (0, 2):
        run = Trackers(("wandb",), tracked(tmp_path, resumed_step=resumed_step))
        run.log(resumed_step + 1, {"train/loss": 1.5})
        run.close()
    id = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{id}/run-{id}.wandb"))


@pytest.mark.slow
def test_trackio_stores_every_step(tmp_path, monkeypatch) -> None:
    pytest.importorskip("trackio")
    import sqlite3
    import subprocess
    import sys

    script = (
        "import sys; from pathlib import Path; from distilllens.trackers import *\n"
        "run = Trackers(('trackio',), TrackedRun(Path(sys.argv[1]), 'a-run', {}, 0))\n"
        "for step in (1, 2): run.log(step, {'train/loss': 1.0 / step})\n"
        "run.close()\n"
    )
    # It settles on its folder when it is first imported.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True)
    (database,) = (tmp_path / "trackio").glob("distilllens*.db")
    rows = sqlite3.connect(database).execute("select run_name, step, metrics from metrics order by step").fetchall()
    name = json.loads((tmp_path / "trackers.json").read_text())["trackio"]
    losses = [(run, step, json.loads(metrics)) for run, step, metrics in rows]
    assert losses == [(name, 1, {"train/loss": 1.0}), (name, 2, {"train/loss": 0.5})]

"""A run that is killed anywhere, and killed again, ends with the very numbers of one that is not."""

import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distilllens.cache_teacher import run_cache_teacher
from distilllens.config import CacheTeacherConfig, TrainConfig
from distilllens.example_log import read_examples
from distilllens.metrics import read_metrics
from distilllens.optimizer_state import OptimizerState
from distilllens.train import run_train
from distilllens_inspect.run_files import checkpoints

TOUCHES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}


def in_child(work: Callable[[], object], *, die_at: int = 0, count_to: Path | None = None) -> int:
    """The exit status of ``work`` in a process of its own, killed before its ``die_at``-th touch of a checkpoint."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    touches = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal touches
        if event in TOUCHES and isinstance(arguments[0], str | Path) and "checkpoint-" in str(arguments[0]):
            touches += 1
            if touches == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(hook)  # for the rest of this process's life
        work()
        if count_to is not None:
            count_to.write_text(str(touches))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


@pytest.fixture(scope="module")
def train(tmp_path_factory, tiny_model_folder, tiny_rows, write_jsonl) -> Callable[[Path], Callable[[], object]]:
    """``train(folder)`` is a run that goes on from its latest checkpoint."""
    folder = tmp_path_factory.mktemp("kill")
    rows = write_jsonl(folder / "rows.jsonl", tiny_rows)
    settings = {"layers": "2", "top_k": "16", "max_length": 300, "device": "cpu"}
    config = CacheTeacherConfig(
        teacher=str(tiny_model_folder("llama")), dataset=str(rows), output_dir=folder / "cache", **settings
    )
    cache = run_cache_teacher(config)
    student = str(tiny_model_folder("gpt2", num_layers=3, seed=1, resid_pdrop=0.1, embd_pdrop=0.1))

    def run_in(run: Path) -> Callable[[], object]:
        config = TrainConfig(
            student=student, cache=cache, output_dir=run, max_steps=6, per_device_train_batch_size=4, logging_steps=1,
            learning_rate=2e-3, save_steps=1, save_total_limit=2, device="cpu", log_example_ids=True,
            resume_from_checkpoint="latest",
        )  # fmt: skip
        return lambda: run_train(config)

    return run_in


def numbers(run: Path) -> tuple:
    lines = [{name: value for name, value in line.items() if "per_s" not in name} for line in read_metrics(run)]
    for line in lines:
        for clock in ("train/data_wait", "train/peak_memory_gb"):
            line.pop(clock)
    return lines, read_examples(run)


@pytest.mark.slow
def test_a_run_killed_at_any_touch_of_its_checkpoints_and_again_ends_as_if_it_were_not(train, tmp_path) -> None:
    assert in_child(train(tmp_path / "whole"), count_to=tmp_path / "touches") == 0
    touches = int((tmp_path / "touches").read_text())
    assert touches > 50
    draw = random.Random(0)
    for attempt in range(3):
        run = tmp_path / f"run-{attempt}"
        for _ in range(2):
            in_child(train(run), die_at=draw.randint(1, touches))
            for checkpoint in checkpoints(run):
                assert load_file(checkpoint / "model.safetensors")
                assert OptimizerState(checkpoint).steps == int(checkpoint.name.rpartition("-")[-1])
        assert in_child(train(run)) == 0
        assert numbers(run) == numbers(tmp_path / "whole")
        mine, theirs = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "whole"))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        assert [folder.name for folder in checkpoints(run)] == ["checkpoint-5", "checkpoint-6"]
        assert not list(run.glob("*.tmp"))

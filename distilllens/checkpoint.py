"""Checkpoints of a run: ``checkpoint-N/`` in save_pretrained layout, whole or not there at all."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilllens.engine import Engine
from distilllens.quiet import quiet_libraries
from distilllens_cache.atomic import fsync_folder

STATE = "trainer_state.json"


@dataclass
class RunState:
    """Where a run stands; kept in ``trainer_state.json`` under the names of Hugging Face's trainer."""

    global_step: int = 0
    epoch: float = 0.0
    max_steps: int = 0
    log_history: list[dict[str, float]] = field(default_factory=list)
    pending: dict[str, float] = field(default_factory=dict)
    """Sums that wait for the next logged step, so that a resumed run logs the same averages."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What a resumed run must share with this one: cache, losses, data order, optimizer settings."""


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, engine: Engine) -> None:
    """An ordinary model folder, which ``AutoModelForCausalLM.from_pretrained`` loads. Every rank calls it."""
    with engine.whole_weights(model), quiet_libraries():
        if engine.is_main:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)


def save_checkpoint(
    run: Path,
    state: RunState,
    *,
    engine: Engine,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    keep: int | None,
) -> Path:
    """Write ``checkpoint-N`` under a temporary name and rename it when whole; then drop the oldest beyond ``keep``."""
    folder = run / f"checkpoint-{state.global_step}"
    unfinished = run / f"{folder.name}.tmp"
    if engine.is_main:
        for left in run.glob("checkpoint-*.tmp"):  # by whoever was killed while saving or removing
            shutil.rmtree(left, ignore_errors=True)
        unfinished.mkdir(parents=True)
    engine.barrier()
    with _explained(unfinished):
        engine.save_state(unfinished)
        save_model(model, tokenizer, unfinished, engine)
        if engine.is_main:
            _write_state(unfinished / STATE, state)
            _sync(unfinished)
    if engine.is_main:
        _remove(folder)
        unfinished.rename(folder)
        fsync_folder(run)
        for old in checkpoints(run)[: -keep if keep else 0]:
            _remove(old)
    engine.barrier()
    return folder


def _remove(folder: Path) -> None:
    """Remove a checkpoint, if it is there; whoever is killed meanwhile leaves no part of it under its name."""
    if folder.exists():
        removed = folder.with_name(f"{folder.name}.old.tmp")
        shutil.rmtree(removed, ignore_errors=True)
        folder.rename(removed)
        shutil.rmtree(removed)


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [
        (int(match[1]), folder)
        for folder in run.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and (folder / STATE).is_file()
    ]
    return [folder for _, folder in sorted(found)]


def find_checkpoint(run: Path, asked: str | None) -> Path | None:
    """The checkpoint to continue from: ``latest`` (None where there is none yet), or the folder asked for."""
    if asked is None:
        return None
    if asked in ("latest", "true", "True"):
        found = checkpoints(run)
        return found[-1] if found else None
    folder = Path(asked)
    if not (folder / STATE).is_file():
        raise ValueError(
            f"--resume-from-checkpoint {asked} is not a complete checkpoint: it has no {STATE}. Give a folder "
            f"checkpoint-N, or the flag alone for the latest one in {run}"
        )
    return folder


def load_state(checkpoint: Path, identity: dict[str, Any]) -> RunState:
    """The state of a checkpoint. ValueError naming each field in which this run differs from the one that wrote it."""
    try:
        values = json.loads((checkpoint / STATE).read_text("utf-8"))
        state = RunState(**{name: values[name] for name in RunState.__dataclass_fields__})
    except (KeyError, ValueError) as error:
        raise ValueError(f"{checkpoint / STATE} cannot be read ({error}): resume from another checkpoint") from None
    differing = [
        f"  {name}: the checkpoint has {state.identity.get(name)!r}, this run has {identity.get(name)!r}"
        for name in sorted({*state.identity, *identity})
        if state.identity.get(name) != identity.get(name)
    ]
    if differing:
        lines = "\n".join(differing)
        raise ValueError(
            f"{checkpoint} belongs to a run with other settings:\n{lines}\nUse the same ones, or another --output-dir"
        )
    return state


@contextmanager
def _explained(unfinished: Path) -> Iterator[None]:
    """A full disk, in whatever words torch or safetensors say it, as one sentence; half a checkpoint is removed."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{unfinished.with_suffix('')} could not be written: {why}. Earlier checkpoints are whole: free space, or "
            f"use --save-total-limit, and continue with --resume-from-checkpoint"
        ) from error


def _write_state(file: Path, state: RunState) -> None:
    file.write_text(json.dumps(vars(state), indent=1) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)

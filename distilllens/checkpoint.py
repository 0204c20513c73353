"""Checkpoints of a run: ``checkpoint-N/`` in save_pretrained layout, whole or not there at all."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distilllens.config import TrainConfig
from distilllens.early_stopping import BestSoFar
from distilllens.engine import Engine
from distilllens.loss_watch import LossWatch
from distilllens.quiet import quiet_libraries
from distilllens_cache.atomic import fsync_folder
from distilllens_inspect.run_files import STATE, checkpoints, step_of

OURS = "distilllens"
"""Where our part of ``trainer_state.json`` is: in ``stateful_callbacks``, the place that transformers has for it."""
NOT_OF_THE_MODEL = (STATE, "optimizer-*.safetensors")
"""What a checkpoint holds besides the student."""
OUR_STATE = ("best", "loss_watch", "pending", "identity")
"""What transformers has no field for."""


@dataclass
class RunState:
    """Where a run stands; kept in ``trainer_state.json``, which ``transformers.TrainerState`` opens."""

    global_step: int = 0
    epoch: float = 0.0
    max_steps: int = 0
    log_history: list[dict[str, float]] = field(default_factory=list)
    """One entry per line of metrics.jsonl, with the names of Hugging Face's trainer beside ours."""
    best: BestSoFar = field(default_factory=BestSoFar)
    loss_watch: LossWatch = field(default_factory=LossWatch)
    pending: dict[str, float] = field(default_factory=dict)
    """Sums that wait for the next logged step, so that a resumed run logs the same averages."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What a resumed run must share with this one: cache, losses, data order, optimizer settings."""


class Saved(Protocol):
    """What is saved of a student: its model, or its adapters."""

    def state_dict(self, *, keep_vars: bool = False) -> dict[str, Tensor]:
        """Its weights."""
        ...

    def save_pretrained(self, folder: Path, /, *, state_dict: Any = None) -> Any:
        """Write them, or others in their place, to a folder."""
        ...


def save_model(model: Saved, tokenizer: PreTrainedTokenizerBase, folder: Path, engine: Engine) -> None:
    """A folder that ``AutoModelForCausalLM.from_pretrained`` loads, or a PEFT folder. Every rank calls it."""
    weights = engine.whole_weights(model)
    if engine.is_main:
        with quiet_libraries():
            model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)


def save_checkpoint(
    config: TrainConfig,
    state: RunState,
    *,
    engine: Engine,
    model: Saved,
    tokenizer: PreTrainedTokenizerBase,
) -> Path:
    """Write ``checkpoint-N`` under a temporary name and rename it when whole; then drop the oldest beyond the limit.

    The best one stays, and so does the last one before the loss rose.
    """
    run = config.output_dir
    folder = checkpoint_folder(run, state.global_step)
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
            _write_state(unfinished / STATE, state, config)
            _sync(unfinished)
    if engine.is_main:
        _remove(folder)
        unfinished.rename(folder)
        fsync_folder(run)
        keep = config.save_total_limit
        kept = {state.best.step and checkpoint_folder(run, state.best.step), last_good_checkpoint(run, state)}
        for old in checkpoints(run)[: -keep if keep else 0]:
            if old not in kept:
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


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after a step is."""
    return run / f"checkpoint-{step}"


def last_good_checkpoint(run: Path, state: RunState) -> Path | None:
    """The newest checkpoint from before the loss rose above its running median, if it did."""
    newest = state.global_step - state.loss_watch.num_above
    good = [folder for folder in checkpoints(run) if step_of(folder) <= newest]
    return good[-1] if good else None


def take_student(checkpoint: Path, folder: Path) -> None:
    """Make the student of a checkpoint that of ``folder``."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*NOT_OF_THE_MODEL), dirs_exist_ok=True)


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
        ours = values["stateful_callbacks"][OURS]["attributes"]
        state = RunState(
            global_step=values["global_step"],
            epoch=values["epoch"],
            max_steps=values["max_steps"],
            log_history=values["log_history"],
            best=BestSoFar(**ours["best"]),
            loss_watch=LossWatch(**ours["loss_watch"]),
            pending=ours["pending"],
            identity=ours["identity"],
        )
    except (KeyError, TypeError, ValueError) as error:
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


def _write_state(file: Path, state: RunState, config: TrainConfig) -> None:
    best = state.best
    ours = {name: value for name, value in asdict(state).items() if name in OUR_STATE}
    content = {
        "best_global_step": best.step,
        "best_metric": best.value,
        "best_model_checkpoint": best.step and str(checkpoint_folder(config.output_dir, best.step)),
        "epoch": state.epoch,
        "eval_steps": config.eval_steps or state.max_steps,
        "global_step": state.global_step,
        "log_history": state.log_history,
        "logging_steps": config.logging_steps,
        "max_steps": state.max_steps,
        "num_train_epochs": math.ceil(config.num_train_epochs),
        "save_steps": config.save_steps,
        "stateful_callbacks": {OURS: {"args": {}, "attributes": ours}},
        "train_batch_size": config.per_device_train_batch_size,
    }
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)

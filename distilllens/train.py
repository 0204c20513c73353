"""Train a student from a teacher cache: shards -> student -> loss -> step -> checkpoint."""

import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from distilllens.batches import Steps
from distilllens.checkpoint import RunState, find_checkpoint, load_state, save_checkpoint, save_model
from distilllens.collate import collate
from distilllens.config import TrainConfig, save_config
from distilllens.console import say
from distilllens.engine import Engine, choose_device, start_engine
from distilllens.interruption import Interruption
from distilllens.lens_rows import choose_lens_rows
from distilllens.metrics import Metrics, RunningSums
from distilllens.packing import pack, wants_one_row
from distilllens.schedule import learning_rate
from distilllens.self_check import check_objective
from distilllens.teacher_forced import averages
from distilllens.training_run import TrainingRun, open_run

RESOLVED = "config.resolved.yaml"


class NonFiniteError(ValueError):
    """A loss or gradient that is not a number; it did not touch the weights."""


def run_train(config: TrainConfig) -> Path:
    """Train as ``config`` says; the folder of the final model."""
    device = choose_device(config.device)
    _check_output(config)
    checkpoint = find_checkpoint(config.output_dir, config.resume_from_checkpoint)
    run_opened(open_run(config, start_from=checkpoint), device, checkpoint)
    return config.output_dir


def run_opened(run: TrainingRun, device: torch.device, checkpoint: Path | None) -> None:
    """Train what was opened, from the start or on from ``checkpoint``, and save the student."""
    config = run.config
    hidden_size = run.model.config.get_text_config().hidden_size
    engine = start_engine(run.student, config, device, hidden_size=hidden_size)
    steps = Steps(
        run.source,
        seed=config.seed,
        examples_per_micro_batch=config.per_device_train_batch_size,
        micro_batches=config.gradient_accumulation_steps,
        world_size=engine.world_size,
    )
    num_steps = config.max_steps if config.max_steps > 0 else steps.for_epochs(config.num_train_epochs)
    identity = run.identity | {"steps": num_steps, "examples_per_step": steps.examples_per_step}
    state = RunState(max_steps=num_steps, identity=identity)
    if checkpoint is not None:
        state = load_state(checkpoint, identity)
        engine.load_state(checkpoint)
        say(f"Resuming from {checkpoint} after step {state.global_step}")
    _self_check(run, steps)
    if engine.is_main:
        _start_output(config)
    engine.barrier()
    train(run, engine, steps, state)
    save_model(run.model, run.tokenizer, config.output_dir, engine)
    engine.barrier()
    say(f"Trained {num_steps} steps; the student is in {config.output_dir}")


def train(run: TrainingRun, engine: Engine, steps: Steps, state: RunState) -> None:
    """The loop. A step is a list of examples, a pure function of seed, epoch and index."""
    config, num_steps, lens_layers = run.config, state.max_steps, run.student.objective.lens_layers
    metrics = Metrics(config.output_dir, engine, num_steps=num_steps, resumed_step=state.global_step)
    sums = RunningSums(engine)
    sums.restore(state.pending)
    engine.train(True)
    with Interruption() as interruption, metrics:
        while state.global_step < num_steps:
            step = state.global_step
            num_targets = steps.num_targets(step)
            for number in range(steps.micro_batches):
                started = time.perf_counter()
                examples = [run.source[index] for index in steps.micro_batch(step, number, engine.rank)]
                packs = None
                if config.packing:
                    examples, packs = pack(examples, in_one_row=wants_one_row(run.model))
                rows = choose_lens_rows(examples, lens_layers, share=config.lens_rows, seed=config.seed, step=step)
                batch = collate(examples, run.tails, lens_rows=rows, packs=packs).to(engine.device)
                waited = time.perf_counter() - started
                # Dropout is a function of the place in the run, so a resumed run has no generator to restore.
                torch.manual_seed(_seed(config.seed, step, number, engine.rank))
                losses = engine.forward(batch)
                _require_finite(losses["total"].item(), "loss", step, batch.ids, config)
                engine.backward(losses["total"] / num_targets)
                sums.add(losses, tokens=int(batch.attention_mask.sum()), waited=waited)
            rate = learning_rate(step, num_steps=num_steps, config=config)
            gradient_norm = engine.update(rate)
            _require_finite(gradient_norm, "gradient norm", step, _ids(run, steps, step), config)
            sums.num_targets += num_targets
            state.global_step = step + 1
            state.epoch = state.global_step * steps.examples_per_step / len(run.source)
            is_last = state.global_step == num_steps
            if state.global_step % config.logging_steps == 0 or step == 0 or is_last:
                values = sums.flush() | {
                    "train/grad_norm": gradient_norm,
                    "train/learning_rate": rate,
                    "train/epoch": state.epoch,
                }
                state.log_history.append(metrics.log(state.global_step, values))
            if run.evaluation is not None and (is_last or _is_due(state.global_step, config.eval_steps)):
                values = {f"eval/{name}": value for name, value in evaluate_student(run, engine).items()}
                state.log_history.append(metrics.log(state.global_step, values))
            interrupted = engine.any(interruption.asked) and not is_last
            if is_last or interrupted or _is_due(state.global_step, config.save_steps):
                state.pending = sums.pending()
                folder = save_checkpoint(
                    config.output_dir,
                    state,
                    engine=engine,
                    model=run.model,
                    tokenizer=run.tokenizer,
                    keep=config.save_total_limit,
                )
                if interrupted:
                    say(f"Saved {folder}; --resume-from-checkpoint continues from it")
                    raise KeyboardInterrupt


def evaluate_student(run: TrainingRun, engine: Engine) -> dict[str, float]:
    """Teacher-forced averages over the evaluation cache."""
    assert run.evaluation is not None
    matching = run.evaluation.matching
    engine.train(False)
    with torch.no_grad():
        result = averages(
            lambda batch: engine.forward(batch, measured_pairs=matching.pairs),
            run.evaluation.reader,
            tails=matching.tails,
            device=engine.device,
            rank=engine.rank,
            world_size=engine.world_size,
            all_sum=engine.all_sum,
        )
    engine.train(True)
    return result


def _self_check(run: TrainingRun, steps: Steps) -> None:
    if not run.tails:
        return
    objective = run.student.objective
    first = collate([run.source[index] for index in steps.micro_batch(0, 0, 0)], run.tails)
    check_objective(first, objective, vocab_size=run.student.lens.vocab_size)
    pairs = ", ".join(f"{student}:{teacher}" for student, teacher in objective.lens_pairs) or "none"
    say(
        f"Self-check passed: task {objective.task}, lens {objective.lens_divergence} on pairs {pairs}, "
        f"tail {run.identity['tail']}"
    )


def _check_output(config: TrainConfig) -> None:
    folder = config.output_dir
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output-dir {folder} is a file; give a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / RESOLVED).is_file():
        raise ValueError(f"--output-dir {folder} holds something that is not a run; give an empty or a new folder")
    if not config.overwrite and config.resume_from_checkpoint is None:
        raise ValueError(
            f"--output-dir {folder} holds a run already: --resume-from-checkpoint continues it, --overwrite begins anew"
        )


def _start_output(config: TrainConfig) -> None:
    """The run's folder with its resolved config; after everything was checked, so that a mistake costs nothing."""
    if config.overwrite and config.resume_from_checkpoint is None and config.output_dir.exists():
        shutil.rmtree(config.output_dir)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    if not os.access(config.output_dir, os.W_OK):
        raise ValueError(f"--output-dir {config.output_dir} cannot be written to")
    save_config(config, config.output_dir / RESOLVED)


def _ids(run: TrainingRun, steps: Steps, step: int) -> tuple[str, ...]:
    return tuple(run.source[index].id for index in steps.indices(step))


def _require_finite(value: float, what: str, step: int, ids: Sequence[str], config: TrainConfig) -> None:
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the {what} of step {step + 1} is {value}; training stopped before it touched the weights. Examples of "
            f"the batch: {', '.join(ids)}. The checkpoints in {config.output_dir} are good: lower "
            f"--learning-rate, or look at those examples, and continue with --resume-from-checkpoint"
        )


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)

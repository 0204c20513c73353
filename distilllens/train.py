"""Train a student from a teacher cache: shards -> student -> loss -> step -> checkpoint."""

import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distilllens.batches import Steps
from distilllens.checkpoint import (
    RunState,
    checkpoint_folder,
    find_checkpoint,
    last_good_checkpoint,
    load_state,
    save_checkpoint,
    save_model,
    take_student,
)
from distilllens.collate import Batch
from distilllens.config import TrainConfig, save_config
from distilllens.console import say
from distilllens.deepspeed_config import RunFacts, load_deepspeed_config
from distilllens.early_stopping import selection_of
from distilllens.engine import Engine
from distilllens.example_log import ExampleLog
from distilllens.interruption import Interruption
from distilllens.launch import choose_device, is_distributed, join_ranks, start_engine, uses_deepspeed, world_size
from distilllens.lens import check_lens
from distilllens.lens_schedule import lens_factor
from distilllens.loss_watch import PATIENCE, running_median
from distilllens.metrics import Metrics, RunningSums, history_entry
from distilllens.mixed_batch import MixedBatch
from distilllens.mixture import DataMixture, MixedReadAhead
from distilllens.models import load_model, require_bfloat16, require_kernel
from distilllens.packing import check_packing
from distilllens.quiet import quiet_libraries
from distilllens.replacing import recover_once, replacing
from distilllens.run_config import RESOLVED
from distilllens.schedule import learning_rate, warmup_steps
from distilllens.self_check import check_objective
from distilllens.student import Student
from distilllens.trackers import check_trackers
from distilllens.training_run import TrainingRun, open_run
from distilllens.validation import Validation, open_validation
from distilllens.watch_config import tracker_names
from distilllens_cache import ReadAhead

MERGED = "merged"
"""Folder in the output for a LoRA student with its adapters merged."""


class NonFiniteError(ValueError):
    """A loss or gradient that is not a number; it did not touch the weights."""


class DivergedError(ValueError):
    """A loss that rose and stayed; there may be a checkpoint from before."""


def run_train(config: TrainConfig) -> Path:
    """Train as ``config`` says; the folder of the final model."""
    join_ranks()
    device = choose_device(config.device)
    require_kernel(config.attn_implementation, device, is_16_bit=config.bf16, flag="--bf16")
    if config.bf16:
        require_bfloat16(device, flag="--bf16")
    check_trackers(tracker_names(config.report_to))
    if uses_deepspeed(config):
        # Read again by the engine, with what only student and data tell; a mistake is told before they are opened.
        num_steps = config.max_steps if config.max_steps > 0 else None
        load_deepspeed_config(config, RunFacts(world_size(), hidden_size=None, num_steps=num_steps))
    _check_output(config)
    checkpoint = find_checkpoint(config.output_dir, config.resume_from_checkpoint)
    run_opened(open_run(config, start_from=checkpoint), device, checkpoint)
    return config.output_dir


def run_opened(run: TrainingRun, device: torch.device, checkpoint: Path | None) -> None:
    """Train what was opened, from the start or on from ``checkpoint``, and save the student."""
    config, run = run.config, run.on(device)
    validation = open_validation(run)
    steps = Steps(
        run.source,
        seed=config.seed,
        examples_per_micro_batch=config.per_device_train_batch_size,
        micro_batches=config.gradient_accumulation_steps,
        world_size=world_size(),
        positions_share=config.positions_share,
        group_by_length=config.group_by_length,
    )
    num_steps = config.max_steps if config.max_steps > 0 else steps.for_epochs(config.num_train_epochs)
    facts = RunFacts(steps.world_size, run.model.config.get_text_config().hidden_size, num_steps)
    with closing(start_engine(run.student, config, device, facts)) as engine:
        identity = run.identity | {"steps": num_steps, "examples_per_step": steps.examples_per_step}
        state = RunState(max_steps=num_steps, identity=identity)
        if checkpoint is not None:
            state = load_state(checkpoint, identity)
            _require_best(state, checkpoint, config)
            engine.load_state(checkpoint)
            say(f"Resuming from {checkpoint} after step {state.global_step}")
        with steps.read_ahead(stop=num_steps * steps.examples_per_step) as examples:
            _self_check(run, engine, examples, steps)
            with _output(config, engine):
                # Trackers start here: one that cannot costs nothing that was in the folder.
                metrics = Metrics(config, engine, num_steps=num_steps, resumed_step=state.global_step)
            train(run, engine, examples, steps, state, validation, metrics)
        _save_student(run, engine, state)


def train(
    run: TrainingRun,
    engine: Engine,
    examples: ReadAhead | MixedReadAhead,
    steps: Steps,
    state: RunState,
    validation: Validation,
    metrics: Metrics,
) -> None:
    """The loop. A step is a list of examples, a pure function of seed, epoch and index."""
    config, num_steps = run.config, state.max_steps
    warmup, selection = warmup_steps(config, num_steps=num_steps), selection_of(config)
    sums = RunningSums(engine)
    sums.restore(state.pending)
    taken = ExampleLog(config.output_dir, engine, resumed_step=state.global_step) if config.log_example_ids else None
    is_over = state.global_step == num_steps or (selection is not None and selection.is_over(state.best))
    engine.train(True)
    with Interruption(has_launcher=is_distributed()) as interruption, metrics:
        while not is_over:
            step, began, loss_sum = state.global_step, time.perf_counter(), 0.0
            num_targets = steps.num_targets(step)
            factor = lens_factor(config.lens_schedule, step=step, num_steps=num_steps)
            for number in range(steps.micro_batches):
                started = time.perf_counter()
                chosen = [examples[place] for place in steps.places(step, number, engine.rank)]
                batch = run.batch(chosen, step).to(engine.device)
                waited = time.perf_counter() - started
                # Dropout is a function of the place in the run, so a resumed run has no generator to restore.
                torch.manual_seed(_seed(config.seed, step, number, engine.rank))
                losses = engine.forward(batch, lens_factor=factor)
                loss_sum += losses["total"].item()
                _require_finite(loss_sum, "loss", batch.ids, state, config)
                engine.backward(losses["total"] / num_targets)
                if taken is not None:
                    taken.add(batch.ids)
                sums.add(losses, tokens=sum(len(example.token_ids) for example in chosen), waited=waited)
            rate = learning_rate(step, num_steps=num_steps, config=config)
            gradient_norm = engine.update(rate)
            _require_finite(gradient_norm, "gradient norm", _ids(run, steps, step), state, config)
            sums.add_step(num_targets=num_targets, seconds=time.perf_counter() - began)
            state.global_step = step + 1
            if taken is not None:
                taken.log(state.global_step)
            state.epoch = state.global_step * steps.examples_per_step / len(run.source)
            metrics.advance(state.global_step)
            is_over, is_best = state.global_step == num_steps, False
            measured: dict[str, float] = {}
            if validation.is_possible and (is_over or _is_due(state.global_step, config.eval_steps)):
                measured = validation.measure(engine)
                if selection is not None:
                    is_best = selection.look(state.best, measured, step=state.global_step)
                    is_over = is_over or selection.is_over(state.best)
                if is_best or not config.load_best_model_at_end:
                    validation.sample(engine, step=state.global_step)
            if state.global_step % config.logging_steps == 0 or step == 0 or is_over:
                values = sums.flush() | {
                    "train/grad_norm": gradient_norm,
                    "train/learning_rate": rate,
                    "train/lens_weight": config.lens_weight * factor,
                    "train/epoch": state.epoch,
                }
                state.log_history.append(history_entry(metrics.log(state.global_step, values), epoch=state.epoch))
            if measured:
                state.log_history.append(history_entry(metrics.log(state.global_step, measured), epoch=state.epoch))
            if step >= warmup:
                mean = engine.all_sum(torch.tensor(loss_sum, dtype=torch.float64, device=engine.device)) / num_targets
                if state.loss_watch.add(mean.item(), ratio=config.max_loss_ratio):
                    raise _diverged(run, steps, state, mean.item())
            interrupted = engine.any(interruption.asked) and not is_over
            if is_over or is_best or interrupted or _is_due(state.global_step, config.save_steps):
                state.pending = sums.pending()
                folder = save_checkpoint(config, state, engine=engine, model=run.saved, tokenizer=run.tokenizer)
                if interrupted:
                    say(f"Saved {folder}; --resume-from-checkpoint continues from it")
                    raise KeyboardInterrupt


def _save_student(run: TrainingRun, engine: Engine, state: RunState) -> None:
    """The student of the last step or of the best one, in the run's folder, and a sentence that says which."""
    config, selection = run.config, selection_of(run.config)
    which = ""
    if config.load_best_model_at_end and state.best.step is not None:
        best = checkpoint_folder(config.output_dir, state.best.step)
        which = f", from {best.name}"
        if engine.is_main:
            take_student(best, config.output_dir)
    else:
        save_model(run.saved, run.tokenizer, config.output_dir, engine)
    if config.lora_merge and engine.is_main:
        # From the files, as a user would: no rank need hold the whole base beside its own part.
        with quiet_libraries():
            load_model(config.output_dir).save_pretrained(config.output_dir / MERGED)
            run.tokenizer.save_pretrained(config.output_dir / MERGED)
    engine.barrier()
    if selection is not None and selection.is_over(state.best):
        say(selection.verdict(state.best))
    say(f"Trained {state.global_step} steps; the student is in {config.output_dir}{which}")


def _check_student(student: Student, batch: Batch, *, packing: bool) -> dict[str, Tensor]:
    check_lens(student.model, student.lens)
    if packing:
        check_packing(student.model, student.lens)
    return {}


def _self_check(run: TrainingRun, engine: Engine, examples: ReadAhead | MixedReadAhead, steps: Steps) -> None:
    objective, vocab_size = run.student.objective, run.student.lens.vocab_size
    chosen = [examples[place] for place in steps.places(0, 0, 0)]
    if not any(len(one.target_positions) for one in chosen):
        chosen = [run.source[int(np.argmax(run.source.num_targets > 0))]]
    if isinstance(run.source, DataMixture):
        # A cache of little weight may not be among the first examples.
        chosen += [run.source[int(start)] for start in run.source.starts[:-1]]
    batch = run.batch(chosen, 0).to(engine.device)
    # As the student is trained: attention kernels know some devices and number types only, and weights may be sharded.
    engine.train(False)
    with torch.no_grad():
        engine.forward(batch, read=partial(_check_student, packing=run.config.packing))
    if not run.reads_targets:
        if run.config.method != "sft":
            say(
                f"Nothing of the teacher is in the loss: --method {run.config.method} with --kd-ratio "
                f"{run.config.kd_ratio:g} and --lens-weight {run.config.lens_weight:g} is plain fine-tuning"
            )
        return
    if isinstance(batch, MixedBatch):
        for view in batch.taught(vocab_size=vocab_size)[0]:
            check_objective(view.batch, view.teaching.objective, vocab_size=vocab_size)
    else:
        check_objective(batch, objective, vocab_size=vocab_size)
    pairs = ", ".join(f"{student}:{teacher}" for student, teacher in objective.lens_pairs) or "none"
    say(
        f"Self-check passed: task {objective.task}, lens {objective.lens_divergence} on pairs {pairs}, "
        f"tail {run.identity['tail']}"
    )


def _check_output(config: TrainConfig) -> None:
    folder = config.output_dir
    _require_writable(folder)
    recover_once(folder, rank=int(os.environ.get("RANK", "0")))
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / RESOLVED).is_file():
        raise ValueError(f"--output-dir {folder} holds something that is not a run; give an empty or a new folder")
    if not config.overwrite and config.resume_from_checkpoint is None:
        raise ValueError(
            f"--output-dir {folder} holds a run already: --resume-from-checkpoint continues it, --overwrite begins anew"
        )
    if config.resume_from_checkpoint is not None:
        return
    for place in (config.student, *config.cache, config.eval_cache, config.dataset, config.eval_dataset):
        if place and Path(place).exists() and Path(place).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--overwrite would remove {place}, which this run reads: give another --output-dir")


def _require_best(state: RunState, checkpoint: Path, config: TrainConfig) -> None:
    """The best checkpoint so far is what the run may end with."""
    if not config.load_best_model_at_end or state.best.step is None:
        return
    best = checkpoint_folder(config.output_dir, state.best.step)
    if not best.is_dir():
        raise ValueError(
            f"{checkpoint} names {best} as the best so far, which is not there: resume in the folder of that run, or "
            f"drop --load-best-model-at-end"
        )


@contextmanager
def _output(config: TrainConfig, engine: Engine) -> Iterator[None]:
    """The run's folder with its resolved config; an old run in it goes when the block has passed without an error."""
    is_new = engine.is_main and config.resume_from_checkpoint is None
    with replacing(config.output_dir) if is_new else nullcontext():
        if engine.is_main:
            config.output_dir.mkdir(parents=True, exist_ok=True)
            save_config(config, config.output_dir / RESOLVED)
        engine.barrier()
        yield


def _require_writable(folder: Path) -> None:
    """ValueError unless a run can be written to ``folder``, which need not exist."""
    try:
        nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not nearest.is_dir():
            raise ValueError(f"--output-dir {folder} is no folder: {nearest} is a file; give another one")
        # Tried, not asked: for root, and on a disk mounted for reading, permissions say nothing.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"--output-dir {folder} cannot be written to ({error.strerror}): give another one") from None


def _diverged(run: TrainingRun, steps: Steps, state: RunState, loss: float) -> DivergedError:
    config, first = run.config, state.global_step - PATIENCE
    good = last_good_checkpoint(config.output_dir, state)
    return DivergedError(
        f"the loss has diverged: it is {loss:.4g} and was above --max-loss-ratio {config.max_loss_ratio:g} times its "
        f"running median, {running_median(state.loss_watch.recent):.4g}, in each of the last {PATIENCE} steps. "
        f"Examples of step {first + 1}, where that began: {', '.join(_ids(run, steps, first))}. {_way_on(good, config)}"
    )


def _way_on(good: Path | None, config: TrainConfig) -> str:
    if good is None:
        return "There is no checkpoint from before: look at those examples, and start with a lower --learning-rate"
    return (
        f"The last good checkpoint is {good}: look at those examples, and train on with --student {good}, a lower "
        f"--learning-rate and another --output-dir than {config.output_dir}"
    )


def _ids(run: TrainingRun, steps: Steps, step: int) -> tuple[str, ...]:
    return tuple(run.source[index].id for index in steps.indices(step))


def _require_finite(value: float, what: str, ids: Sequence[str], state: RunState, config: TrainConfig) -> None:
    if not math.isfinite(value):
        good = last_good_checkpoint(config.output_dir, state)
        raise NonFiniteError(
            f"the {what} of step {state.global_step + 1} is {value}; training stopped before it touched the weights. "
            f"Examples of the batch: {', '.join(ids)}. {_way_on(good, config)}"
        )


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)

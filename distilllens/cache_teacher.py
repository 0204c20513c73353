"""Run the teacher once over a dataset: rows -> teacher -> lens -> sparse targets -> shards -> manifest."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from distilllens.calibration import calibration_order, write_sketches
from distilllens.config import CacheTeacherConfig, save_config
from distilllens.console import say
from distilllens.launch import is_distributed
from distilllens.pass_estimate import estimate, folder_size
from distilllens.pass_plan import Plan, bytes_per_target, open_plan, planned
from distilllens.teacher_pass import TeacherPass
from distilllens_cache import CacheWriter, TailSpec


def run_cache_teacher(config: CacheTeacherConfig) -> Path:
    """Write, or finish, the cache that ``config`` describes; its folder."""
    if is_distributed():
        raise ValueError("cache-teacher runs as one process: start it without torchrun, or with --nproc-per-node 1")
    with tempfile.TemporaryDirectory() as scratch:
        plan = open_plan(config, Path(scratch) / "tokenizer")
        say(plan.examples.report())
        if config.dry_run:
            print(estimate(plan))
            return config.output_dir
        return write_cache(plan)


def write_cache(plan: Plan) -> Path:
    """Write the shards that are still missing, then the manifest."""
    config, folder = plan.config, plan.config.output_dir
    _require_space(plan)
    writer = CacheWriter(
        folder,
        identity=plan.identity,
        examples=planned(plan.examples.examples),
        tokenizer_files=plan.tokenizer_files,
        shards=plan.shards,
        overwrite=config.overwrite,
    )
    if writer.finished:
        print(f"{folder} is finished already, from the same teacher, rows and settings: nothing to do")
        return folder
    _require_determinism(plan)
    teacher = _calibrated(plan, writer)
    missing = writer.unfinished()
    if len(missing) < len(plan.shards):
        say(f"Continuing: {len(plan.shards) - len(missing)} of {len(plan.shards)} shards are finished")
    rows = plan.examples.examples
    num_tokens = sum(rows[index].num_tokens for number in missing for index in plan.shards[number])
    started = time.monotonic()
    with _progress("teacher pass", num_tokens, writer) as advance:
        for number in missing:
            where = plan.shards[number]
            cached, tails = teacher.run(
                rows[where.start : where.stop],
                first_index=where.start,
                batch_tokens=config.batch_tokens,
                progress=advance,
            )
            writer.write_shard(number, cached, tails or None)
    writer.finish()
    save_config(config, folder / "config.resolved.yaml")
    seconds = max(time.monotonic() - started, 1e-9)
    targets = sum(example.num_targets for example in rows)
    print(
        f"{folder}: {len(rows)} examples, {targets} target positions, {len(plan.identity.layers)} layers, "
        f"{decimal(folder_size(folder))}; {num_tokens / seconds:.0f} tokens/s"
    )
    return folder


def _calibrated(plan: Plan, writer: CacheWriter) -> TeacherPass:
    """The teacher with what encodes the sketches of its cache, which are fitted first where they are missing."""
    missing = writer.missing_sketches()
    rows, config = plan.examples.examples, plan.config
    order = calibration_order(rows, num_targets=config.calibration_targets, seed=config.seed) if missing else []
    examples = [rows[place] for place in order]
    if missing:
        say(f"Calibrating the sketches of layers {', '.join(map(str, missing))} on {len(examples)} examples")
    with _progress("calibration", sum(example.num_tokens for example in examples), writer) as advance:
        return write_sketches(plan.teacher, writer, examples, batch_tokens=config.batch_tokens, progress=advance)


def _require_space(plan: Plan) -> None:
    needed = plan.examples.num_targets * bytes_per_target(plan.identity)
    parent = plan.config.output_dir.absolute()
    while not parent.exists():
        parent = parent.parent
    existing = folder_size(plan.config.output_dir) if plan.config.output_dir.is_dir() else 0
    free = shutil.disk_usage(parent).free
    if needed > free + existing:
        raise ValueError(
            f"the cache needs about {decimal(int(needed))} and {parent} has {decimal(free)} free: give another "
            f"--output-dir, a smaller --top-k, fewer --layers or a --limit"
        )


def _require_determinism(plan: Plan) -> None:
    """Two passes over one example must agree, or a resumed cache would mix two teachers."""
    if active := [name for name, module in plan.teacher.model.named_modules() if module.training]:
        raise ValueError(
            f"the teacher is in training mode ({active[0] or 'the whole model'}): its dropout would be cached"
        )
    shortest = min(plan.examples.examples, key=lambda example: example.num_tokens)
    without_tails = replace(plan.teacher, tails=dict.fromkeys(plan.teacher.widths, TailSpec()))
    first, second = (
        without_tails.run([shortest], first_index=0, batch_tokens=plan.config.batch_tokens)[0][0] for _ in range(2)
    )
    gap = max(
        abs(float(first.targets[layer].log_probs[0]) - float(second.targets[layer].log_probs[0]))
        for layer in plan.identity.layers
    )
    if gap > 0:
        say(f"Warning: the teacher is not deterministic here ({gap:.2g} nats between two passes over one example)")


@contextmanager
def _progress(what: str, num_tokens: int, writer: CacheWriter) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    started, done = time.monotonic(), 0
    with Progress(
        TextColumn(what),
        BarColumn(),
        TextColumn(
            "{task.completed:.0f}/{task.total:.0f} tokens  {task.fields[rate]:.0f} tokens/s  {task.fields[written]}"
        ),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=num_tokens, rate=0.0, written=decimal(0))

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            rate = done / max(time.monotonic() - started, 1e-9)
            bar.update(task, advance=tokens, rate=rate, written=decimal(writer.bytes_written))

        yield advance

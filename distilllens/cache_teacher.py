"""Run the teacher once over a dataset: rows -> teacher -> lens -> sparse targets -> shards -> manifest."""

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from distilllens.calibration import calibration_order, write_sketches
from distilllens.config import CacheTeacherConfig, save_config
from distilllens.console import say
from distilllens.free_space import Space, folder_size, space_for
from distilllens.launch import join_ranks
from distilllens.pass_estimate import describe, estimate
from distilllens.pass_plan import Plan, bytes_per_target, open_plan, planned
from distilllens.ranks import SECONDS_TO_COME, Ranks, ranks_of_environment
from distilllens.remote_output import RemoteOutput, remote_output
from distilllens.run_config import RESOLVED
from distilllens.teacher_pass import TeacherPass
from distilllens_cache import CacheWriter, TailSpec, require_free, share_shards
from distilllens_inspect.card import CARD, write_card

DOUBT = 3
"""Times that a cache may be larger than its settings alone suggest."""


def run_cache_teacher(config: CacheTeacherConfig, *, damaged: Sequence[str] = ()) -> str | Path:
    """Write, or finish, the cache that ``config`` describes; its folder. ``damaged`` are files of a remote one."""
    join_ranks()
    ranks = ranks_of_environment()
    if not config.dry_run:
        require_free(config.folder, ranks.seat)  # before a large teacher is loaded in vain
    with (
        tempfile.TemporaryDirectory() as scratch,
        remote_output(config, ranks, Path(scratch), damaged) as (seen, remote),
    ):
        plan = replace(open_plan(seen, Path(scratch) / "tokenizer"), config=config)
        say(plan.examples.report())
        if config.dry_run:
            if ranks.is_main:
                _tell_estimate(plan)
            return config.output_dir
        return write_cache(plan, ranks, remote)


def _tell_estimate(plan: Plan) -> None:
    if not plan.to_write:
        print(f"{plan.config.output_dir} holds all {plan.num_present} rows already: nothing to add")
        return
    found, space = estimate(plan), _space(plan)
    print(describe(plan, found, space), flush=True)
    space.require(found.num_bytes)


def write_cache(plan: Plan, ranks: Ranks, remote: RemoteOutput | None = None) -> str | Path:
    """Write the shards that are still missing, among all ranks, then the manifest."""
    config, folder = plan.config, plan.config.folder
    _require_space(plan)
    contents: dict[str, Any] = {
        "identity": plan.identity,
        "examples": planned(plan.examples.examples),
        "tokenizer_files": plan.tokenizer_files,
        "shards": plan.shards,
    }
    append = config.append is not None
    told = f"{config.output_dir} is finished already, from the same teacher, rows and settings: nothing to do"
    if remote is not None and remote.is_finished(append=append, **contents):
        if ranks.is_main:
            print(told)
        return config.output_dir
    with CacheWriter(folder, **contents, overwrite=config.overwrite, append=append, seat=ranks.seat) as writer:
        if remote is not None:
            remote.begin()
        is_new, speed = not writer.finished, 0.0
        if is_new:
            _require_determinism(plan)
            started = time.monotonic()
            num_tokens = _write_shards(plan, writer, ranks, remote)
            speed = num_tokens / max(time.monotonic() - started, 1e-9)
    if ranks.is_main:
        if is_new:
            # Whoever runs this file continues, and deletes nothing.
            save_config(config.model_copy(update={"overwrite": False}), folder / RESOLVED)
        _write_card(config)
        if is_new:
            told = (
                f"{config.output_dir}: {len(plan.examples.examples)} examples, {plan.examples.num_targets} target "
                f"positions, {len(plan.identity.layers)} layers, {decimal(folder_size(folder))}; {speed:.0f} tokens/s"
            )
        if remote is not None:
            remote.end()
        print(told)
    return config.output_dir


def _write_shards(plan: Plan, writer: CacheWriter, ranks: Ranks, remote: RemoteOutput | None) -> int:
    """Write this rank's share of the missing shards and see the cache finished; tokens of all missing shards."""
    config, rows = plan.config, plan.examples.examples
    teacher = _calibrated(plan, writer, ranks)
    missing = writer.unfinished()
    if len(missing) < len(plan.shards):
        say(f"Continuing: {len(plan.shards) - len(missing)} of {len(plan.shards)} shards are finished")
    num_tokens = {number: sum(rows[index].num_tokens for index in plan.shards[number]) for number in missing}
    # Nobody writes a shard before all have seen which are missing, and so agree on who writes which.
    ranks.gather(writer, f"missing {hashlib.sha256(repr(missing).encode()).hexdigest()}")
    shares = share_shards(num_tokens, ranks.world_size)
    own = shares[ranks.rank]
    with _progress("teacher pass", sum(num_tokens[number] for number in own), writer, ranks) as advance:
        for number in own:
            where = plan.shards[number]
            cached, tails = teacher.run(
                rows[where.start : where.stop],
                first_index=where.start,
                batch_tokens=config.batch_tokens,
                progress=advance,
            )
            writer.write_shard(number, cached, tails or None)
            if remote is not None:
                remote.check()
    writer_of = {number: rank for rank, share in enumerate(shares) for number in share}
    ranks.wait(writer, "to write their shards", lambda: {writer_of[number] for number in writer.unfinished()})
    writer.finish()
    return sum(num_tokens.values())


def _write_card(config: CacheTeacherConfig) -> None:
    """The dataset card beside the cache, of which it is no part: readers and `inspect verify` never open it."""
    if not write_card(config.folder, license_name=config.license):
        say(f"{config.folder / CARD} was written by somebody else and is left alone; `inspect card` prints ours")


def _calibrated(plan: Plan, writer: CacheWriter, ranks: Ranks) -> TeacherPass:
    """The teacher with what encodes the sketches of its cache, which are fitted first where they are missing."""
    if not ranks.is_main:
        ranks.wait(
            writer,
            "to calibrate the sketches",
            lambda: [0] if writer.missing_sketches() else [],
            seconds_to_come=SECONDS_TO_COME,
        )
    missing = writer.missing_sketches()
    rows, config = plan.examples.examples[: writer.num_calibration_examples], plan.config
    order = calibration_order(rows, num_targets=config.calibration_targets, seed=config.seed) if missing else []
    examples = [rows[place] for place in order]
    if missing:
        say(f"Calibrating the sketches of layers {', '.join(map(str, missing))} on {len(examples)} examples")
    with _progress("calibration", sum(example.num_tokens for example in examples), writer, ranks) as advance:
        return write_sketches(plan.teacher, writer, examples, batch_tokens=config.batch_tokens, progress=advance)


def _require_space(plan: Plan) -> None:
    """`NoSpaceError` if the cache cannot fit. A sample is measured only where the settings alone leave a doubt."""
    space = _space(plan)
    num_targets = sum(example.num_targets for example in plan.to_write)
    if not space.fits(DOUBT * num_targets * bytes_per_target(plan.identity)):
        space.require(estimate(plan).num_bytes)


def _space(plan: Plan) -> Space:
    """The room for what the pass writes, to which a cache that it adds to does not belong."""
    space = space_for(plan.config.folder)
    return replace(space, present=space.present - plan.present_bytes)


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
def _progress(what: str, num_tokens: int, writer: CacheWriter, ranks: Ranks) -> Iterator[Callable[[int], None]]:
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
        disable=not (console.is_terminal and ranks.is_main),
    ) as bar:
        task = bar.add_task("", total=num_tokens, rate=0.0, written=decimal(0))

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            rate = done / max(time.monotonic() - started, 1e-9)
            bar.update(task, advance=tokens, rate=rate, written=decimal(writer.bytes_written))

        yield advance

"""A few examples of a teacher pass, run through teacher and codec with a watch and a scale beside them."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from distilllens.batches import pack_by_length
from distilllens.calibration import write_sketches
from distilllens.data import Example
from distilllens.pass_plan import Plan, planned
from distilllens_cache import CacheReader, CacheWriter

FIRST_EXAMPLES = 8
"""Examples of the first sample; a fast machine takes four times as many, again and again. On Dolly rows, what
8 examples say of the bytes of a target is 3 % too much on average, and 8 % at most."""
ENOUGH_SECONDS = 2.0
"""A sample that took this long is not repeated with more examples."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Sample:
    """What some examples took. Times are in seconds, sizes in bytes as they lie on the disk."""

    num_tokens: int
    num_targets: int
    padded_tokens: int
    """Tokens that went through the teacher, padding included."""
    forward_seconds: float
    """Of the bare teacher: hidden states, and the last layer's logits at target positions."""
    pass_seconds: float
    """Of the pass in memory: the forward pass with the lens at every layer, top-k and tails."""
    write_seconds: float
    """Of encoding, digesting and writing a shard."""
    read_seconds: float
    """Of reading, checking and decoding it."""
    calibration_seconds: float
    """Of the forward passes that sketches are fitted to; 0 without sketches."""
    fit_seconds: float
    """Of the fit itself, which takes as long for any number of targets."""
    target_bytes: int
    """Columns of targets, and codes and draws of the tail."""
    header_bytes: int
    """The rest of a shard's files: tokens, masks, headers, the sidecar."""
    fixed_bytes: int
    """Tokenizer, plan and sketches, whose size does not depend on the number of examples."""
    tail_sums: dict[int, np.ndarray]
    """(V,) int64 by layer that stores a profile."""


def choose_sample(examples: Sequence[Example], size: int) -> list[Example]:
    """Up to ``size`` examples, in their order, that look like the whole *per target position*.

    The examples are lined up by their number of targets, and every n-th target position picks the one that it lies in,
    so that bytes and seconds per target of the sample are those of the whole. A long example may be picked twice; it
    is taken once.
    """
    order = sorted(range(len(examples)), key=lambda place: (examples[place].num_targets, examples[place].digest))
    stops = np.cumsum([examples[place].num_targets for place in order])
    middles = (np.arange(size) + 0.5) / size * stops[-1]
    picked = {order[int(at)] for at in np.searchsorted(stops, middles, side="right")}
    return [examples[place] for place in sorted(picked)]


def padded_tokens(num_tokens: Sequence[int], *, token_budget: int) -> int:
    """Tokens of the batches that ``num_tokens`` are packed into, padding included."""
    batches = pack_by_length(num_tokens, token_budget=token_budget)
    return sum(len(batch) * num_tokens[batch[0]] for batch in batches)


def run_sample(plan: Plan) -> Sample:
    """Measure a sample: 8 examples, and more while that takes less than two seconds. Nothing outside is written."""
    examples, size = plan.to_write, FIRST_EXAMPLES
    while True:
        chosen = choose_sample(examples, size)
        found = measure_sample(plan, chosen)
        if found.pass_seconds >= ENOUGH_SECONDS or len(chosen) == len(examples) or size > len(examples):
            return found
        size *= 4


def measure_sample(plan: Plan, sample: Sequence[Example]) -> Sample:
    """What these examples take, through teacher and codec, in a folder that is gone afterwards."""
    budget = plan.config.batch_tokens
    with (
        tempfile.TemporaryDirectory() as scratch,
        CacheWriter(
            Path(scratch) / "sample",
            identity=plan.identity,
            examples=planned(sample),
            tokenizer_files=plan.tokenizer_files,
            shards=[range(len(sample))],
        ) as writer,
    ):
        folder = writer.folder
        clock = _Clock(plan)
        plan.teacher.forward(sample[:1], batch_tokens=budget)  # warm
        collected = [0.0]
        # A sketch fitted to the sample has the size of the real one.
        calibration, teacher = clock.time(
            lambda: write_sketches(
                plan.teacher,
                writer,
                sample,
                batch_tokens=budget,
                progress=lambda _: collected.append(clock.elapsed()),
            )
        )
        fixed = _size(folder, "*") - _size(folder, "index.arrow")
        forward, _ = clock.time(lambda: teacher.forward(sample, batch_tokens=budget))
        in_memory, (cached, tails) = clock.time(lambda: teacher.run(sample, first_index=0, batch_tokens=budget))
        write, _ = clock.time(lambda: writer.write_shard(0, cached, tails or None))
        writer.finish()
        reader = CacheReader(folder)
        read, _ = clock.time(lambda: reader.read_shard(0))
        manifest = reader.manifest
        of_rows = _size(folder, "shards/*.tail_rows.arrow")
        of_layers = sum(stats.bytes for stats in manifest.layer_stats.values())
        return Sample(
            num_tokens=manifest.num_tokens,
            num_targets=manifest.num_targets,
            padded_tokens=padded_tokens([example.num_tokens for example in sample], token_budget=budget),
            forward_seconds=forward,
            pass_seconds=in_memory,
            write_seconds=write,
            read_seconds=read,
            calibration_seconds=collected[-1],
            fit_seconds=calibration - collected[-1] if len(collected) > 1 else 0.0,
            target_bytes=of_layers + of_rows,
            header_bytes=manifest.shards[0].size - of_layers + _size(folder, "shards/*.json"),
            fixed_bytes=fixed,
            tail_sums=tails,
        )


class _Clock:
    """Seconds of a piece of work, the device's part included."""

    def __init__(self, plan: Plan) -> None:
        self._device = plan.teacher.lens.device
        self._started = 0.0

    def time(self, work: Callable[[], Result]) -> tuple[float, Result]:
        self._started = time.perf_counter()
        result = work()
        return self.elapsed(), result

    def elapsed(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - self._started


def _size(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.rglob(pattern) if file.is_file())

"""What a teacher pass would take, before it is paid for: rows, bytes, time."""

import tempfile
import time
from contextlib import suppress
from pathlib import Path

from rich.filesize import decimal

from distilllens.calibration import write_sketches
from distilllens.pass_plan import Plan, planned
from distilllens_cache import CacheWriter

INDEX_BYTES = 45
"""Bytes of one example in the cache's index: mostly its digest, which doesn't compress."""
SAMPLE_EXAMPLES = 8
"""Examples that --dry-run runs through the teacher to extrapolate time and bytes."""


def estimate(plan: Plan) -> str:
    """What the pass would take, extrapolated from one small timed batch through the real codec."""
    examples = plan.examples.examples
    # Spread over the lengths, so that the sample looks like the whole.
    by_length = sorted(range(len(examples)), key=lambda index: (examples[index].num_tokens, index))
    stride = max(1, len(examples) // SAMPLE_EXAMPLES)
    sample = [examples[index] for index in sorted(by_length[stride // 2 :: stride][:SAMPLE_EXAMPLES])]
    budget = plan.config.batch_tokens
    with tempfile.TemporaryDirectory() as scratch:
        writer = CacheWriter(
            Path(scratch) / "sample",
            identity=plan.identity,
            examples=planned(sample),
            tokenizer_files=plan.tokenizer_files,
            shards=[range(len(sample))],
        )
        # A sketch fitted to the sample has the size of the real one.
        teacher = write_sketches(plan.teacher, writer, sample, batch_tokens=budget)
        teacher.run(sample[:1], first_index=0, batch_tokens=budget)  # warm
        started = time.perf_counter()
        cached, tails = teacher.run(sample, first_index=0, batch_tokens=budget)
        seconds = time.perf_counter() - started
        writer.write_shard(0, cached, tails or None)
        folder = Path(scratch) / "sample"
        of_tails = sum(file.stat().st_size for file in folder.glob("shards/*.tails.arrow"))
        of_targets = sum(file.stat().st_size for file in folder.glob("shards/*.arrow")) - of_tails
        of_plan = folder_size(folder) - of_targets - of_tails
    sampled = sum(example.num_targets for example in sample)
    targets = sum(example.num_targets for example in examples)
    tokens = sum(example.num_tokens for example in examples)
    calibration = plan.identity.calibration_targets / targets
    seconds *= tokens / sum(example.num_tokens for example in sample) * (1 + min(1.0, calibration))
    per_target = of_targets / sampled
    # Every shard has tail sums, and the cache has their total.
    of_index = INDEX_BYTES * (len(examples) - len(sample))
    size = per_target * targets + of_tails * (len(plan.shards) + 1) + of_plan + of_index
    layers = plan.identity.layers
    facts = {
        "rows": f"{len(examples)} of {plan.examples.num_rows}",
        "tokens": f"{tokens}",
        "target positions": f"{targets}",
        "layers": ", ".join(map(str, layers)),
        "shards": f"{len(plan.shards)}",
        "bytes": f"about {decimal(int(size))} ({per_target / len(layers):.0f} per target and layer)",
        "time": f"about {_duration(seconds)} on this machine ({tokens / seconds:.0f} tokens/s)",
    }
    return "\n".join(f"{name:<19}{value}" for name, value in facts.items())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder, in which other ranks may be at work."""
    size = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            size += file.stat().st_size if file.is_file() else 0
    return size

"""What a teacher pass would take, before it is paid for: rows, bytes, hours, and when it pays."""

import math
from dataclasses import dataclass

import numpy as np
from rich.filesize import decimal

from distilllens.config import TrainConfig
from distilllens.console import counted
from distilllens.free_space import Space
from distilllens.pass_plan import Plan
from distilllens.pass_sample import Sample, padded_tokens, run_sample
from distilllens_cache import Identity
from distilllens_cache.tail_sums import encode_tails

INDEX_BYTES = 45
"""Bytes of one example in the cache's index: mostly its digest, which doesn't compress."""
TOKEN_BYTES = 1.5
"""Bytes of a token in a shard: its id, and its share of the target positions."""
EPOCHS = float(TrainConfig.model_fields["num_train_epochs"].default)
"""Epochs of one student, where the break-even is told in students."""


@dataclass(frozen=True)
class Estimate:
    """What a whole pass would take, extrapolated from a sample; with ``--append``, the pass over the rows it adds."""

    num_bytes: int
    """Of the finished cache, or of what an append adds to one."""
    bytes_per_target: float
    """Of what is stored of one target position at all layers."""
    pass_seconds: float
    """Of the pass: calibration, forward, lens, encoding and writing."""
    forward_seconds: float
    """Of one bare forward pass of the teacher over all rows."""
    read_seconds: float
    """Of reading the cache once."""

    @property
    def break_even_epochs(self) -> int | None:
        """Epochs of training, of all students together, from which on the cache is cheaper than the teacher online.

        The cache costs ``pass_seconds`` once and ``read_seconds`` in each epoch; the teacher online costs
        ``forward_seconds`` in each epoch of each student, so it is the least whole n >= 1 with
        ``pass + n * read <= n * forward``, or None if reading takes as long as the teacher. That favours
        online distillation: the forward pass is the bare one, with the last layer's logits at target positions only,
        while online a loss at lens layers also pays the products with the vocabulary there, and the teacher takes
        memory beside the student. All times are of one machine; loading the teacher is not in any.
        """
        saved = self.forward_seconds - self.read_seconds
        return max(1, math.ceil(self.pass_seconds / saved)) if saved > 0 else None


def estimate(plan: Plan) -> Estimate:
    """Run a sample through the real codec and extrapolate; nothing is written outside a temporary folder."""
    return extrapolate(plan, run_sample(plan))


def extrapolate(plan: Plan, sample: Sample) -> Estimate:
    """What the whole pass takes if its target positions and tokens are like those of the sample.

    The teacher's part grows with the tokens, padding included; lens, top-k, codec and disk with the targets. Tail sums
    have a size of their own for every shard: it is that of the sample's sums, scaled to the shard's targets.
    """
    examples, shards, identity = plan.to_write, plan.shards_to_write, plan.identity
    targets, tokens = (sum(getattr(example, name) for example in examples) for name in ("num_targets", "num_tokens"))
    more_targets = targets / sample.num_targets
    budget = plan.config.batch_tokens
    padded = sum(
        padded_tokens([plan.examples.examples[place].num_tokens for place in shard], token_budget=budget)
        for shard in shards
    )
    forward = sample.forward_seconds * padded / sample.padded_tokens
    of_lens = max(0.0, sample.pass_seconds - sample.forward_seconds)
    calibrated = min(identity.calibration_targets, targets) / sample.num_targets
    seconds = forward + (of_lens + sample.write_seconds) * more_targets
    fixed_bytes = 0
    if not plan.num_present:  # an append finds sketches and tokenizer there
        seconds += sample.calibration_seconds * calibrated + sample.fit_seconds
        fixed_bytes = sample.fixed_bytes
    headers = max(0.0, sample.header_bytes - TOKEN_BYTES * sample.num_tokens)
    size = (
        fixed_bytes
        + sample.target_bytes * more_targets
        + TOKEN_BYTES * tokens
        + headers * len(shards)
        + INDEX_BYTES * len(examples)
        + tail_sum_bytes(sample, identity, targets=targets, num_shards=len(shards))
    )
    return Estimate(
        num_bytes=round(size),
        bytes_per_target=sample.target_bytes / sample.num_targets,
        pass_seconds=seconds,
        forward_seconds=forward,
        read_seconds=sample.read_seconds * more_targets,
    )


def tail_sum_bytes(sample: Sample, identity: Identity, *, targets: int, num_shards: int) -> int:
    """Bytes of the tail sums of every shard and of the cache: larger sums have more digits, and compress less."""
    if not sample.tail_sums:
        return 0
    random = np.random.Generator(np.random.Philox(key=[0, 0]))

    def size(num_targets: int) -> int:
        factor = max(1.0, num_targets / sample.num_targets)
        # Below a factor of whole numbers the scaled sums would have digits that are too regular.
        sums = {
            layer: (values * factor + random.uniform(0, factor - 1, values.shape)).astype(np.int64)
            for layer, values in sample.tail_sums.items()
        }
        return encode_tails(sums, identity, num_targets=max(targets, sample.num_targets), name="tail sums").nbytes

    return size(targets) + num_shards * size(-(-targets // num_shards))


def describe(plan: Plan, found: Estimate, space: Space) -> str:
    """The estimate for people, a fact a line."""
    examples, layers = plan.to_write, plan.identity.layers
    tokens = sum(example.num_tokens for example in examples)
    there = f", {decimal(space.present)} there already" if space.present > 0 else ""
    there = f", {decimal(-space.present)} to fetch first" if space.present < 0 else there
    fits = "" if space.fits(found.num_bytes) else ": it does not fit"
    rows, size = f"{len(examples)} of {plan.examples.num_rows}", decimal(found.num_bytes)
    if plan.num_present:
        rows, size = f"{len(examples)} more, after {plan.num_present} in the cache", f"{size} more"
    facts = {
        "rows": rows,
        "tokens": f"{tokens}",
        "target positions": f"{sum(example.num_targets for example in examples)}",
        "layers": ", ".join(map(str, layers)),
        "shards": f"{len(plan.shards_to_write)}",
        "bytes": f"about {size} ({found.bytes_per_target / len(layers):.0f} per target and layer)",
        "free space": f"{decimal(space.free)} in {space.parent}{there}{fits}",
        "time": f"about {_duration(found.pass_seconds)} on this machine ({tokens / found.pass_seconds:.0f} tokens/s)",
        "break-even": _break_even(found),
    }
    return "\n".join(f"{name:<19}{value}" for name, value in facts.items())


def _break_even(found: Estimate) -> str:
    epochs = found.break_even_epochs
    if epochs is None:
        return "never on this machine: reading the cache takes as long as the teacher's forward pass"
    students = math.ceil(epochs / EPOCHS)
    cost = found.pass_seconds / found.forward_seconds
    return (
        f"from {counted(epochs, 'epoch')} on, {counted(students, 'student')} of {EPOCHS:g} "
        f"(the pass costs {cost:.1f} bare forward passes, the teacher online one an epoch)"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

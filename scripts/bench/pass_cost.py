"""What a teacher pass spends beside the teacher, and how much faster its cache is read than a student trains.

    python scripts/bench/pass_cost.py --teacher teacher --student student --data rows.jsonl
    python scripts/bench/pass_cost.py --teacher teacher --student student --data rows.jsonl --examples 16 --steps 2

One run, one machine, with the default settings of `cache-teacher` and `train`. Times are seconds of the process's CPU
time on one thread, each the best of some rounds, so that other work on the machine counts as little as it can; the
disk's time is that of the clock. A target is a target position with all its layers.

- ``teacher``: the bare forward pass, with the last layer's logits at target positions.
- ``lens``: norm and head at the lens layers, the products that any use of these layers pays.
- ``top-k and tails``: the rest of the pass in memory: hidden states kept, top-k, rest, tail sums, codes.
- ``encoding``: checks, codec, digests and the system calls of a shard. ``disk``: writing and flushing its bytes.
- ``reading``: digest, parsing, checks and decoding. ``training``: batch, forward, loss, backward and AdamW.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distilllens.calibration import write_sketches
from distilllens.collate import collate
from distilllens.config import CacheTeacherConfig, TrainConfig
from distilllens.engine import build_optimizer
from distilllens.pass_plan import Plan, open_plan, planned
from distilllens.pass_sample import choose_sample
from distilllens.teacher_pass import LOGIT_ROWS
from distilllens.training_run import open_run
from distilllens_cache import CacheReader, CacheWriter
from distilllens_cache.atomic import write_file

MOST_WRITING = 0.05
"""Share of the pass that encoding and writing should cost at most."""
LEAST_FASTER = 200
"""Times that reading should be faster than training, at least."""


def best(work: Callable[[], object], rounds: int, clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of the fastest round."""
    times = []
    for _ in range(rounds):
        started = clock()
        work()
        times.append(clock() - started)
    return min(times)


def measure_pass(plan: Plan, folder: Path, *, num_examples: int, rounds: int) -> dict[str, float]:
    """Seconds of each part of a pass over some examples, whose finished cache is left in ``folder``."""
    sample, budget = choose_sample(plan.examples.examples, num_examples), plan.config.batch_tokens
    num_targets = sum(example.num_targets for example in sample)
    scratch = folder.with_name("scratch")

    def new_writer(name: str) -> CacheWriter:
        return CacheWriter(
            folder.with_name(name),
            identity=plan.identity,
            examples=planned(sample),
            tokenizer_files=plan.tokenizer_files,
            shards=[range(len(sample))],
        )

    def write(name: str) -> CacheWriter:
        writer = new_writer(name)
        for layer, sketch in sketches.items():
            writer.write_sketch(layer, *sketch)
        started = time.process_time()
        writer.write_shard(0, *in_memory)
        written.append(time.process_time() - started)
        return writer

    first = new_writer("first")
    teacher = write_sketches(plan.teacher, first, sample, batch_tokens=budget)
    sketches = first.sketches()
    teacher.forward(sample, batch_tokens=budget)  # warm
    forward = best(lambda: teacher.forward(sample, batch_tokens=budget), rounds)
    rows = torch.randn(num_targets, plan.teacher.model.config.get_text_config().hidden_size)
    lens_layers = plan.identity.layers[:-1]

    @torch.inference_mode()
    def lens() -> None:
        for layer in lens_layers:
            for part in rows.split(LOGIT_ROWS):
                teacher.lens.head(teacher.lens.normed(part, layer))

    of_lens = best(lens, rounds)
    results: list[Any] = []
    whole = best(lambda: results.append(teacher.run(sample, first_index=0, batch_tokens=budget)), rounds)
    cached, tails = results[-1]
    in_memory = cached, tails or None
    written: list[float] = []
    for number in range(rounds):
        write(f"again-{number}")
    write(folder.name).finish()
    shard = [file.read_bytes() for file in (folder / "shards").iterdir()]
    disk = best(lambda: [write_file(scratch, data) for data in shard], rounds, time.perf_counter)
    return {
        "targets": num_targets,
        "tokens": sum(example.num_tokens for example in sample),
        "teacher": forward,
        "lens": of_lens,
        "top-k and tails": max(0.0, whole - forward - of_lens),
        "encoding": min(written),
        "disk": disk,
    }


def measure_training(cache: Path, student: str, output: Path, *, steps: int, batch_size: int) -> float:
    """Targets per second of CPU time, the first step left out."""
    config = TrainConfig(
        student=student, cache=(str(cache),), output_dir=output, per_device_train_batch_size=batch_size, device="cpu"
    )
    run = open_run(config, start_from=None)
    optimizer = build_optimizer(run.student, config)
    run.student.train()
    seconds, targets = 0.0, 0
    for step in range(steps + 1):
        started = time.process_time()
        examples = [run.source[(step * batch_size + place) % len(run.source)] for place in range(batch_size)]
        num_targets = sum(len(example.target_positions) for example in examples)
        (run.student(collate(examples, run.tails))["total"] / num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step:
            seconds, targets = seconds + time.process_time() - started, targets + num_targets
    return targets / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--data", required=True, help="rows, as for cache-teacher --dataset")
    parser.add_argument("--limit", type=int, default=150, help="rows to choose the examples from")
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="training steps that are timed")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "cache"
        config = CacheTeacherConfig(
            teacher=arguments.teacher,
            dataset=arguments.data,
            limit=arguments.limit,
            output_dir=folder,
            device="cpu",
        )
        plan = open_plan(config, Path(scratch) / "tokenizer")
        found = measure_pass(plan, folder, num_examples=arguments.examples, rounds=arguments.rounds)
        targets, reader = found["targets"], CacheReader(folder)
        read = targets / best(lambda: reader.read_shard(0), max(5, arguments.rounds))
        trained = measure_training(
            folder, arguments.student, Path(scratch) / "run", steps=arguments.steps, batch_size=arguments.batch_size
        )
    parts = ("teacher", "lens", "top-k and tails", "encoding", "disk")
    whole = sum(found[part] for part in parts)
    layers = ", ".join(map(str, plan.identity.layers))
    print(f"{targets:.0f} targets of {found['tokens']:.0f} tokens, layers {layers}\n")
    for part in parts:
        seconds = found[part]
        share, each = seconds / whole, 1e3 * seconds / targets
        print(f"{part:<18}{seconds:>9.3f} s {share:>7.1%} of the pass {each:>9.3f} ms a target")
    writing, faster = (found["encoding"] + found["disk"]) / whole, read / trained
    print(f"\nthe pass takes {whole / found['teacher']:.2f} times the bare forward pass")
    print(f"writing: {writing:.2%} of the pass; {MOST_WRITING:.0%} at most: {verdict(writing <= MOST_WRITING)}")
    print(f"reading {read:,.0f} targets/s, training {trained:,.1f} targets/s")
    print(f"reading: {faster:,.0f} times as fast; {LEAST_FASTER} at least: {verdict(faster >= LEAST_FASTER)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found | {"read": read, "trained": trained}, indent=1) + "\n")


def verdict(is_reached: bool) -> str:
    return "reached" if is_reached else "missed"


if __name__ == "__main__":
    main()

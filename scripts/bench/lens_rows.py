"""What `--lens-rows` costs and saves: a step's gradient from a share of the lens rows, against that from all of them.

    python scripts/bench/lens_rows.py --student S --cache C --output lens_rows.json

A share of the rows is drawn as training draws them, so its gradient is unbiased; what it costs is noise. Measured
beside it is the noise that training has anyway: how far the gradients of two batches of the same size lie apart.
Gradients are those of all the student's weights. CPU time is that of a forward and backward pass, in turns.
"""

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distilllens.batches import Steps
from distilllens.collate import collate
from distilllens.config import TrainConfig
from distilllens.lens_rows import choose_lens_rows
from distilllens.student import Student
from distilllens.training_run import TrainingRun, open_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--draws", type=int, default=3, help="draws of each share in each batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = TrainConfig(student=arguments.student, cache=arguments.cache, output_dir=arguments.output.parent)
    found = measure(open_run(config, start_from=None), arguments)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print_table(found)


def measure(run: TrainingRun, arguments: argparse.Namespace) -> dict[str, Any]:
    """Cosines by share, mean over batches and draws, of the lens loss and the whole loss; CPU time against all rows."""
    without_lens = Student(run.model, run.student.lens, replace(run.student.objective, lens_weight=0.0))
    steps = Steps(run.source, seed=0, examples_per_micro_batch=arguments.batch_size, micro_batches=1)
    cosines: dict[float, list[Cosines]] = {share: [] for share in arguments.shares}
    seconds: dict[float, list[float]] = {share: [] for share in (1.0, *arguments.shares)}
    between: list[Cosines] = []
    before: Tensor | None = None
    before_lens: Tensor | None = None
    for step in range(arguments.batches):
        rest, _ = gradient(without_lens, run, steps, step)
        whole, spent = gradient(run.student, run, steps, step)
        seconds[1.0].append(spent)
        if before is not None and before_lens is not None:
            between.append(Cosines(cosine(whole - rest, before_lens), cosine(whole, before)))
        before, before_lens = whole, whole - rest
        for share in arguments.shares:
            for draw in range(arguments.draws):
                some, spent = gradient(run.student, run, steps, step, share=share, draw=draw)
                cosines[share].append(Cosines(cosine(some - rest, whole - rest), cosine(some, whole)))
                seconds[share].append(spent)
    all_rows = median(seconds[1.0])
    return {
        "shares": {
            str(share): means(cosines[share]) | {"cpu_time": median(seconds[share]) / all_rows}
            for share in arguments.shares
        },
        "another_batch": means(between),
        "batches": arguments.batches,
        "draws": arguments.draws,
    }


class Cosines(NamedTuple):
    """How far two gradients point the same way."""

    lens: float
    """That of the lens loss alone."""
    loss: float
    """That of the whole loss."""


def means(found: list[Cosines]) -> dict[str, float]:
    """Of both cosines; nothing of nothing."""
    return {name: mean(getattr(one, name) for one in found) for name in Cosines._fields if found}


def gradient(
    student: Student, run: TrainingRun, steps: Steps, step: int, *, share: float = 1.0, draw: int = 0
) -> tuple[Tensor, float]:
    """The gradient of a step's loss at all weights as one vector, and the CPU seconds it took."""
    examples = [run.source[index] for index in steps.micro_batch(step, 0, 0)]
    rows = choose_lens_rows(examples, student.objective.lens_layers, share=share, seed=draw, step=step)
    batch = collate(examples, run.tails, lens_rows=rows)
    student.zero_grad()
    started = time.process_time()
    student(batch)["total"].backward()
    spent = time.process_time() - started
    return flat_gradient(student), spent


def flat_gradient(module: nn.Module) -> Tensor:
    """Gradients of all weights, one after another, in float32."""
    return torch.cat([p.grad.flatten().float() for p in module.parameters() if p.grad is not None])


def cosine(one: Tensor, other: Tensor) -> float:
    """Of the angle between two long vectors: float32 is too coarse for their sums."""

    def dot(a: Tensor, b: Tensor) -> float:
        return (a * b).sum(dtype=torch.float64).item()

    return dot(one, other) / math.sqrt(dot(one, one) * dot(other, other))


def print_table(found: dict[str, Any]) -> None:
    """A line for each share, and the noise that batches have anyway."""
    print(f"{'lens rows':<14}{'cosine, lens':>14}{'cosine, loss':>14}{'CPU time':>10}")
    for share, line in found["shares"].items():
        print(f"{float(share):<14.3g}{line['lens']:>14.4f}{line['loss']:>14.4f}{line['cpu_time']:>10.2f}")
    if line := found["another_batch"]:
        print(f"{'another batch':<14}{line['lens']:>14.4f}{line['loss']:>14.4f}")


if __name__ == "__main__":
    main()

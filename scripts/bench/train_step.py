"""Time and memory of a training step: ours, plain fine-tuning as the floor, and the teacher in memory.

    python scripts/bench/train_step.py --teacher T --student S --cache C --json train_step.json

Every way takes the same batches and AdamW, in a process of its own, in turns. The floor is the same student fine-tuned
with plain cross-entropy: the faster of Hugging Face's loss and our `--method sft`. The online way is that of the
released DistillLens: the teacher runs in every step, and all layers have dense float32 logits on both sides. The lens
products are what no way to match n layers can save: three products with the head for each of them.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cost import forget_peak, memory
from products import three_products
from torch import Tensor
from torch.nn import functional

from distilllens.batches import Steps
from distilllens.collate import Batch, collate
from distilllens.config import TrainConfig
from distilllens.engine import build_optimizer
from distilllens.lens import LogitLens
from distilllens.lens_rows import choose_lens_rows
from distilllens.models import load_model
from distilllens.training_run import TrainingRun, open_run

FLOORS = ("cross-entropy (Hugging Face)", "cross-entropy (ours)")
PRODUCTS = "lens products"
OURS = "ours"
QUARTER = "ours, a quarter of the lens rows"
ONLINE = "online (released DistillLens)"
WAYS = (*FLOORS, PRODUCTS, OURS, QUARTER, ONLINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each way and round, after a first one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way in WAYS:
            # A process for each: its peak is then its own, and no other's memory serves it.
            with multiprocessing.get_context("fork").Pool(1) as process:
                found[way].append(process.apply(run_way, (way, arguments)))
    figures = summarise(found)
    print_table(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def run_way(way: str, arguments: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of a step, peak MiB of the process while it trains, and the size of the head's gradient."""
    torch.set_num_threads(arguments.threads)
    is_floor = way in FLOORS
    config = TrainConfig(
        student=arguments.student,
        cache=arguments.cache,
        method="sft" if is_floor else "distilllens",
        lens_rows=0.25 if way == QUARTER else 1.0,
        output_dir=Path("unused"),
    )
    run = open_run(config, start_from=None)
    optimizer = build_optimizer(run.student, config)
    total = losses_of(way, run, arguments.teacher)
    run.student.train()
    steps = Steps(run.source, seed=0, examples_per_micro_batch=arguments.batch_size, micro_batches=1)

    def step(number: int) -> None:
        examples = [run.source[index] for index in steps.micro_batch(number, 0, 0)]
        layers = run.student.objective.lens_layers
        rows = choose_lens_rows(examples, layers, share=config.lens_rows, seed=0, step=number)
        total(collate(examples, run.tails, lens_rows=rows)).backward()
        if way != PRODUCTS:
            optimizer.step()
        optimizer.zero_grad()

    step(0)
    forget_peak()
    started = time.process_time()
    for number in range(1, arguments.steps + 1):
        step(number)
    head = run.student.lens.matrix_head()
    assert head is not None
    return {
        "seconds": (time.process_time() - started) / arguments.steps,
        "peak": memory("VmHWM"),
        "head": head.weight.numel() * 4 / 2**20,
    }


def losses_of(way: str, run: TrainingRun, teacher: str) -> Callable[[Batch], Tensor]:
    """The loss of a batch in one way."""
    if way == FLOORS[0]:
        return lambda batch: hugging_face_loss(run, batch)
    if way == PRODUCTS:
        return lambda batch: lens_products(run, batch)
    if way == ONLINE:
        return Online(run, teacher)
    return lambda batch: run.student(batch)["total"] / len(batch.next_ids)


def hugging_face_loss(run: TrainingRun, batch: Batch) -> Tensor:
    """The model's own loss on the labels that instruction tuning gives it."""
    labels = torch.full_like(batch.input_ids, -100)
    labels[:, 1:][batch.is_target[:, :-1]] = batch.next_ids
    return run.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss


def lens_products(run: TrainingRun, batch: Batch) -> Tensor:
    """The bare products of each lens layer's rows with the head."""
    head = run.student.lens.matrix_head()
    assert head is not None
    weight = head.weight.detach()
    for _ in run.student.objective.lens_pairs:
        three_products(torch.zeros(len(batch.next_ids), weight.shape[1]), weight, chunk_rows=run.student.chunk_rows)
    return torch.zeros((), requires_grad=True)


class Online:
    """Teacher in memory; dense float32 logits of all layers on both sides, at all positions, masked afterwards."""

    def __init__(self, run: TrainingRun, teacher: str) -> None:
        self.student = run.student
        self.teacher = LogitLens(load_model(teacher).eval(), lens_norm="final", vocab_size=run.student.lens.vocab_size)

    def __call__(self, batch: Batch) -> Tensor:
        pairs = (*self.student.objective.lens_pairs, (self.student.lens.num_layers, self.teacher.num_layers))
        with torch.no_grad():
            of_teacher = self._logits(self.teacher, batch, [teacher for _, teacher in pairs])
        of_student = self._logits(self.student.lens, batch, [student for student, _ in pairs])
        count = batch.is_target.sum()
        *lens, (student, teacher) = [(of_student[s], of_teacher[t]) for s, t in pairs]
        task = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)
        ce = functional.cross_entropy(student[batch.is_target], batch.next_ids)
        losses = [self._jsd(*logits)[batch.is_target].sum() for logits in lens]
        return ce + (task[batch.is_target].sum() + torch.stack(losses).mean()) / count

    def _logits(self, lens: LogitLens, batch: Batch, layers: list[int]) -> dict[int, Tensor]:
        hidden = lens.hidden_states(batch.input_ids, batch.attention_mask, sorted(layers))
        return {layer: lens.head(lens.normed(states, layer)).float() for layer, states in hidden.items()}

    @staticmethod
    def _jsd(student: Tensor, teacher: Tensor) -> Tensor:
        q, p = student.softmax(-1), teacher.softmax(-1)
        log_m = torch.log((p + q) / 2 + 1e-8)
        of_p = (p * (teacher.log_softmax(-1) - log_m)).sum(-1)
        return (of_p + (q * (student.log_softmax(-1) - log_m)).sum(-1)) / 2


def summarise(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Step time against the floor (median and range over rounds), peak MiB beyond it, and the goals."""
    median = {way: statistics.median(one["seconds"] for one in found[way]) for way in WAYS}
    floor = min(FLOORS, key=median.__getitem__)
    peak = {way: statistics.median(one["peak"] for one in found[way]) for way in WAYS}
    base, head = peak[floor], found[OURS][0]["head"]
    bound = median[floor] + median[PRODUCTS]
    return {
        "floor": floor,
        "ways": {
            way: {
                "time": median[way] / median[floor],
                "low": min(a["seconds"] / b["seconds"] for a, b in zip(found[way], found[floor], strict=True)),
                "high": max(a["seconds"] / b["seconds"] for a, b in zip(found[way], found[floor], strict=True)),
                "peak_mib": peak[way],
                "extra_mib": peak[way] - base,
            }
            for way in WAYS
        },
        "goals": {
            "time of ours / (floor + lens products), at most 1.15": median[OURS] / bound,
            "time of online / ours, at least 3": median[ONLINE] / median[OURS],
            "extra memory of ours less the head's gradient / floor, at most 0.10": (peak[OURS] - base - head) / base,
            "extra memory of ours / online's, at most 0.25": (peak[OURS] - base) / (peak[ONLINE] - base),
        },
    }


def print_table(figures: dict[str, Any]) -> None:
    """A line for each way, and one for each goal."""
    print(f"{'way':<36}{'CPU time / floor':>18}{'range':>16}{'peak MiB':>10}{'beyond floor':>14}")
    for way, one in figures["ways"].items():
        print(
            f"{way:<36}{one['time']:>18.2f}{one['low']:>9.2f}-{one['high']:<6.2f}"
            f"{one['peak_mib']:>10.0f}{one['extra_mib']:>14.0f}"
        )
    for goal, value in figures["goals"].items():
        print(f"{goal:<72}{value:>8.2f}")


if __name__ == "__main__":
    main()

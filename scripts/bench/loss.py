"""Time and memory of the lens loss, ours beside the others' ways, alternating in one process on real-sized tensors.

    python scripts/bench/loss.py                     # 2,048 rows, H = 576, V = 49,152, k = 64: minutes on two cores
    python scripts/bench/loss.py --rows 512 --rounds 2 --threads 1

Every way computes one JSD of a student against sparse targets, with its gradients at hidden states and head. ``floor``
is the three bare products (logits, gradients at states and at head). Time is the process's CPU time as a ratio
to the floor of the same round (median and range over rounds); memory is the growth of the resident set during one call.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from cost import measured
from products import three_products
from torch import Tensor
from torch.nn import functional

from distilllens.chunked import sum_over_chunks
from distilllens.divergence import sparse_divergence
from distilllens.fused import Group, Head, Loss, fused_losses
from distilllens.tails import BucketTail, ProfileTail, SketchTail, Tail
from distilllens.targets import join_rows, take_top_k

CHUNK = 128
"""Rows whose logits are alive at a time: the default of ``loss_chunk_rows``."""
RANK = 64


class Problem:
    """Student states and head, and a teacher near the student: its targets, and its dense logits for who needs them."""

    def __init__(self, rows: int, hidden: int, vocab: int, k: int) -> None:
        torch.manual_seed(0)
        self.weight = (torch.randn(vocab, hidden) * 0.12).requires_grad_()
        self.states = torch.randn(rows, hidden).requires_grad_()
        with torch.no_grad():
            self.teacher_states = self.states + 0.3 * torch.randn(rows, hidden)
            parts = [take_top_k(part @ self.weight.T, k) for part in self.teacher_states.split(CHUNK)]
        codes = torch.randint(-40, 40, (rows, RANK), dtype=torch.int8)
        self.targets = replace(join_rows(parts), codes=codes)
        self.profile = ProfileTail(torch.randn(vocab).mul(2).log_softmax(-1))
        self.sketch = SketchTail(torch.randn(vocab, RANK) / 100, torch.randn(vocab))

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.states, self.weight))

    # the ways

    def floor(self) -> None:
        """Three products."""
        three_products(self.states.detach(), self.weight.detach(), chunk_rows=CHUNK)

    def fused(self, tail: Tail) -> None:
        """Ours."""
        group = Group(len(self.states), (Loss("jsd", self.targets, tail, 1.0),))
        self.gradients(fused_losses(self.states, Head(self.weight), [group], chunk_rows=CHUNK).total / len(self.states))

    def checkpointed(self, tail: Tail) -> None:
        """Chunks under autograd, logits computed twice (as TRL and NeMo do); our plain twin."""

        def losses(logits: Tensor, where: slice) -> Tensor:
            return sparse_divergence("jsd", logits, self.targets[where], tail).sum()[None]

        head = lambda rows: functional.linear(rows, self.weight)  # noqa: E731
        self.gradients(sum_over_chunks(head, self.states, losses, chunk_rows=CHUNK)[0])

    def per_chunk_gradients(self) -> None:
        """Each chunk's gradient by its own small graph, added up: the way of Liger's chunked losses."""
        of_weight, of_states = torch.zeros_like(self.weight), []
        for start in range(0, len(self.states), CHUNK):
            where = slice(start, start + CHUNK)
            rows = self.states[where].detach().requires_grad_()
            weight = self.weight.detach().requires_grad_()
            loss = sparse_divergence("jsd", rows @ weight.T, self.targets[where], BucketTail()).sum()
            mine, theirs = torch.autograd.grad(loss, (rows, weight))
            of_states.append(mine)
            of_weight += theirs

    def per_layer_logits(self) -> None:
        """Whole logits of one layer at a time, logsumexp and a gather: the way of DistillKit's sparse losses."""
        loss = torch.zeros(())
        quarter = max(1, len(self.states) // 4)
        for start in range(0, len(self.states), quarter):
            targets = self.targets[start : start + quarter]
            logits = self.states[start : start + quarter] @ self.weight.T
            log_q = logits.gather(-1, targets.ids) - logits.logsumexp(-1, keepdim=True)
            log_s = torch.log((1 - log_q.exp().sum(-1)).clamp_min(1e-8))
            log_p = torch.cat([targets.log_probs, targets.log_rest[:, None]], -1)
            log_q = torch.cat([log_q, log_s[:, None]], -1)
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            loss = loss + (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum() / 2
        self.gradients(loss)

    def dense(self) -> None:
        """Dense float32 logits of all rows on both sides, as the released code; the teacher's product is not timed."""
        teacher = self._dense_teacher
        student = self.states @ self.weight.T
        p, q = functional.softmax(teacher, -1), functional.softmax(student, -1)
        log_m = torch.log((p + q) / 2 + 1e-8)
        of_p = (p * (functional.log_softmax(teacher, -1) - log_m)).sum(-1)
        of_q = (q * (functional.log_softmax(student, -1) - log_m)).sum(-1)
        self.gradients(((of_p + of_q) / 2).sum())

    def prepare_dense(self) -> None:
        with torch.no_grad():
            self._dense_teacher = self.teacher_states @ self.weight.T

    def forget_dense(self) -> None:
        del self._dense_teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ours-only", action="store_true", help="leave the others out, as for 8,192 rows")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    problem = Problem(arguments.rows, arguments.hidden, arguments.vocab, arguments.top_k)
    ways: dict[str, Callable[[], None]] = {
        "floor: three products": problem.floor,
        "fused, bucket": lambda: problem.fused(BucketTail()),
        "fused, profile": lambda: problem.fused(problem.profile),
        f"fused, sketch:{RANK}": lambda: problem.fused(problem.sketch),
    }
    if not arguments.ours_only:
        ways |= {
            "checkpointed chunks, bucket": lambda: problem.checkpointed(BucketTail()),
            "checkpointed chunks, profile": lambda: problem.checkpointed(problem.profile),
            f"checkpointed chunks, sketch:{RANK}": lambda: problem.checkpointed(problem.sketch),
            "graph per chunk, bucket (Liger's way)": problem.per_chunk_gradients,
            "logits per layer, bucket (DistillKit's way)": problem.per_layer_logits,
            "dense float32 (released DistillLens)": problem.dense,
        }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, float] = {}
    for number in range(arguments.rounds + 1):
        for name, way in ways.items():
            if way == problem.dense:
                problem.prepare_dense()
            elapsed, peak = measured(way)
            if way == problem.dense:
                problem.forget_dense()
            peaks[name] = max(peaks.get(name, 0.0), peak)
            if number:  # the first round warms
                seconds[name].append(elapsed)
    print_table(seconds, peaks, arguments)


def print_table(seconds: dict[str, list[float]], peaks: dict[str, float], arguments: argparse.Namespace) -> None:
    floor = next(iter(seconds.values()))
    print(
        f"{arguments.rows} rows, H = {arguments.hidden}, V = {arguments.vocab}, k = {arguments.top_k}, "
        f"{arguments.threads} threads, torch {torch.__version__}"
    )
    print(f"{'way':<46}{'CPU time / floor':>20}{'range':>16}{'peak MiB':>10}")
    figures = {}
    for name, times in seconds.items():
        ratios = [mine / base for mine, base in zip(times, floor, strict=True)]
        median = statistics.median(ratios)
        figures[name] = {"ratio": median, "low": min(ratios), "high": max(ratios), "peak_mib": peaks[name]}
        print(f"{name:<46}{median:>20.2f}{min(ratios):>9.2f}-{max(ratios):<6.2f}{peaks[name]:>10.0f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

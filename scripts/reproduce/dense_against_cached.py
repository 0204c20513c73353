"""The same student trained from the dense teacher in memory and from what a cache keeps of it.

    python scripts/reproduce/dense_against_cached.py --teacher T --student S --data dolly_train.jsonl --output out
    python scripts/reproduce/dense_against_cached.py ... --arms dense default --seeds 0 1 2     # some of the runs

Every run sees the same batches in the same order (a function of its seed); only the targets differ. The dense arm runs
the teacher in every step and takes its whole distributions, as a sketch of full rank without rounding: the same loss
with nothing left out. All arms are measured against the dense teacher on held-out rows. Runs are resumable, and each
arm and seed may run in a process of its own; the table is made of whatever is there.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from distilllens.batches import Steps
from distilllens.cache_teacher import run_cache_teacher
from distilllens.checkpoint import find_checkpoint
from distilllens.collate import Batch
from distilllens.config import CacheTeacherConfig, TrainConfig
from distilllens.data import load_examples
from distilllens.divergence import forward_kl, jensen_shannon
from distilllens.launch import choose_device
from distilllens.lens import LogitLens, rows_at
from distilllens.models import load_model
from distilllens.student import Pairs, Student
from distilllens.tails import SketchTail
from distilllens.targets import SparseTargets, join_rows, take_top_k
from distilllens.train import run_opened
from distilllens.training_run import open_run

ARMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "default": {},
    "sketch": {"tail": "lens=profile,final=sketch"},
    "bucket": {"tail": "bucket"},
    "sampled": {"tail": "sampled"},
    "renorm": {"tail": "renorm"},
    "quarter": {"lens_rows": 0.25},
}
"""By name, what a run changes; `quarter` draws a quarter of the lens rows in every step."""
STORE_TAIL = "lens=profile+sampled:16,final=profile+sketch:64+sampled:16"
CHUNK = 128


class DenseStudent(Student):
    """A student whose batches get the teacher's whole distributions in place of their cached targets."""

    def __init__(self, student: Student, teacher: LogitLens, weight: Tensor) -> None:
        super().__init__(student.model, student.lens, student.objective, chunk_rows=student.chunk_rows)
        self.teacher = (teacher, weight)  # in a tuple, so that its weights are not trained

    def forward(
        self, batch: Batch, measured_pairs: Pairs | None = None, lens_factor: float = 1.0, **options: Any
    ) -> dict[str, Tensor]:
        """The student's sums."""
        teacher, weight = self.teacher
        layers = tuple(batch.targets)
        with torch.no_grad():
            hidden = teacher.hidden_states(batch.input_ids, batch.attention_mask, layers)
            rows = {layer: teacher.normed(rows_at(hidden[layer], batch.is_target), layer) for layer in layers}
            targets = {layer: whole_targets(states, teacher) for layer, states in rows.items()}
        tail = SketchTail(weight, torch.zeros(len(weight)))
        dense = replace(batch, targets=targets, tails=dict.fromkeys(layers, tail))
        return super().forward(dense, measured_pairs, lens_factor, **options)


def whole_targets(states: Tensor, teacher: LogitLens) -> SparseTargets:
    """The likeliest token, and codes that give every other one exactly: the states themselves."""
    parts = [replace(take_top_k(teacher.head(part), 1), codes=part) for part in states.split(CHUNK)]
    return join_rows(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--data", required=True, help="rows as for cache-teacher; the last of --rows are held out")
    parser.add_argument("--rows", type=int, default=420)
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--layers", default="anchors:2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4, help="rows per step; Dolly has about 130 tokens in each")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prepare", action="store_true", help="only write the cache")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cache = prepare(arguments)
    if arguments.prepare:
        return
    for seed in arguments.seeds:
        for arm in arguments.arms:
            result = arguments.output / f"{arm}-seed{seed}.json"
            if not result.exists():
                found = run(arm, seed, cache, arguments)
                result.write_text(json.dumps(found, indent=1) + "\n")
    print_table(arguments.output)


def prepare(arguments: argparse.Namespace) -> Path:
    """The cache of all arms: default widths, and every tail that an arm reads."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows, cache = arguments.output / "rows.jsonl", arguments.output / "cache"
    if not rows.exists():
        lines = Path(arguments.data).read_text("utf-8").splitlines()[: arguments.rows]
        rows.write_text("\n".join(lines[: -arguments.held_out]) + "\n", "utf-8")
        (arguments.output / "held_out.jsonl").write_text("\n".join(lines[-arguments.held_out :]) + "\n", "utf-8")
    if not (cache / "manifest.json").exists():
        run_cache_teacher(
            CacheTeacherConfig(
                teacher=arguments.teacher,
                dataset=str(rows),
                layers=arguments.layers,
                max_length=256,
                store_tail=STORE_TAIL,
                output_dir=cache,
            )
        )
    return cache


def run(arm: str, seed: int, cache: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one arm, and measure it against the dense teacher."""
    folder = arguments.output / f"{arm}-seed{seed}"
    config = TrainConfig(
        student=arguments.student,
        cache=(str(cache),),
        seed=seed,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=5e-4,
        warmup_steps=5,
        save_steps=20,
        save_total_limit=1,
        output_dir=folder,
        **ARMS[arm],
    )
    checkpoint = find_checkpoint(folder, "latest")
    opened = open_run(config, start_from=checkpoint)
    if arm == "dense":
        model = load_model(arguments.teacher).eval()
        teacher = LogitLens(model, lens_norm="final", vocab_size=opened.student.lens.vocab_size)
        head = teacher.matrix_head()
        assert head is not None
        dense = DenseStudent(opened.student, teacher, head.weight.detach())
        opened = replace(opened, student=dense)
    opened = replace(opened, identity=opened.identity | {"arm": arm})
    first = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    started = time.process_time()
    run_opened(opened, choose_device("cpu"), checkpoint)
    seconds = (time.process_time() - started) / max(1, arguments.steps - first)
    steps = Steps(opened.source, seed=seed, examples_per_micro_batch=arguments.batch_size, micro_batches=1)
    indices = [index for step in range(arguments.steps) for index in steps.indices(step)]
    tokens = sum(int(opened.source.num_tokens[index]) for index in indices) / arguments.steps  # type: ignore[attr-defined]
    pairs = opened.student.objective.pairs
    found = measure(opened.model, arguments.teacher, arguments.output / "held_out.jsonl", pairs)
    return {"arm": arm, "seed": seed, "cpu_seconds_per_step": seconds, "tokens_per_step": tokens} | found


@torch.inference_mode()
def measure(student: Any, teacher_folder: str, rows: Path, pairs: tuple[tuple[int, int], ...]) -> dict[str, float]:
    """Mean KL to the dense teacher at the final layer, and mean lens JSD of each pair, over held-out targets."""
    teacher, tokenizer = load_model(teacher_folder).eval(), AutoTokenizer.from_pretrained(teacher_folder)
    examples = load_examples(str(rows), tokenizer, max_length=256, max_prompt_length=256).examples
    student.eval()
    vocab_size = len(tokenizer)
    lenses = [LogitLens(model, lens_norm="final", vocab_size=vocab_size) for model in (student, teacher)]
    last = tuple(lens.num_layers for lens in lenses)
    sums, count = {"kl": 0.0} | {f"lens_jsd/{s}:{t}": 0.0 for s, t in pairs}, 0
    for example in examples:
        ids, is_target = torch.tensor(list(example.token_ids))[None], torch.tensor(list(example.is_target))[None]
        hidden = [
            lens.hidden_states(ids, None, [pair[side] for pair in (*pairs, last)]) for side, lens in enumerate(lenses)
        ]
        for pair in (*pairs, last):
            log_q, log_p = (
                lens.logits(rows_at(hidden[side][pair[side]], is_target), pair[side]).log_softmax(-1)
                for side, lens in enumerate(lenses)
            )
            if pair == last:
                sums["kl"] += forward_kl(log_p, log_q).sum().item()
                count += len(log_p)
            else:
                sums[f"lens_jsd/{pair[0]}:{pair[1]}"] += jensen_shannon(log_p, log_q).sum().item()
    return {name: value / count for name, value in sums.items()} | {"num_targets": count}


def print_table(output: Path) -> None:
    """Every run, and its paired difference from the dense run of the same seed."""
    results = [json.loads(file.read_text()) for file in sorted(output.glob("*-seed*.json"))]
    dense = {one["seed"]: one for one in results if one["arm"] == "dense"}
    print(
        f"{'arm':<10}{'seed':>5}{'KL to teacher':>15}{'to dense':>10}{'lens JSD':>10}{'to dense':>10}{'CPU s/step':>12}"
    )
    for one in sorted(results, key=lambda one: (list(ARMS).index(one["arm"]), one["seed"])):
        base = dense.get(one["seed"])
        lens, line = _lens(one), f"{one['arm']:<10}{one['seed']:>5}{one['kl']:>15.4f}"
        line += (
            f"{one['kl'] / base['kl'] - 1:>+10.2%}{lens:>10.4f}{lens / _lens(base) - 1:>+10.2%}"
            if base
            else f"{'':>10}{lens:>10.4f}{'':>10}"
        )
        print(f"{line}{one['cpu_seconds_per_step']:>12.2f}")
    for arm in ARMS:
        gaps = [
            one["kl"] / dense[one["seed"]]["kl"] - 1 for one in results if one["arm"] == arm and one["seed"] in dense
        ]
        if len(gaps) > 1 and arm != "dense":
            print(f"{arm}: mean difference of the KL over {len(gaps)} seeds {sum(gaps) / len(gaps):+.2%}")


def _lens(one: dict[str, Any]) -> float:
    values = [value for name, value in one.items() if name.startswith("lens_jsd/")]
    return sum(values) / max(1, len(values))


if __name__ == "__main__":
    main()

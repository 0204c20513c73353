"""What the demo found: numbers out of the files that its commands wrote, as results.json and as tables."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distilllens_cache import CacheReader

LOWER, HIGHER = "lower", "higher"


def collect_results(folder: Path, *, seconds: dict[str, float], peak_memory_gb: float) -> dict[str, Any]:
    """Everything the tables show, ready for JSON: metrics before and after, bytes of the cache, speeds."""
    evaluation = json.loads((folder / "evaluation/results.json").read_text(encoding="utf-8"))
    before, after = (_metrics(model) for model in evaluation["models"])
    metrics = [
        {
            "metric": name,
            "better": better,
            "before": value,
            "after": after[name][0],
            "improved": after[name][0] < value if better == LOWER else after[name][0] > value,
        }
        for name, (value, better) in before.items()
    ]
    cache = CacheReader(folder / "cache")
    manifest = cache.manifest
    layers = {
        str(layer): round(stats.bytes / stats.num_targets, 1) for layer, stats in sorted(manifest.layer_stats.items())
    }
    tokens = int(cache.num_tokens.sum())
    training = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    speeds = [line["train/tokens_per_s"] for line in training if "train/tokens_per_s" in line]
    return {
        "metrics": metrics,
        "cache": {
            "examples": manifest.num_examples,
            "tokens": tokens,
            "targets": manifest.num_targets,
            "layers": list(manifest.identity.layers),
            "total_bytes": manifest.total_bytes,
            "bytes_per_target_by_layer": layers,
        },
        "tokens_per_s": {
            "teacher_pass_with_start_up": round(tokens / seconds["cache"], 1),
            "training": round(sorted(speeds)[len(speeds) // 2], 1),
        },
        "seconds": seconds,
        "total_seconds": round(sum(seconds.values()), 1),
        "peak_memory_gb": peak_memory_gb,
    }


def print_results(results: dict[str, Any], *, folder: Path) -> None:
    """The tables on stdout, what did not improve, and what to try next."""
    console = Console(width=None if Console().is_terminal else 100)
    table = Table("on held-out rows", title="The student before and after")
    for column in ("before", "after", "better is", ""):
        table.add_column(column, justify="left" if column == "" else "right")
    for row in results["metrics"]:
        verdict = "improved" if row["improved"] else "NOT improved"
        table.add_row(row["metric"], f"{row['before']:.4g}", f"{row['after']:.4g}", row["better"], verdict)
    cost = Table("the cache and the machine", "", title="What it took")
    cache, speed = results["cache"], results["tokens_per_s"]
    by_layer = ", ".join(f"layer {layer}: {size:.0f}" for layer, size in cache["bytes_per_target_by_layer"].items())
    cost.add_row(
        "cache",
        f"{cache['targets']:,} targets of {cache['examples']} examples, {cache['total_bytes'] / 1e6:.1f} MB",
    )
    cost.add_row("bytes per target", by_layer)
    cost.add_row("teacher pass", f"{speed['teacher_pass_with_start_up']:.0f} tokens/s, start-up included")
    cost.add_row("training", f"{speed['training']:.0f} tokens/s")
    cost.add_row("time", f"{results['total_seconds'] / 60:.1f} minutes")
    cost.add_row("memory", f"{results['peak_memory_gb']:.1f} GB for the largest command")
    console.print()
    console.print(table)
    console.print(cost)
    worse = [row["metric"] for row in results["metrics"] if not row["improved"]]
    if worse:
        console.print(f"Not improved: {', '.join(worse)}. More --max-steps may change that, or not: look at it.")
    console.print(_next_steps(folder), highlight=False, markup=False, soft_wrap=True)


def _metrics(model: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Name -> (value, which way is better), of one model of an evaluation."""
    forced = model["teacher_forced"]
    found = {
        "validation loss (nats per token)": (forced["reference_loss"], LOWER),
        "KL to the teacher, final layer (nats)": (forced["kl"], LOWER),
    }
    for name, value in forced.items():
        if name.startswith("lens_jsd/"):
            found[f"lens JSD, pair {name.removeprefix('lens_jsd/')} (nats)"] = (value, LOWER)
    found["top-1 agreement with the teacher"] = (forced["top1_agreement"], HIGHER)
    found["calibration error"] = (forced["calibration_error"], LOWER)
    found["ROUGE-L of greedy answers"] = (model["written"]["rouge_l"]["mean"], HIGHER)
    return found


def _next_steps(folder: Path) -> str:
    student, cache, valid = folder / "student", folder / "cache", folder / "valid-cache"
    return f"""
What to try next
  Open {folder / "report.html"} in a browser: the teacher's guesses, layer by layer.
  Look at one example:       distilllens inspect show {valid} --example 3
  Train longer:              distilllens train --student {student} --cache {cache} --eval-cache {valid} \\
                               --learning-rate 5e-4 --max-steps 1000 --output-dir {folder / "longer"}
  Without the lens terms:    the same with --pairs none and another --output-dir, then compare
  Your own rows and teacher: distilllens cache-teacher --teacher FOLDER_OR_HUB_ID --dataset ROWS.jsonl \\
                               --output-dir my-cache --dry-run
"""

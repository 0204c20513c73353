"""Run the teacher once over a dataset: rows -> teacher -> lens -> sparse targets -> shards -> manifest."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from distilllens.config import CacheTeacherConfig, save_config
from distilllens.console import say
from distilllens.data import Example, Examples, load_configured
from distilllens.engine import is_distributed
from distilllens.layer_maps import parse_layers, parse_top_k
from distilllens.lens import LogitLens, check_lens, num_layers
from distilllens.models import config_digest, load_model, load_tokenizer, pick_device
from distilllens.teacher_pass import TeacherPass
from distilllens.template import resolve_template
from distilllens.vocabulary import (
    effective_vocab_size,
    require_matching_tokenizer,
    save_tokenizer,
    tokenizer_digest,
)
from distilllens.weights_digest import weights_digest
from distilllens_cache import FORMAT_VERSION, CacheWriter, Identity, PlannedExample, plan_shards

BYTES_PER_VALUE = {"arrow-fp16": 2, "arrow-fp32": 4}
INDEX_BYTES = 45
"""Bytes of one example in the cache's index: mostly its digest, which doesn't compress."""
SAMPLE_EXAMPLES = 8
"""Examples that --dry-run runs through the teacher to extrapolate time and bytes."""


@dataclass(frozen=True)
class Plan:
    """A teacher pass with everything opened and checked, before anything is written."""

    config: CacheTeacherConfig
    teacher: TeacherPass
    examples: Examples
    identity: Identity
    shards: list[range]
    tokenizer_files: Path


def run_cache_teacher(config: CacheTeacherConfig) -> Path:
    """Write, or finish, the cache that ``config`` describes; its folder."""
    if is_distributed():
        raise ValueError("cache-teacher runs as one process: start it without torchrun, or with --nproc-per-node 1")
    with tempfile.TemporaryDirectory() as scratch:
        plan = open_plan(config, Path(scratch) / "tokenizer")
        say(plan.examples.report())
        if config.dry_run:
            print(estimate(plan))
            return config.output_dir
        return write_cache(plan)


def open_plan(config: CacheTeacherConfig, tokenizer_files: Path) -> Plan:
    """Open teacher and rows, check that they fit, and settle the cache's identity."""
    device = pick_device(config.device)
    source = config.tokenizer or config.teacher
    tokenizer = load_tokenizer(source, revision=None if config.tokenizer else config.revision)
    template = resolve_template(config.template, tokenizer)
    # Rows before weights: a mistake in the dataset should not cost the loading of a large teacher.
    examples = load_configured(config, config.dataset, tokenizer)
    model = load_model(
        config.teacher,
        revision=config.revision,
        dtype=config.dtype,
        device=str(device),
        attn_implementation=config.attn_implementation,
    )
    require_matching_tokenizer(model, tokenizer, source)
    vocab_size = effective_vocab_size(model, tokenizer)
    layers = parse_layers(config.layers, num_layers(model))
    top_k = parse_top_k(config.top_k, layers, vocab_size)
    lens = LogitLens(model, lens_norm=config.lens_norm, vocab_size=vocab_size)
    check_lens(model, lens)
    save_tokenizer(tokenizer, tokenizer_files)
    (tokenizer_files / "template.txt").write_text(template.source, encoding="utf-8")
    identity = Identity(
        format_version=FORMAT_VERSION,
        teacher=Path(config.teacher).name if Path(config.teacher).exists() else config.teacher,
        teacher_digest=weights_digest(config.teacher, revision=config.revision),
        teacher_config_digest=config_digest(model),
        num_layers=num_layers(model),
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
        device=device.type,
        tokenizer_digest=tokenizer_digest(tokenizer),
        template_digest=template.digest,
        vocab_size=vocab_size,
        dataset_digest=examples.digest,
        layers=layers,
        lens_norm=config.lens_norm,
        top_k=top_k,
        store_tail=config.store_tail,
        temperature=config.temperature,
        codec=config.codec,
        batch_tokens=config.batch_tokens,
        examples_per_shard=config.examples_per_shard,
        seed=config.seed,
    )
    teacher = TeacherPass(
        model, lens, top_k=top_k, temperature=config.temperature, has_tail_sums=config.store_tail == "profile"
    )
    shards = plan_shards(
        planned(examples.examples),
        examples_per_shard=config.examples_per_shard,
        bytes_per_target=raw_bytes_per_target(identity),
    )
    return Plan(config, teacher, examples, identity, shards, tokenizer_files)


def planned(examples: Sequence[Example]) -> list[PlannedExample]:
    """What the cache's plan says of each example."""
    return [
        PlannedExample(id=e.id, digest=e.digest, num_tokens=e.num_tokens, num_targets=e.num_targets) for e in examples
    ]


def raw_bytes_per_target(identity: Identity) -> float:
    """Bytes of one target position over all layers before compression: ids, log-probabilities, count and rest."""
    value = BYTES_PER_VALUE[identity.codec]
    return sum(k * (4 + value) + 2 + value for k in identity.top_k.values())


def write_cache(plan: Plan) -> Path:
    """Write the shards that are still missing, then the manifest."""
    config, folder = plan.config, plan.config.output_dir
    _require_space(plan)
    writer = CacheWriter(
        folder,
        identity=plan.identity,
        examples=planned(plan.examples.examples),
        tokenizer_files=plan.tokenizer_files,
        shards=plan.shards,
        overwrite=config.overwrite,
    )
    if writer.finished:
        print(f"{folder} is finished already, from the same teacher, rows and settings: nothing to do")
        return folder
    _require_determinism(plan)
    missing = writer.unfinished()
    if len(missing) < len(plan.shards):
        say(f"Continuing: {len(plan.shards) - len(missing)} of {len(plan.shards)} shards are finished")
    rows = plan.examples.examples
    num_tokens = sum(rows[index].num_tokens for number in missing for index in plan.shards[number])
    started = time.monotonic()
    with _progress(num_tokens, writer) as advance:
        for number in missing:
            where = plan.shards[number]
            cached, tails = plan.teacher.run(
                rows[where.start : where.stop],
                first_index=where.start,
                batch_tokens=config.batch_tokens,
                progress=advance,
            )
            writer.write_shard(number, cached, tails)
    writer.finish()
    save_config(config, folder / "config.resolved.yaml")
    seconds = max(time.monotonic() - started, 1e-9)
    targets = sum(example.num_targets for example in rows)
    print(
        f"{folder}: {len(rows)} examples, {targets} target positions, {len(plan.identity.layers)} layers, "
        f"{decimal(_size(folder))}; {num_tokens / seconds:.0f} tokens/s"
    )
    return folder


def estimate(plan: Plan) -> str:
    """What the pass would take, extrapolated from one small timed batch through the real codec."""
    examples = plan.examples.examples
    # Spread over the lengths, so that the sample looks like the whole.
    by_length = sorted(range(len(examples)), key=lambda index: (examples[index].num_tokens, index))
    stride = max(1, len(examples) // SAMPLE_EXAMPLES)
    sample = [examples[index] for index in sorted(by_length[stride // 2 :: stride][:SAMPLE_EXAMPLES])]
    budget = plan.config.batch_tokens
    plan.teacher.run(sample[:1], first_index=0, batch_tokens=budget)  # warm
    started = time.perf_counter()
    cached, tails = plan.teacher.run(sample, first_index=0, batch_tokens=budget)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as scratch:
        writer = CacheWriter(
            Path(scratch) / "sample",
            identity=plan.identity,
            examples=planned(sample),
            tokenizer_files=plan.tokenizer_files,
            shards=[range(len(sample))],
        )
        writer.write_shard(0, cached, tails)
        folder = Path(scratch) / "sample"
        of_targets = (folder / "shards" / "00000.arrow").stat().st_size
        of_tails = sum(file.stat().st_size for file in folder.glob("shards/*.tails.arrow"))
        of_plan = _size(folder) - of_targets - of_tails
    sampled = sum(example.num_targets for example in sample)
    targets = sum(example.num_targets for example in examples)
    tokens = sum(example.num_tokens for example in examples)
    seconds *= tokens / sum(example.num_tokens for example in sample)
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


def _require_space(plan: Plan) -> None:
    targets = plan.examples.num_targets
    # Compression takes about a third off; a cache that only just fits uncompressed is let through.
    needed = 0.6 * targets * raw_bytes_per_target(plan.identity)
    parent = plan.config.output_dir.absolute()
    while not parent.exists():
        parent = parent.parent
    existing = _size(plan.config.output_dir) if plan.config.output_dir.is_dir() else 0
    free = shutil.disk_usage(parent).free
    if needed > free + existing:
        raise ValueError(
            f"the cache needs about {decimal(int(needed))} and {parent} has {decimal(free)} free: give another "
            f"--output-dir, a smaller --top-k, fewer --layers or a --limit"
        )


def _require_determinism(plan: Plan) -> None:
    """Two passes over one example must agree, or a resumed cache would mix two teachers."""
    if active := [name for name, module in plan.teacher.model.named_modules() if module.training]:
        raise ValueError(
            f"the teacher is in training mode ({active[0] or 'the whole model'}): its dropout would be cached"
        )
    shortest = min(plan.examples.examples, key=lambda example: example.num_tokens)
    first, second = (
        plan.teacher.run([shortest], first_index=0, batch_tokens=plan.config.batch_tokens)[0][0] for _ in range(2)
    )
    gap = max(
        abs(float(first.targets[layer].log_probs[0]) - float(second.targets[layer].log_probs[0]))
        for layer in plan.identity.layers
    )
    if gap > 0:
        say(f"Warning: the teacher is not deterministic here ({gap:.2g} nats between two passes over one example)")


@contextmanager
def _progress(num_tokens: int, writer: CacheWriter) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    started, done = time.monotonic(), 0
    with Progress(
        TextColumn("teacher pass"),
        BarColumn(),
        TextColumn(
            "{task.completed:.0f}/{task.total:.0f} tokens  {task.fields[rate]:.0f} tokens/s  {task.fields[written]}"
        ),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=num_tokens, rate=0.0, written=decimal(0))

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            rate = done / max(time.monotonic() - started, 1e-9)
            bar.update(task, advance=tokens, rate=rate, written=decimal(writer.bytes_written))

        yield advance


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""What a cache holds, in numbers: identity, examples, targets, and each layer's bytes, mass and entropy."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from distilllens_cache import CacheReader, FileRecord
from distilllens_inspect.console import bytes_text, put
from distilllens_inspect.text import one_line

SHOWN_WITHOUT_TARGETS = 5
"""How many examples without targets are named; the others are counted."""


@dataclass(frozen=True)
class LayerSummary:
    """One layer; means are over target positions."""

    layer: int
    top_k: int
    """Most ids that a target keeps."""
    bytes: int
    """Compressed bytes of the layer's columns, tail sums and tail rows not included."""
    bytes_per_target: float
    mean_kept_mass: float
    mean_num_ids: float
    mean_entropy: float
    """In nats, of the kept ids and the rest as one cell: a lower bound of the full entropy."""
    tail: str = "none"
    """What is stored of the layer's tail, as in `--store-tail`."""


@dataclass(frozen=True)
class Summary:
    """Everything that `inspect summary` says about a cache."""

    digest: str
    """SHA-256 of manifest.json, which covers every other file."""
    identity: dict[str, Any]
    num_examples: int
    num_tokens: int
    num_targets: int
    target_share: float
    """Targets per token: the share of tokens that the student learns."""
    without_targets: tuple[str, ...]
    """Ids of examples that have no target; training learns nothing from them."""
    num_shards: int
    total_bytes: int
    bytes_of: dict[str, int]
    """Where the bytes are; the values add up to ``total_bytes``."""
    bytes_per_target_and_layer: float
    """Of the files of targets: token ids and masks are included; tails, index and tokenizer are not."""
    layers: tuple[LayerSummary, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain content for `--json`."""
        return asdict(self)


def summarize(reader: CacheReader) -> Summary:
    """The numbers of a cache, from its manifest and index; no shard is read."""
    manifest = reader.manifest
    identity = manifest.identity
    targets = manifest.num_targets
    shard_bytes = sum(shard.size for shard in manifest.shards)
    layer_bytes = sum(stats.bytes for stats in manifest.layer_stats.values())
    tail_sums = [*(shard.tails for shard in manifest.shards), manifest.tail_sums]
    tail_rows = [shard.tail_rows for shard in manifest.shards]
    sketches = [file for record in manifest.sketches.values() for file in (record.sketch, record.projection)]
    specs = identity.tail_specs
    return Summary(
        digest=reader.digest,
        identity={name: getattr(identity, name) for name in sorted(identity.LATER)} | identity.model_dump(mode="json"),
        num_examples=manifest.num_examples,
        num_tokens=manifest.num_tokens,
        num_targets=targets,
        target_share=_ratio(targets, manifest.num_tokens),
        without_targets=tuple(
            id for id, count in zip(reader.ids, reader.num_targets.tolist(), strict=True) if not count
        ),
        num_shards=len(manifest.shards),
        total_bytes=manifest.total_bytes,
        bytes_of={
            "targets of all layers": layer_bytes,
            "token ids, masks and file headers": shard_bytes - layer_bytes,
            "tail sums": _size(tail_sums),
            **({"tail rows": _size(tail_rows)} if identity.tail_row_layers else {}),
            **({"sketches": _size(sketches)} if sketches else {}),
            "index and tokenizer": _size([manifest.index, *manifest.tokenizer_files]),
        },
        bytes_per_target_and_layer=_ratio(shard_bytes, targets * len(identity.layers)),
        layers=tuple(
            LayerSummary(
                layer=layer,
                top_k=identity.top_k[layer],
                bytes=stats.bytes,
                bytes_per_target=_ratio(stats.bytes, stats.num_targets),
                mean_kept_mass=_ratio(stats.kept_mass, stats.num_targets),
                mean_num_ids=_ratio(stats.num_ids, stats.num_targets),
                mean_entropy=_ratio(stats.entropy, stats.num_targets),
                tail=str(specs[layer]),
            )
            for layer, stats in sorted(manifest.layer_stats.items())
        ),
    )


def identity_rows(summary: Summary) -> list[tuple[str, str]]:
    """The identity as (name, value) for people: what a reader compares first, then where it came from."""
    identity = summary.identity
    widths = sorted(set(identity["top_k"].values()))
    narrowing = (("min k", "min_k"), ("min probability", "min_prob"), ("top-p", "top_p"))
    tails, calibrated = identity["store_tail"], identity.get("calibration_targets")
    return [
        ("teacher", identity["teacher"]),
        ("teacher digest", identity["teacher_digest"]),
        ("config digest", identity["teacher_config_digest"]),
        ("layers", f"{', '.join(str(layer) for layer in identity['layers'])} of {identity['num_layers']}"),
        ("lens norm", identity["lens_norm"]),
        ("top-k", " and ".join(str(width) for width in widths)),
        *((name, by_layer(identity[key])) for name, key in narrowing if identity.get(key)),
        ("tails", tails if isinstance(tails, str) else by_layer(tails)),
        *([("calibration", f"{calibrated:,} targets")] if calibrated else []),
        ("temperature", f"{identity['temperature']:g}"),
        ("vocabulary", f"{identity['vocab_size']:,} tokens"),
        ("tokenizer digest", identity["tokenizer_digest"]),
        ("template digest", identity["template_digest"]),
        ("dataset digest", identity["dataset_digest"]),
        ("codec", identity["codec"]),
        ("seed", str(identity["seed"])),
        ("format version", str(identity["format_version"])),
        ("cache digest", summary.digest),
        (
            "written with",
            f"torch {identity['torch_version']}, transformers {identity['transformers_version']}, "
            f"{identity['dtype']} on {identity['device']}, {identity['attn_implementation']} attention",
        ),
    ]


def by_layer(values: dict[int, Any]) -> str:
    """Settings that differ between layers, each once with its layers."""
    layers: dict[str, list[str]] = {}
    for layer, value in values.items():
        layers.setdefault(str(value), []).append(str(layer))
    return "; ".join(f"{value} (layer{'s' if len(of) > 1 else ''} {', '.join(of)})" for value, of in layers.items())


def warnings_of(summary: Summary) -> list[str]:
    """Sentences about what a user should know before training from the cache."""
    lost = summary.without_targets
    if not lost:
        return []
    more = f" and {len(lost) - SHOWN_WITHOUT_TARGETS} more" if len(lost) > SHOWN_WITHOUT_TARGETS else ""
    have = "has" if len(lost) == 1 else "have"
    return [
        f"{len(lost)} of {summary.num_examples} examples {have} no target, so nothing is learned there: "
        f"{', '.join(one_line(id) for id in lost[:SHOWN_WITHOUT_TARGETS])}{more}."
    ]


def print_summary(summary: Summary, console: Console) -> None:
    """The summary for people: identity, counts, where the bytes are, one line per layer."""
    facts = Table.grid(padding=(0, 2))
    for name, value in identity_rows(summary):
        facts.add_row(name, one_line(value))
    facts.add_row()
    facts.add_row("examples", f"{summary.num_examples:,} in {_count(summary.num_shards, 'shard')}")
    facts.add_row("tokens", f"{summary.num_tokens:,}")
    facts.add_row("targets", f"{summary.num_targets:,} ({summary.target_share:.1%} of tokens are supervised)")
    facts.add_row("size", f"{bytes_text(summary.total_bytes)} ({summary.total_bytes:,} bytes)")
    for name, size in summary.bytes_of.items():
        facts.add_row(f"  {name}", bytes_text(size))
    facts.add_row(
        "per target and layer",
        f"{summary.bytes_per_target_and_layer:.1f} bytes (token ids and masks included, tails not)",
    )
    if "tail rows" in summary.bytes_of:
        of_rows = _ratio(summary.bytes_of["tail rows"], summary.num_targets)
        facts.add_row("tail rows per target", f"{of_rows:.1f} bytes (all layers)")
    put(console, facts)
    console.print()
    put(console, _layer_table(summary))
    console.print("Entropy is that of the kept ids with the rest as one cell: a lower bound.")
    for warning in warnings_of(summary):
        console.print(f"Warning: {warning}", style="yellow")


def _layer_table(summary: Summary) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("layer", "bytes", "bytes/target", "kept mass", "ids/target", "entropy, nats"):
        table.add_column(name, justify="right")
    table.add_column("stored tail", overflow="fold")
    for layer in summary.layers:
        table.add_row(
            str(layer.layer),
            bytes_text(layer.bytes),
            f"{layer.bytes_per_target:.1f}",
            f"{layer.mean_kept_mass:.4f}",
            f"{layer.mean_num_ids:.1f}",
            f"{layer.mean_entropy:.3f}",
            layer.tail,
        )
    return table


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _size(files: Iterable[FileRecord | None]) -> int:
    return sum(record.size for record in files if record is not None)


def _ratio(total: float, count: int) -> float:
    return total / count if count else 0.0

"""What a teacher pass is made of: teacher, rows, identity and shards, checked before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from distilllens.config import CacheTeacherConfig
from distilllens.data import Example, Examples, load_configured
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
from distilllens_cache import FORMAT_VERSION, Identity, PlannedExample, plan_shards

BYTES_PER_VALUE = {"arrow-fp16": 2, "arrow-fp32": 4}


@dataclass(frozen=True)
class Plan:
    """A teacher pass with everything opened and checked, before anything is written."""

    config: CacheTeacherConfig
    teacher: TeacherPass
    examples: Examples
    identity: Identity
    shards: list[range]
    tokenizer_files: Path


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

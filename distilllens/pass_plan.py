"""What a teacher pass is made of: teacher, rows, identity and shards, checked before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from distilllens.by_layer import parse_by_layer
from distilllens.config import CacheTeacherConfig
from distilllens.data import Example, Examples, load_configured, load_prompts, with_rows_after
from distilllens.device_map import require_device_map
from distilllens.generated_rows import generated_examples
from distilllens.launch import choose_device
from distilllens.layer_maps import parse_layers
from distilllens.lens import LogitLens, check_lens, num_layers
from distilllens.models import config_digest, load_model, load_tokenizer, require_kernel
from distilllens.teacher_pass import TeacherPass
from distilllens.template import resolve_template
from distilllens.vocabulary import (
    effective_vocab_size,
    require_matching_tokenizer,
    save_tokenizer,
    tokenizer_digest,
)
from distilllens.weights_digest import weights_digest
from distilllens.widths import Width
from distilllens_cache import (
    FORMAT_VERSION,
    Identity,
    PlannedExample,
    TailSpec,
    bytes_of,
    cut_of,
    parse_tail_spec,
    plan_shards,
    require_writable,
)

DEFAULT_RANK = 64
"""Directions of the final layer's sketch, where nothing else is asked for."""
BYTES_PER_ID = {"packed": 1.8, "arrow-fp16": 3.5, "arrow-fp32": 5.5}
"""By codec: what a kept id and its log-probability take, after compression."""
ADAPTIVE_IDS = 32
"""Ids that a row of adaptive width keeps on average, at most: a flat final layer."""


@dataclass(frozen=True)
class Plan:
    """A teacher pass with everything opened and checked, before anything is written."""

    config: CacheTeacherConfig
    teacher: TeacherPass
    examples: Examples
    identity: Identity
    shards: list[range]
    tokenizer_files: Path
    num_present: int = 0
    """Examples of the cache in the output folder, to which ``--append`` adds the others."""
    present_bytes: int = 0
    """Bytes of that cache."""

    @property
    def to_write(self) -> list[Example]:
        """The examples that the pass is over: all, or those that ``--append`` adds."""
        return self.examples.examples[self.num_present :]

    @property
    def shards_to_write(self) -> list[range]:
        """Their shards, by place among all examples."""
        return [shard for shard in self.shards if shard.start >= self.num_present]


def open_plan(config: CacheTeacherConfig, tokenizer_files: Path) -> Plan:
    """Open teacher and rows, check that they fit, and settle the cache's identity."""
    if config.device_map is None:
        device = choose_device(config.device)
        is_16_bit = config.dtype != "float32"
        require_kernel(config.attn_implementation, device, is_16_bit=is_16_bit, flag="--dtype bfloat16")
    else:
        device = torch.device("cpu")  # not used: the map says where each part goes
        require_device_map(config.device_map)
    source = config.tokenizer or config.teacher
    tokenizer = load_tokenizer(source, revision=None if config.tokenizer else config.revision)
    template = resolve_template(config.template, tokenizer)
    # Rows before weights: a mistake in the dataset should not cost the loading of a large teacher.
    prompts = load_prompts(config, config.dataset, tokenizer) if config.generate else None
    examples = None if config.generate else load_configured(config, config.dataset, tokenizer)
    for dataset in config.appended:
        more = load_configured(config.model_copy(update={"limit": None}), dataset, tokenizer)
        assert examples is not None
        examples = with_rows_after(examples, more)
    model = load_model(
        config.teacher,
        revision=config.revision,
        dtype=config.dtype,
        device=str(device),
        attn_implementation=config.attn_implementation,
        device_map=config.device_map,
    )
    require_matching_tokenizer(model, tokenizer, source)
    vocab_size = effective_vocab_size(model, tokenizer)
    teacher_digest = weights_digest(config.teacher, revision=config.revision)
    layers = parse_layers(config.layers, num_layers(model))
    widths = parse_widths(config, layers, vocab_size)
    lens = LogitLens(model, lens_norm=config.lens_norm, vocab_size=vocab_size)
    check_lens(model, lens)
    store_tail = stored_tails(config.store_tail, layers, lens)
    has_sketch = any(spec.sketch for spec in store_tail.values())
    save_tokenizer(tokenizer, tokenizer_files)
    (tokenizer_files / "template.txt").write_text(template.source, encoding="utf-8")
    identity = Identity(
        format_version=FORMAT_VERSION,
        teacher=Path(config.teacher).name if Path(config.teacher).exists() else config.teacher,
        teacher_digest=teacher_digest,
        teacher_config_digest=config_digest(model),
        num_layers=num_layers(model),
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
        device=lens.device.type,
        tokenizer_digest=tokenizer_digest(tokenizer),
        template_digest=template.digest,
        vocab_size=vocab_size,
        dataset_digest="" if examples is None else examples.digest,
        layers=layers,
        lens_norm=config.lens_norm,
        top_k={layer: width.max_k for layer, width in widths.items()},
        min_k={layer: width.min_k for layer, width in widths.items() if not width.is_fixed},
        min_prob={layer: width.min_prob for layer, width in widths.items() if width.min_prob > 0},
        top_p={layer: width.top_p for layer, width in widths.items() if width.top_p < 1},
        store_tail={layer: str(spec) for layer, spec in store_tail.items()},
        calibration_targets=config.calibration_targets if has_sketch else 0,
        temperature=config.temperature,
        codec=config.codec,
        batch_tokens=config.batch_tokens,
        examples_per_shard=config.examples_per_shard,
        seed=config.seed,
    )
    teacher = TeacherPass(model, lens, widths, store_tail, temperature=config.temperature, seed=config.seed)
    if config.append is not None or config.generate:  # what a writer would refuse after all that follows
        append = config.append is not None
        require_writable(config.folder, identity, overwrite=config.overwrite, append=append, where=config.output_dir)
    if prompts is not None:
        examples = generated_examples(
            config,
            prompts,
            model.eval(),
            tokenizer,
            teacher_digest=teacher_digest,
            vocab_size=vocab_size,
            bytes_per_target=bytes_per_target(identity),
        )
        identity = identity.model_copy(update={"dataset_digest": examples.digest})
    assert examples is not None
    done = cut_already(config, len(examples.examples))
    is_added_to = bool(done) and config.append is not None
    return Plan(
        config,
        teacher,
        examples,
        identity,
        cut_into_shards(config, examples, identity, done),
        tokenizer_files,
        num_present=done[-1].stop if is_added_to else 0,
        present_bytes=bytes_of(config.folder) if is_added_to else 0,
    )


def cut_already(config: CacheTeacherConfig, num_examples: int) -> list[range]:
    """The shards in the output folder's plan, if it is one of these examples, or of the first of them."""
    done = [] if config.overwrite else cut_of(config.folder)
    stop = done[-1].stop if done else 0
    return done if stop == num_examples or (config.append is not None and stop < num_examples) else []


def cut_into_shards(
    config: CacheTeacherConfig, examples: Examples, identity: Identity, done: list[range]
) -> list[range]:
    """Which examples share a shard: those of ``done`` as they are cut, the others by size."""
    first = done[-1].stop if done else 0
    more = plan_shards(
        planned(examples.examples[first:]),
        examples_per_shard=config.examples_per_shard,
        bytes_per_target=bytes_per_target(identity),
    )
    return [*done, *(range(first + part.start, first + part.stop) for part in more)]


def parse_widths(config: CacheTeacherConfig, layers: tuple[int, ...], vocab_size: int) -> dict[int, Width]:
    """How many tokens each layer keeps. ValueError that names the flag."""

    def number(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= vocab_size:
            raise ValueError(f"{text} is outside 1 to {vocab_size}, the size of the teacher's vocabulary")
        return int(text)

    max_k = parse_by_layer("--top-k", config.top_k, layers, number, default=0)
    if 0 in max_k.values():
        raise ValueError(f"--top-k {config.top_k!r}: expected one number, or both of final=K,lens=K")
    min_k = parse_by_layer("--min-k", config.min_k, layers, number, default=1)
    min_prob = parse_by_layer("--min-prob", config.min_prob, layers, float, default=0.0)
    top_p = parse_by_layer("--top-p", config.top_p, layers, float, default=1.0)
    return {layer: Width(max_k[layer], min_k[layer], min_prob[layer], top_p[layer]) for layer in layers}


def stored_tails(text: str, layers: tuple[int, ...], lens: LogitLens) -> dict[int, TailSpec]:
    """What is stored of the tail of each layer. ValueError where the teacher's head allows no such sketch."""
    head = lens.matrix_head()
    hidden_size = 0 if head is None else head.weight.shape[1]
    if text == "auto":
        text = "profile" if head is None else f"lens=profile,final=profile+sketch:{min(DEFAULT_RANK, hidden_size)}"
    found = parse_by_layer("--store-tail", text, layers, parse_tail_spec, default=TailSpec())
    for spec in found.values():
        if spec.sketch is not None and head is None:
            raise ValueError(f"--store-tail {spec}: a sketch needs a teacher whose head is one matrix; use profile")
        if spec.sketch is not None and spec.sketch.rank > hidden_size:
            raise ValueError(
                f"--store-tail {spec}: the teacher's hidden size is {hidden_size}, and a sketch has no more directions"
            )
    return found


def planned(examples: Sequence[Example]) -> list[PlannedExample]:
    """What the cache's plan says of each example."""
    return [
        PlannedExample(id=e.id, digest=e.digest, num_tokens=e.num_tokens, num_targets=e.num_targets) for e in examples
    ]


def bytes_per_target(identity: Identity) -> float:
    """About what one target position takes over all layers, as stored. Follows from the settings alone."""
    per_id = BYTES_PER_ID[identity.codec]
    kept = (
        min(k, ADAPTIVE_IDS) if layer in identity.min_prob or layer in identity.top_p else k
        for layer, k in identity.top_k.items()
    )
    return sum(k * per_id + 4 for k in kept) + sum(spec.row_bytes(2) for spec in identity.tail_specs.values())

"""Targets as a cache gives them back, and what they take on its disk."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from distilllens.tail_sampling import draw_tail
from distilllens.targets import SparseTargets, join_rows, stack_targets, unstack_targets
from distilllens_cache import CachedExample, Identity, PlannedExample, example_digest
from distilllens_cache.codec import find_codec
from distilllens_cache.shard import Expected, decode_shard, encode_shard
from distilllens_cache.tail_rows import decode_tail_rows, encode_tail_rows

ROWS_PER_EXAMPLE = 64


@dataclass(frozen=True)
class Stored:
    """Targets after the codec."""

    targets: SparseTargets
    num_bytes: float
    """Per target: columns of the shard and tail rows, without tokens and without what a layer has once."""


def store(targets: SparseTargets, *, vocab_size: int, codec: str, tail: str = "none") -> Stored:
    """``targets`` through the shard file of one layer and back."""
    lengths = [len(part) for part in torch.arange(len(targets)).split(ROWS_PER_EXAMPLE)]
    examples = []
    for index, one in enumerate(unstack_targets(targets, lengths)):
        tokens = np.zeros(lengths[index] + 1, dtype=np.uint32)
        positions = np.arange(lengths[index], dtype=np.uint32)
        examples.append(CachedExample(index, str(index), tokens, positions, {1: one}))
    planned = [
        PlannedExample(e.id, example_digest(e.token_ids, e.target_positions), len(e.token_ids), len(e.target_positions))
        for e in examples
    ]
    identity, expected = _identity(vocab_size, targets.ids.shape[1], codec, tail), Expected(0, planned)
    encoded = encode_shard(examples, expected, identity, name="bench")
    decoded = decode_shard(bytes(encoded.data), expected, identity, find_codec(codec), name="bench")
    num_bytes = encoded.layer_stats[1].bytes
    if tail != "none":
        rows = encode_tail_rows(examples, identity, is_lossless=False, name="bench")
        decode_tail_rows(bytes(rows), decoded, identity, is_lossless=False, name="bench")
        num_bytes += len(rows)
    return Stored(stack_targets([example.targets[1] for example in decoded]), num_bytes / len(targets))


def _identity(vocab_size: int, top_k: int, codec: str, tail: str) -> Identity:
    unknown = dict.fromkeys(
        ("teacher", "teacher_digest", "teacher_config_digest", "dtype", "attn_implementation", "torch_version"), ""
    )
    unknown |= dict.fromkeys(
        ("transformers_version", "device", "tokenizer_digest", "template_digest", "dataset_digest"), ""
    )
    return Identity(
        **unknown,
        num_layers=1,
        vocab_size=vocab_size,
        layers=(1,),
        lens_norm="final",
        top_k={1: top_k},
        store_tail=tail,
        temperature=1.0,
        codec=codec,
        batch_tokens=1,
        examples_per_shard=1,
        seed=0,
    )


def with_samples(targets: SparseTargets, logits: list[Tensor], draws: int) -> SparseTargets:
    """The targets with draws from their tails; ``logits`` are the teacher's, some rows at a time."""
    generator, parts, start = torch.Generator().manual_seed(0), [], 0
    for some in logits:
        rows = targets[start : start + len(some)]
        slots = torch.where(rows.is_kept, rows.ids, rows.ids[:, :1])
        tail = some.softmax(-1).scatter(-1, slots, 0.0)
        uniforms = torch.rand(len(some), draws, generator=generator, dtype=torch.float64)
        parts.append(replace(rows, samples=draw_tail(tail, rows, uniforms)))
        start += len(some)
    return join_rows(parts)

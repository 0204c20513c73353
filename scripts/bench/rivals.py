"""What other systems store of a teacher, as representations for the fidelity bench.

- top-k renormalised in fp16 with 32-bit ids (axolotl, MaxText and others);
- top-k and a ghost bucket in fp16 with 17-bit ids, the rest as 1 - sum in float32 with a floor (Megatron-LM);
- DistillKit's compressed logits: polynomial curves of the sorted log-probabilities at its recommended and its budget
  setting; the rest spread evenly on both sides (`symmetric_uniform`), which is a bucket without its clamps;
- random-sampling KD (arXiv 2503.16870): counts of draws from the teacher's distribution, and nothing else.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from representation import Representation
from storage import DistillKit, Part
from torch import Tensor

from distilllens.tails import BucketTail, RenormTail
from distilllens.targets import SparseTargets
from distilllens.widths import Width
from distilllens_cache import LOG_FLOOR
from distilllens_cache.layer_codec import LayerPlace, LayerShape
from distilllens_cache.meaning import FlatLayer

DISTILLKIT = {
    "recommended": DistillKit(128, 16, (0, 1, 2, 3, 4, 0.5), compressed=True),
    "budget": DistillKit(50, 1, (0, 1, 0.5), compressed=True),
}
"""The two settings of its README."""


def representations(layer: Any) -> Iterator[Representation]:
    """All of them, for one layer of the bench."""
    for k in (16, 32, 64):
        targets = layer.targets(Width(k, k))
        rounded = replace(targets, log_probs=targets.log_probs.half().float())
        at = rounded[layer.at]
        # ids of 4 bytes and fp16, as they lie in a Parquet or JSON row before any compression of the file.
        yield Representation(f"k={k} renorm, int32 + fp16", "others", 6.0 * k, layer.sparse(at, RenormTail()))
        rest = (1 - at.log_probs.exp().sum(-1)).clamp_min(1e-8).log()
        ghost = replace(at, log_rest=rest)
        num_bytes = k * (17 / 8 + 2)
        yield Representation(f"k={k} ghost, 17-bit ids + fp16", "others", num_bytes, layer.sparse(ghost, BucketTail()))
    for name in ("recommended", "budget"):
        decoded, num_bytes = through_distillkit(layer.targets(Width(128, 128)), name, layer.vocab_size)
        yield Representation(f"DistillKit {name}", "others", num_bytes, layer.sparse(decoded[layer.at], BucketTail()))
    for draws in (12, 64):
        log_p, num_bytes = random_sampling(layer.log_p, draws)
        yield Representation(f"RS-KD, {draws} draws", "others", num_bytes, layer.full(log_p))


def random_sampling(log_p: Tensor, draws: int) -> tuple[Tensor, float]:
    """Log of the share of each token among the draws, LOG_FLOOR where none; bytes: 17-bit id and 7-bit count each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.multinomial(log_p.exp(), draws, replacement=True, generator=generator)
    counts = torch.zeros_like(log_p).scatter_add_(-1, ids, torch.ones_like(ids, dtype=log_p.dtype))
    unique = (counts > 0).sum(-1).float().mean().item()
    return (counts / draws).log().clamp_min(LOG_FLOOR), unique * 3.0


def through_distillkit(targets: SparseTargets, name: str, vocab_size: int) -> tuple[SparseTargets, float]:
    """Targets of at least 128 ids after DistillKit's compressor, and its bytes for each, after zstd."""
    way = DISTILLKIT[name]
    k = way.k
    flat = FlatLayer(
        np.full(len(targets), k),
        targets.ids[:, :k].numpy().astype(np.uint32).ravel(),
        targets.log_probs[:, :k].numpy().ravel(),
        targets.log_rest.numpy(),
    )
    bounds = np.array([0, len(targets)])
    part = Part(flat, LayerShape(1, k, vocab_size), LayerPlace(bounds, "bench", lambda row: f"row {row}"))
    stored, num_bytes = way.encode(part)
    decoded = way.decode(stored, part)
    ids, log_probs = (
        torch.from_numpy(np.array(one).reshape(-1, k)) for one in (decoded.ids.astype(np.int64), decoded.log_probs)
    )
    # The fitted curves may add up to more than 1: their readers normalise.
    excess = log_probs.logsumexp(-1, keepdim=True).clamp_min(0.0)
    log_probs = (log_probs - excess).clamp(LOG_FLOOR, 0.0)
    rest = (1 - log_probs.exp().sum(-1)).clamp_min(1e-6).log()
    return SparseTargets(ids, log_probs, torch.ones_like(ids, dtype=torch.bool), rest), num_bytes / len(targets)

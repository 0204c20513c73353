"""Before step 1: do the targets and the loss mean what they should? Most silent faults of distillation show here."""

import itertools

import torch

from distilllens.collate import Batch
from distilllens.divergence import sparse_divergence
from distilllens.matching import ALIGNMENT
from distilllens.objective import Objective
from distilllens_cache import CacheReader, canary

CHECKED_ROWS = 64
"""Target positions that the self-check looks at."""
CANARY_EXAMPLES = 256
"""Examples that the canary looks at."""
ZERO = 1e-3
"""Nats that count as no divergence: targets in fp16 are normalised to about 1e-4."""


def check_alignment(reader: CacheReader, *, is_allowed: bool = False) -> str:
    """What the canary says of the first examples of a cache. ValueError if the targets belong to other positions.

    An untrained teacher with tied embeddings echoes its input, which looks the same as targets one position late;
    ``is_allowed`` lets it pass.
    """
    result = canary(itertools.islice(reader, CANARY_EXAMPLES), reader.manifest.identity.layers[-1])
    if result.verdict == "failed" and not is_allowed:
        raise ValueError(f"{result.sentence} (If the teacher really is so: --allow-mismatch {ALIGNMENT}.)")
    return result.sentence


def check_objective(batch: Batch, objective: Objective, *, vocab_size: int) -> None:
    """Raise ValueError unless each divergence of the loss works on the targets of ``batch``.

    It must be near 0 for the teacher's own distribution, more for a shuffled one, and have a gradient there.
    """
    for name, layer in objective.divergences(max(batch.targets)):
        targets, tail = batch.targets[layer][:CHECKED_ROWS], batch.tails[layer]
        where = f"self-check of {name} at teacher layer {layer}"
        own = tail.completed(targets, vocab_size)
        itself = sparse_divergence(name, own, targets, tail).mean().item()
        if not itself < ZERO:
            raise ValueError(
                f"{where}: the teacher's own distribution is {itself:.3g} nats from its targets, not 0; the cache "
                f"or the loss is wrong. Run `distilllens inspect verify` on the cache"
            )
        shuffled = own.roll(1, 0).requires_grad_()
        other = sparse_divergence(name, shuffled, targets, tail).mean()
        is_one_distribution = torch.allclose(own, own.roll(1, 0), atol=1e-3)
        if not is_one_distribution and not other.item() > itself:
            raise ValueError(
                f"{where}: shuffled targets give {other.item():.3g} nats, no more than the right ones ({itself:.3g}); "
                f"the loss cannot tell them apart"
            )
        (gradient,) = torch.autograd.grad(other, shuffled)
        if not is_one_distribution and not 0 < gradient.abs().max().item() < float("inf"):
            raise ValueError(f"{where}: the loss has no usable gradient; distillation would be off")

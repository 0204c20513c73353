"""Losses over rows of hidden states, with the full-vocabulary logits of one chunk of rows alive at a time.

Dimension key: N rows, D hidden size, V vocabulary, M losses.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ChunkLosses = Callable[[Tensor, slice], Tensor]
"""(logits (n, V), which rows they are) -> (M,) sums over those rows."""


def sum_over_chunks(
    head: Callable[[Tensor], Tensor], normed: Float[Tensor, "N D"], losses: ChunkLosses, *, chunk_rows: int
) -> Float[Tensor, " M"]:
    """Sums of ``losses`` over all rows. The backward pass computes each chunk's logits again."""

    def of_chunk(rows: Tensor, where: slice) -> Tensor:
        return losses(head(rows), where)

    sums = []
    for start in range(0, max(1, len(normed)), chunk_rows):
        where = slice(start, start + chunk_rows)
        if torch.is_grad_enabled():
            # The generator's state is kept: an adapter on the head may have dropout.
            sums.append(checkpoint(of_chunk, normed[where], where, use_reentrant=False))
        else:
            sums.append(of_chunk(normed[where], where))
    return torch.stack(sums).sum(0)

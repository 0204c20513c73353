"""All losses of a step's rows at once: fused where every one has a fused form, else chunk by chunk under autograd.

Dimension key: N rows, D hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distilllens.chunked import sum_over_chunks
from distilllens.divergence import sparse_divergence
from distilllens.fused import Group, fused_losses, is_fused
from distilllens.lens import LogitLens


def sum_losses(
    normed: Sequence[Tensor], groups: Sequence[Group], lens: LogitLens, *, chunk_rows: int
) -> tuple[Tensor, Tensor]:
    """The weighted total of all losses, with a gradient, and each loss's own sum in nats, in order.

    ``normed`` are the states that the head reads, (N, D) for each group.
    """
    head = lens.plain_head()
    if head is not None and all(is_fused(loss.divergence, loss.tail) for group in groups for loss in group.losses):
        return fused_losses(torch.cat(list(normed)), head, groups, chunk_rows=chunk_rows)
    sums = []
    for rows, group in zip(normed, groups, strict=True):

        def of_chunk(logits: Tensor, where: slice, group: Group = group) -> Tensor:
            values = (
                sparse_divergence(loss.divergence, logits, loss.targets[where], loss.tail) for loss in group.losses
            )
            return torch.stack([value.sum() for value in values])

        sums.append(sum_over_chunks(lens.head, rows, of_chunk, chunk_rows=chunk_rows))
    each = torch.cat(sums)
    weights = torch.tensor([loss.weight for group in groups for loss in group.losses], device=each.device)
    return (each * weights).sum(), each.detach()

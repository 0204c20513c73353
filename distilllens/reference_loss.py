"""How likely the references of a dataset are to a model.

Dimension key: B batch, T tokens, N target positions.
"""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from distilllens.batches import pack_by_length
from distilllens.chunked import sum_over_chunks
from distilllens.data import Example
from distilllens.divergence import cross_entropy
from distilllens.lens import LogitLens, check_lens, rows_at

BATCH_TOKENS = 4096
"""Token budget of one forward pass, padding included."""

CHUNK_ROWS = 256
"""Target positions whose logits are alive at a time."""


@torch.no_grad()
def sum_of_losses(model: PreTrainedModel, examples: Sequence[Example], *, vocab_size: int) -> float:
    """Cross-entropy in nats, summed over all target positions of ``examples``."""
    lens = LogitLens(model, lens_norm="final", vocab_size=vocab_size)
    check_lens(model, lens)
    total = 0.0
    for batch in pack_by_length([example.num_tokens for example in examples], token_budget=BATCH_TOKENS):
        rows = [examples[index] for index in batch]
        ids_BT = pad_sequence([torch.tensor(row.token_ids) for row in rows], batch_first=True).to(model.device)
        # Padded by length, never by id: the padding may be a real token.
        mask_BT = pad_sequence([torch.ones(row.num_tokens) for row in rows], batch_first=True).long()
        is_target_BT = pad_sequence([torch.tensor(row.is_target) for row in rows], batch_first=True)
        is_target_BT = is_target_BT.to(model.device)
        hidden = lens.hidden_states(ids_BT, mask_BT.to(model.device), [lens.num_layers])[lens.num_layers]
        next_N = ids_BT.roll(-1, dims=1)[is_target_BT]
        sums = sum_over_chunks(
            lens.head,
            rows_at(hidden, is_target_BT),
            lambda logits, where, next_N=next_N: cross_entropy(logits, next_N[where]).sum()[None],
            chunk_rows=CHUNK_ROWS,
        )
        total += float(sums[0])
    return total

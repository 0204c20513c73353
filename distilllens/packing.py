"""Several examples in one row of a batch, each with its own positions and attention: less padding, the same loss."""

import itertools
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from distilllens.lens import LogitLens, computing_dtype
from distilllens_cache import CachedExample

LARGEST_GAP = 1e-3
"""How far a hidden state may lie from that of the example alone, relative to its largest entry."""
CHECKED_LENGTHS = (5, 2, 1, 6)
"""Tokens of the sequences that `check_packing` packs."""


def pack(examples: Sequence[CachedExample], *, in_one_row: bool) -> tuple[list[CachedExample], list[range]]:
    """Examples row by row, and which of them share each row: first fit, longest first.

    A row is as long as the longest example, so that attention costs no more than with padding; or it holds them all,
    as flash attention wants it. A pure function of the examples.
    """
    longest_first = sorted(examples, key=lambda example: -len(example.token_ids))
    capacity = sum(len(example.token_ids) for example in examples) if in_one_row else len(longest_first[0].token_ids)
    rows: list[list[CachedExample]] = []
    room: list[int] = []
    for example in longest_first:
        length = len(example.token_ids)
        number = next((number for number, left in enumerate(room) if left >= length), None)
        if number is None:
            number = len(rows)
            rows.append([])
            room.append(capacity)
        rows[number].append(example)
        room[number] -= length
    ends = itertools.accumulate(map(len, rows), initial=0)
    return [example for row in rows for example in row], [range(*pair) for pair in itertools.pairwise(ends)]


def wants_one_row(model: PreTrainedModel) -> bool:
    """Whether the model's attention finds the examples of a packed batch only if it is one row."""
    return "flash" in str(model.config._attn_implementation)


@torch.no_grad()
def check_packing(model: PreTrainedModel, lens: LogitLens) -> None:
    """Raise ValueError unless packed sequences give the hidden states that they have alone.

    The model, in evaluation mode, is called where it lies: attention kernels differ in what keeps sequences apart.
    """
    alone = [torch.arange(length, device=model.device)[None] % lens.vocab_size for length in CHECKED_LENGTHS]
    positions = torch.cat([torch.arange(length, device=model.device) for length in CHECKED_LENGTHS])[None]
    layer = lens.num_layers
    expected = torch.cat([lens.hidden_states(ids, None, [layer])[layer] for ids in alone], 1).float()
    packed = lens.hidden_states(torch.cat(alone, 1), None, [layer], position_ids=positions)[layer].float()
    gap = ((packed - expected).abs().max() / expected.abs().max()).item()
    # TensorFloat-32 rounds float32 products to ten bits.
    is_exact = computing_dtype(model) == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    if not gap < (LARGEST_GAP if is_exact else 0.1):
        raise ValueError(
            f"--packing: in {type(model).__name__} with {model.config._attn_implementation} attention, sequences in "
            f"one row see each other (hidden states differ by {gap:.2g}); train without --packing"
        )

"""The matrix products that no loss over a vocabulary can save."""

import torch
from torch import Tensor


def three_products(states: Tensor, weight: Tensor, *, chunk_rows: int) -> None:
    """Logits (N, V) of states (N, D) and weight (V, D), then the gradients at both, chunk by chunk as all must."""
    of_weight, of_states = torch.zeros_like(weight), torch.empty_like(states)
    chunk = torch.empty(chunk_rows, len(weight))
    for start in range(0, len(states), chunk_rows):
        rows = states[start : start + chunk_rows]
        logits = torch.mm(rows, weight.T, out=chunk[: len(rows)])
        torch.mm(logits, weight, out=of_states[start : start + chunk_rows])
        of_weight.addmm_(logits.T, rows)

"""The teacher's pass over some examples: hidden states at target positions, lens logits, sparse targets, tail sums.

Dimension key: B batch, T tokens, N rows, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from distilllens.batches import pack_by_length
from distilllens.data import Example
from distilllens.lens import LogitLens, rows_at
from distilllens.targets import SparseTargets, split_top_k, unstack_targets
from distilllens_cache import FIXED_POINT, CachedExample, LayerTargets

LOGIT_ROWS = 512
"""Rows whose full-vocabulary logits are alive at a time."""


@dataclass(frozen=True)
class TeacherPass:
    """A teacher ready to be read at the layers of a cache."""

    model: PreTrainedModel
    lens: LogitLens
    top_k: dict[int, int]
    """Tokens kept, by layer; its keys are the layers."""
    temperature: float
    has_tail_sums: bool

    def run(
        self,
        examples: Sequence[Example],
        *,
        first_index: int,
        batch_tokens: int,
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> tuple[list[CachedExample], dict[int, np.ndarray] | None]:
        """Targets of ``examples`` and the int64 fixed-point sums (V,) of their tails, by layer.

        Batches are packed by length within ``batch_tokens``; they depend on ``examples`` alone.
        """
        tails = {layer: np.zeros(self.lens.vocab_size, dtype=np.int64) for layer in self.top_k}
        found: dict[int, dict[int, LayerTargets]] = {}
        for members in pack_by_length([example.num_tokens for example in examples], token_budget=batch_tokens):
            batch = [examples[member] for member in members]
            targets = self._targets(batch, tails if self.has_tail_sums else None)
            lengths = [example.num_targets for example in batch]
            by_layer = {layer: unstack_targets(rows, lengths) for layer, rows in targets.items()}
            for place, member in enumerate(members):
                found[member] = {layer: by_layer[layer][place] for layer in self.top_k}
            progress(sum(example.num_tokens for example in batch))
        cached = [
            CachedExample(
                index=first_index + number,
                id=example.id,
                token_ids=np.array(example.token_ids, dtype=np.uint32),
                target_positions=np.flatnonzero(example.is_target).astype(np.uint32),
                targets=found[number],
            )
            for number, example in enumerate(examples)
        ]
        return cached, tails if self.has_tail_sums else None

    @torch.inference_mode()
    def _targets(self, batch: Sequence[Example], tails: dict[int, np.ndarray] | None) -> dict[int, SparseTargets]:
        width = max(example.num_tokens for example in batch)
        input_ids = torch.zeros(len(batch), width, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        is_target = torch.zeros(len(batch), width, dtype=torch.bool)
        for row, example in enumerate(batch):
            length = example.num_tokens
            input_ids[row, :length] = torch.tensor(np.asarray(example.token_ids, dtype=np.int64))
            attention_mask[row, :length] = 1
            is_target[row, :length] = torch.tensor(np.asarray(example.is_target, dtype=bool))
        device = self.model.device
        hidden = self.lens.hidden_states(input_ids.to(device), attention_mask.to(device), self.top_k)
        rows = {layer: rows_at(states, is_target.to(states.device)) for layer, states in hidden.items()}
        del hidden
        return {layer: self._read(rows[layer], layer, tails) for layer in self.top_k}

    def _read(self, rows: Tensor, layer: int, tails: dict[int, np.ndarray] | None) -> SparseTargets:
        parts = []
        for start in range(0, len(rows), LOGIT_ROWS):
            logits = self.lens.logits(rows[start : start + LOGIT_ROWS], layer)
            logits = logits if self.temperature == 1.0 else logits / self.temperature
            targets, tail = split_top_k(logits, self.top_k[layer])
            if not torch.isfinite(targets.log_probs).all():
                raise ValueError(
                    f"the teacher's logits at layer {layer} are not finite; load it in another --dtype (float16 "
                    f"overflows in some models) or leave that layer out"
                )
            if tails is not None:
                tails[layer] += fixed_point_sums(tail)
            parts.append(targets.to(torch.device("cpu")))
        fields = ("ids", "log_probs", "is_kept", "log_rest")
        return SparseTargets(*(torch.cat([getattr(part, field) for part in parts]) for field in fields))


def fixed_point_sums(tail: Float[Tensor, "N V"]) -> np.ndarray:
    """(V,) probabilities summed over rows, in int64 fixed point, so that chunks add up to the same in any order."""
    return (tail.sum(0).double() * FIXED_POINT).round().to(torch.int64).cpu().numpy()

"""The teacher's pass over some examples: hidden states at target positions, lens logits, sparse targets, tail sums.

Dimension key: B batch, T tokens, N rows, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from distilllens.batches import pack_by_length
from distilllens.data import Example
from distilllens.lens import LogitLens, execution_device, rows_at
from distilllens.tail_sampling import draw_tail, tail_uniforms
from distilllens.targets import SparseTargets, join_rows, split_top_k, unstack_targets
from distilllens.widths import Width
from distilllens_cache import FIXED_POINT, CachedExample, LayerTargets, Projection, TailSpec

LOGIT_ROWS = 512
"""Rows whose full-vocabulary logits are alive at a time."""


@dataclass(frozen=True)
class TeacherPass:
    """A teacher ready to be read at the layers of a cache."""

    model: PreTrainedModel
    lens: LogitLens
    widths: dict[int, Width]
    """Tokens kept, by layer; its keys are the layers."""
    tails: dict[int, TailSpec]
    """What is stored of the tail, by layer."""
    temperature: float = 1.0
    seed: int = 0
    """Of the draws from the tail."""
    projections: dict[int, Projection] = field(default_factory=dict)
    """What encodes the tail's sketch, by layer, once calibration has found it."""

    def run(
        self,
        examples: Sequence[Example],
        *,
        first_index: int,
        batch_tokens: int,
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> tuple[list[CachedExample], dict[int, np.ndarray]]:
        """Targets of ``examples`` and the int64 fixed-point sums (V,) of their tails, for layers with a profile.

        Batches are packed by length within ``batch_tokens``; they depend on ``examples`` alone.
        """
        with_profile = [layer for layer, spec in self.tails.items() if spec.profile]
        sums = {layer: np.zeros(self.lens.vocab_size, dtype=np.int64) for layer in with_profile}
        found: dict[int, dict[int, LayerTargets]] = {number: {} for number in range(len(examples))}
        for members in pack_by_length([example.num_tokens for example in examples], token_budget=batch_tokens):
            batch = [examples[member] for member in members]
            lengths = [example.num_targets for example in batch]
            places = [first_index + member for member in members]
            for layer, rows in self._hidden_rows(batch, tuple(self.widths)).items():
                uniforms = self._uniforms(layer, batch, places)
                parts = []
                for where, normed, targets, tail in self._chunks(rows, layer):
                    if layer in sums:
                        sums[layer] += fixed_point_sums(tail)
                    parts.append(self._with_tail_rows(layer, targets, normed, tail, uniforms, where))
                for member, one in zip(members, unstack_targets(join_rows(parts), lengths), strict=True):
                    found[member][layer] = one
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
        return cached, sums

    @torch.inference_mode()
    def forward(self, examples: Sequence[Example], *, batch_tokens: int) -> None:
        """Run the bare teacher, the least that distilling from it online costs: nothing is kept.

        Only the last layer is read, and its logits are computed at target positions only.
        """
        layer = self.lens.num_layers
        for members in pack_by_length([example.num_tokens for example in examples], token_budget=batch_tokens):
            rows = self._hidden_rows([examples[member] for member in members], (layer,))[layer]
            for part in rows.split(LOGIT_ROWS):
                self.lens.head(self.lens.normed(part, layer))

    def read(
        self, examples: Sequence[Example], layers: tuple[int, ...], *, batch_tokens: int
    ) -> Iterator[tuple[int, Tensor, SparseTargets, Tensor]]:
        """Layer, what the head reads (N, D), targets and tail probabilities (N, V), some rows at a time."""
        for members in pack_by_length([example.num_tokens for example in examples], token_budget=batch_tokens):
            hidden = self._hidden_rows([examples[member] for member in members], layers)
            for layer, rows in hidden.items():
                for _, normed, targets, tail in self._chunks(rows, layer):
                    yield layer, normed, targets, tail

    @torch.inference_mode()
    def _hidden_rows(self, batch: Sequence[Example], layers: tuple[int, ...]) -> dict[int, Float[Tensor, "N D"]]:
        width = max(example.num_tokens for example in batch)
        input_ids = torch.zeros(len(batch), width, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        is_target = torch.zeros(len(batch), width, dtype=torch.bool)
        for row, example in enumerate(batch):
            length = example.num_tokens
            input_ids[row, :length] = torch.tensor(np.asarray(example.token_ids, dtype=np.int64))
            attention_mask[row, :length] = 1
            is_target[row, :length] = torch.tensor(np.asarray(example.is_target, dtype=bool))
        device = execution_device(self.model.get_input_embeddings())
        hidden = self.lens.hidden_states(input_ids.to(device), attention_mask.to(device), layers)
        return {layer: rows_at(states, is_target.to(states.device)) for layer, states in hidden.items()}

    def _chunks(self, rows: Tensor, layer: int) -> Iterator[tuple[slice, Tensor, SparseTargets, Tensor]]:
        for start in range(0, len(rows), LOGIT_ROWS):
            where = slice(start, start + LOGIT_ROWS)
            with torch.inference_mode():
                normed = self.lens.normed(rows[where], layer)
                logits = self.lens.head(normed)
                logits = logits if self.temperature == 1.0 else logits / self.temperature
                targets, tail = split_top_k(logits, self.widths[layer])
            if not torch.isfinite(targets.log_probs).all():
                raise ValueError(
                    f"the teacher's logits at layer {layer} are not finite; load it in another --dtype (float16 "
                    f"overflows in some models) or leave that layer out"
                )
            yield where, normed, targets, tail

    def _uniforms(self, layer: int, batch: Sequence[Example], places: Sequence[int]) -> Tensor | None:
        draws = self.tails[layer].draws
        if draws is None:
            return None
        rows = [
            tail_uniforms(
                seed=self.seed, layer=layer, example=place, positions=np.flatnonzero(example.is_target), draws=draws
            )
            for place, example in zip(places, batch, strict=True)
        ]
        return torch.from_numpy(np.concatenate(rows))

    @torch.inference_mode()
    def _with_tail_rows(
        self,
        layer: int,
        targets: SparseTargets,
        normed: Tensor,
        tail: Tensor,
        uniforms: Tensor | None,
        where: slice,
    ) -> SparseTargets:
        if uniforms is not None:
            targets = replace(targets, samples=draw_tail(tail, targets, uniforms[where].to(tail.device)))
        targets = targets.to(torch.device("cpu"))
        if self.tails[layer].sketch is not None:
            codes = self.projections[layer].encode(normed.float().cpu().numpy())
            targets = replace(targets, codes=torch.from_numpy(codes))
        return targets


def fixed_point_sums(tail: Float[Tensor, "N V"]) -> np.ndarray:
    """(V,) probabilities summed over rows, in int64 fixed point, so that chunks add up to the same in any order."""
    return (tail.sum(0).double() * FIXED_POINT).round().to(torch.int64).cpu().numpy()

"""Sparse targets in memory: the likeliest tokens of each row, their log-probabilities, and the rest.

Dimension key: N rows, K tokens kept, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distilllens_cache import LOG_FLOOR, LayerTargets


@dataclass(frozen=True)
class SparseTargets:
    """A teacher's distribution in each row: ids, natural log-probabilities and the log of the leftover mass.

    Rows may keep fewer than K tokens; ``is_kept`` says which slots count, so that no id means "nothing".
    """

    ids: Int[Tensor, "N K"]
    log_probs: Float[Tensor, "N K"]
    is_kept: Bool[Tensor, "N K"]
    log_rest: Float[Tensor, " N"]

    def __getitem__(self, rows: slice) -> "SparseTargets":
        """These targets at some of their rows."""
        return SparseTargets(self.ids[rows], self.log_probs[rows], self.is_kept[rows], self.log_rest[rows])

    def __len__(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device) -> "SparseTargets":
        """These targets on another device."""
        return SparseTargets(*(part.to(device) for part in (self.ids, self.log_probs, self.is_kept, self.log_rest)))


def take_top_k(logits: Float[Tensor, "N V"], k: int) -> SparseTargets:
    """Keep the ``k`` likeliest tokens of each row; probabilities are not renormalized."""
    return split_top_k(logits, k)[0]


def split_top_k(logits: Float[Tensor, "N V"], k: int) -> tuple[SparseTargets, Float[Tensor, "N V"]]:
    """The ``k`` likeliest tokens of each row, and the probabilities of all others (0 at the kept ones).

    Tokens stand by falling probability and rising id. The rest is summed over the tokens left out: ``1 - sum`` has
    no correct digit in a peaked row. Few passes, in place: on a CPU each costs a tenth of the head itself.
    """
    kept, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    by_id = ids.argsort(dim=-1)
    kept, ids = kept.gather(-1, by_id), ids.gather(-1, by_id)
    by_probability = kept.argsort(dim=-1, descending=True, stable=True)
    kept, ids = kept.gather(-1, by_probability), ids.gather(-1, by_probability)
    top = kept[:, :1]
    tail = (logits - top).exp_()
    normaliser = tail.sum(-1, keepdim=True)
    tail = tail.scatter_(-1, ids, 0.0).div_(normaliser)
    log_rest = tail.sum(-1).log().clamp_min(LOG_FLOOR)
    log_probs = (kept - top) - normaliser.log()
    targets = SparseTargets(ids, log_probs, torch.ones_like(ids, dtype=torch.bool), log_rest)
    return targets, tail


def stack_targets(targets: list[LayerTargets]) -> SparseTargets:
    """Targets of one layer, example after example, padded to their widest row."""
    counts = np.concatenate([one.counts for one in targets])
    is_kept = np.arange(counts.max(initial=1))[None, :] < counts[:, None]
    ids = np.zeros(is_kept.shape, dtype=np.int64)
    log_probs = np.full(is_kept.shape, LOG_FLOOR, dtype=np.float32)
    ids[is_kept] = np.concatenate([one.ids for one in targets])
    log_probs[is_kept] = np.concatenate([one.log_probs for one in targets])
    log_rest = np.concatenate([one.log_rest for one in targets]).astype(np.float32)
    return SparseTargets(*(torch.from_numpy(part) for part in (ids, log_probs, is_kept, log_rest)))


def unstack_targets(targets: SparseTargets, lengths: list[int]) -> list[LayerTargets]:
    """The reverse of ``stack_targets``: rows split into examples of ``lengths`` targets each."""
    if sum(lengths) != len(targets):
        raise ValueError(f"{len(targets)} rows cannot be split into examples of {sum(lengths)} targets")
    examples, start = [], 0
    for length in lengths:
        rows = targets[start : start + length]
        counts = rows.is_kept.sum(-1).to(torch.int32)
        examples.append(
            LayerTargets(
                counts=counts.numpy(),
                ids=rows.ids[rows.is_kept].numpy().astype(np.uint32),
                log_probs=rows.log_probs[rows.is_kept].float().numpy(),
                log_rest=rows.log_rest.float().numpy(),
            )
        )
        start += length
    return examples

"""Sparse targets in memory: the likeliest tokens of each row, their log-probabilities, and the rest.

Dimension key: N rows, K tokens kept, S sampled tokens, R rank of a sketch, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from distilllens.widths import Width
from distilllens_cache import LOG_FLOOR, LayerTargets
from distilllens_cache import TailSamples as CachedSamples

RowsT = TypeVar("RowsT", bound="_Rows")


class _Rows:
    """Tensors of one row count, cut and moved together; absent ones stay absent."""

    def __getitem__(self: RowsT, rows: slice | Tensor) -> RowsT:
        """These at some of their rows."""
        return self._each(lambda part: part[rows])

    def to(self: RowsT, device: torch.device) -> RowsT:
        """These on another device."""
        return self._each(lambda part: part.to(device))

    def _each(self: RowsT, change: Callable[[Any], Any]) -> RowsT:
        parts = {field.name: getattr(self, field.name) for field in fields(cast(Any, self))}
        return replace(cast(Any, self), **{name: change(p) for name, p in parts.items() if p is not None})


def join_rows(parts: Sequence[RowsT]) -> RowsT:
    """Rows of all parts, one after another; every part has the same fields and widths."""
    kind = type(parts[0])
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(cast(Any, kind))}

    def joined(column: list[Any]) -> Any:
        if column[0] is None:
            return None
        return torch.cat(column) if isinstance(column[0], Tensor) else join_rows(column)

    return kind(**{name: joined(column) for name, column in columns.items()})


@dataclass(frozen=True)
class TailSamples(_Rows):
    """Tokens drawn from the tail of each row, with the teacher's exact log-probabilities."""

    ids: Int[Tensor, "N S"]
    log_probs: Float[Tensor, "N S"]
    draws: Int[Tensor, "N S"]
    """How often each was drawn; 0 is padding."""


@dataclass(frozen=True)
class SparseTargets(_Rows):
    """A teacher's distribution in each row: ids, natural log-probabilities and the log of the leftover mass.

    Rows may keep fewer than K tokens; ``is_kept`` says which slots count, so that no id means "nothing".
    """

    ids: Int[Tensor, "N K"]
    log_probs: Float[Tensor, "N K"]
    is_kept: Bool[Tensor, "N K"]
    log_rest: Float[Tensor, " N"]
    codes: Num[Tensor, "N R"] | None = None
    """Coefficients of the tail's sketch, where the cache has them; whole numbers there."""
    samples: TailSamples | None = None
    """Draws from the tail, where the cache has them."""

    def __len__(self) -> int:
        return self.ids.shape[0]


def entropies(targets: SparseTargets) -> Float[Tensor, " N"]:
    """Entropy of each row's kept tokens and its rest as one more outcome, in nats: at most that of the whole row."""
    of_kept = -(targets.log_probs.exp() * targets.log_probs).masked_fill(~targets.is_kept, 0.0).sum(-1)
    return of_kept - targets.log_rest.exp() * targets.log_rest


def take_top_k(logits: Float[Tensor, "N V"], width: int | Width) -> SparseTargets:
    """Keep the likeliest tokens of each row; probabilities are not renormalized."""
    return split_top_k(logits, width)[0]


def split_top_k(logits: Float[Tensor, "N V"], width: int | Width) -> tuple[SparseTargets, Float[Tensor, "N V"]]:
    """The likeliest tokens of each row, and the probabilities of all others (0 at the kept ones).

    Tokens stand by falling probability and rising id. The rest is summed over the tokens left out: ``1 - sum`` has
    no correct digit in a peaked row. Few passes, in place: on a CPU each costs a tenth of the head itself.
    """
    width = Width(width, width) if isinstance(width, int) else width
    kept, ids = logits.topk(min(width.max_k, logits.shape[-1]), dim=-1)
    by_id = ids.argsort(dim=-1)
    kept, ids = kept.gather(-1, by_id), ids.gather(-1, by_id)
    by_probability = kept.argsort(dim=-1, descending=True, stable=True)
    kept, ids = kept.gather(-1, by_probability), ids.gather(-1, by_probability)
    top = kept[:, :1]
    tail = (logits - top).exp_()
    normaliser = tail.sum(-1, keepdim=True)
    log_probs = (kept - top) - normaliser.log()
    is_kept = torch.ones_like(ids, dtype=torch.bool)
    if not width.is_fixed:
        is_kept = keeps(log_probs.exp(), width)
        # The first is always kept: padding slots point at it until its mass is taken out of the tail.
        ids = torch.where(is_kept, ids, ids[:, :1])
    tail = tail.scatter_(-1, ids, 0.0).div_(normaliser)
    log_rest = tail.sum(-1).log().clamp_min(LOG_FLOOR)
    targets = SparseTargets(ids.masked_fill(~is_kept, 0), log_probs.masked_fill(~is_kept, LOG_FLOOR), is_kept, log_rest)
    return targets, tail


def keeps(probs: Float[Tensor, "N K"], width: Width) -> Bool[Tensor, "N K"]:
    """Which of a row's likeliest tokens, by falling probability, ``width`` keeps."""
    is_kept = (probs >= width.min_prob) & (probs.cumsum(-1) - probs < width.top_p)
    is_kept[:, : width.min_k] = True
    is_kept[:, width.max_k :] = False
    return is_kept


def stack_targets(targets: list[LayerTargets]) -> SparseTargets:
    """Targets of one layer, example after example, padded to their widest row."""
    counts = np.concatenate([one.counts for one in targets])
    ids, log_probs, is_kept = _padded(
        counts,
        (np.concatenate([one.ids for one in targets]), np.int64, 0.0),
        (np.concatenate([one.log_probs for one in targets]), np.float32, LOG_FLOOR),
    )
    log_rest = np.concatenate([one.log_rest for one in targets]).astype(np.float32)
    codes = [one.codes for one in targets if one.codes is not None]
    samples = [one.samples for one in targets if one.samples is not None]
    return SparseTargets(
        *(torch.from_numpy(part) for part in (ids, log_probs, is_kept, log_rest)),
        codes=torch.from_numpy(np.concatenate(codes)) if codes else None,
        samples=_stack_samples(samples) if samples else None,
    )


def _stack_samples(samples: list[CachedSamples]) -> TailSamples:
    ids, log_probs, draws, _ = _padded(
        np.concatenate([one.counts for one in samples]),
        (np.concatenate([one.ids for one in samples]), np.int64, 0.0),
        (np.concatenate([one.log_probs for one in samples]), np.float32, LOG_FLOOR),
        (np.concatenate([one.draws for one in samples]), np.int64, 0.0),
    )
    return TailSamples(*(torch.from_numpy(part) for part in (ids, log_probs, draws)))


def _padded(counts: np.ndarray, *columns: tuple[np.ndarray, type, float]) -> list[np.ndarray]:
    """Ragged rows as rectangles: each of (values, dtype, padding), and last which slots are values."""
    is_value = np.arange(counts.max(initial=1))[None, :] < counts[:, None]
    rectangles = []
    for values, dtype, padding in columns:
        rectangle = np.full(is_value.shape, padding, dtype=dtype)
        rectangle[is_value] = values
        rectangles.append(rectangle)
    return [*rectangles, is_value]


def unstack_targets(targets: SparseTargets, lengths: list[int]) -> list[LayerTargets]:
    """The reverse of ``stack_targets``: rows split into examples of ``lengths`` targets each."""
    if sum(lengths) != len(targets):
        raise ValueError(f"{len(targets)} rows cannot be split into examples of {sum(lengths)} targets")
    examples, start = [], 0
    for length in lengths:
        rows = targets[start : start + length]
        samples = rows.samples
        examples.append(
            LayerTargets(
                counts=rows.is_kept.sum(-1).to(torch.int32).numpy(),
                ids=rows.ids[rows.is_kept].numpy().astype(np.uint32),
                log_probs=rows.log_probs[rows.is_kept].float().numpy(),
                log_rest=rows.log_rest.float().numpy(),
                codes=None if rows.codes is None else rows.codes.numpy(),
                samples=None if samples is None else _unstack_samples(samples),
            )
        )
        start += length
    return examples


def _unstack_samples(samples: TailSamples) -> CachedSamples:
    is_drawn = samples.draws > 0
    return CachedSamples(
        counts=is_drawn.sum(-1).to(torch.int32).numpy(),
        ids=samples.ids[is_drawn].numpy().astype(np.uint32),
        draws=samples.draws[is_drawn].numpy().astype(np.uint16),
        log_probs=samples.log_probs[is_drawn].float().numpy(),
    )

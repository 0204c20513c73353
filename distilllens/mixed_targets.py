"""Several teachers' sparse targets at the same positions: how far they disagree, and their mixture as one target.

A target completed by its tail is a distribution over the vocabulary (a bucket, which has no shape, is taken to be even
where a probability outside the kept tokens is needed). The mixture is the weighted mean of those distributions, with
the tokens that any teacher keeps as its kept tokens: each teacher that left one out gives it what its tail does.

Dimension key: N rows, K tokens that one teacher keeps, U tokens that any of them keeps, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distilllens.tails import BucketTail, ShapedTail, SketchTail, Tail, log_mass_outside
from distilllens.targets import SparseTargets
from distilllens_cache import LOG_FLOOR

CHUNK_ROWS = 128
"""Rows whose tails are over the whole vocabulary at a time."""
_NO_ID = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class MixedTail(ShapedTail):
    """The mixture of several teachers' tails. The codes of its targets are, for each teacher, the log of its weight and
    level (see `ShapedTail.level`), then the codes of its own sketch, if it has one.
    """

    tails: tuple[ShapedTail, ...]

    def shape(self, targets: SparseTargets, vocabulary: slice = slice(None)) -> Float[Tensor, "N chunk"]:
        """Log-probabilities of the mixture."""
        parts = [level + tail.shape(own, vocabulary) for level, tail, own in self._parts(targets)]
        return torch.stack(parts).logsumexp(0)

    def shape_at(self, targets: SparseTargets, ids: Int[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """Log-probabilities of the mixture for some tokens."""
        parts = [level + tail.shape_at(own, ids) for level, tail, own in self._parts(targets)]
        return torch.stack(parts).logsumexp(0)

    def to(self, device: torch.device) -> "MixedTail":
        """This tail on another device."""
        return MixedTail(tuple(cast(ShapedTail, tail.to(device)) for tail in self.tails))

    def _parts(self, targets: SparseTargets) -> list[tuple[Tensor, ShapedTail, SparseTargets]]:
        if targets.codes is None:
            raise ValueError("the mixture of tails needs targets with codes")
        columns = targets.codes.split([1 + _rank(tail) for tail in self.tails], -1)
        return [
            (part[:, :1], tail, replace(targets, codes=part[:, 1:]))
            for part, tail in zip(columns, self.tails, strict=True)
        ]


class Mixture(NamedTuple):
    """Several teachers as one."""

    targets: SparseTargets
    tail: Tail
    jsd: Float[Tensor, " N"]
    """The weighted Jensen-Shannon divergence between the teachers, in nats, with what is outside all their kept tokens
    as one outcome: at most that of the completed distributions, and at most the entropy of the weights."""


@torch.no_grad()
def mix(
    targets: Sequence[SparseTargets], tails: Sequence[Tail], weights: Sequence[float], *, vocab_size: int
) -> Mixture:
    """The teachers as one: row n of each of ``targets`` is about the same position. ``weights`` sum to 1.

    Where every tail has a shape, the mixture is exactly that of the completed targets; its tail is a `MixedTail`.
    Otherwise what lies outside the kept tokens is one bucket, of exactly the mixture's mass.
    """
    ids, is_kept = _union(targets)
    seen = [_at(own, tail, ids, is_kept, vocab_size) for own, tail in zip(targets, tails, strict=True)]
    log_weights = torch.tensor(weights, dtype=torch.float64, device=ids.device).log().float()
    # A cell for each kept token, and one for everything else.
    cells = torch.stack(
        [torch.cat([one.log_p.masked_fill(~is_kept, LOG_FLOOR), one.log_rest[:, None]], -1) for one in seen]
    )
    log_mean = (cells + log_weights[:, None, None]).logsumexp(0)
    counts = torch.cat([is_kept, torch.ones_like(is_kept[:, :1])], -1)
    jsd = ((cells + log_weights[:, None, None]).exp() * (cells - log_mean) * counts).sum((0, -1)).clamp_min(0.0)

    log_p, log_rest = log_mean[:, :-1], log_mean[:, -1].clamp_min(LOG_FLOOR)
    # Likeliest first, as in every target; padding last.
    order = log_p.masked_fill(~is_kept, -math.inf).argsort(dim=-1, descending=True, stable=True)
    ids, log_p, is_kept = (part.gather(-1, order) for part in (ids, log_p, is_kept))
    mixed = SparseTargets(ids, log_p.clamp_min(LOG_FLOOR), is_kept, log_rest)
    if not all(isinstance(tail, ShapedTail) for tail in tails):
        return Mixture(mixed, BucketTail(), jsd)
    codes = []
    for own, one, tail, log_weight in zip(targets, seen, tails, log_weights, strict=True):
        codes.append((one.level + log_weight)[:, None])
        if own.codes is not None and (rank := _rank(tail)):
            codes.append(own.codes[:, :rank].float())
    shaped = tuple(tail for tail in tails if isinstance(tail, ShapedTail))
    return Mixture(replace(mixed, codes=torch.cat(codes, -1)), MixedTail(shaped), jsd)


def is_mixable(tail: Tail) -> bool:
    """Whether targets with this tail can be mixed: draws are of other tokens for each teacher, and renormalising leaves
    no rest."""
    return isinstance(tail, BucketTail | ShapedTail)


class _Seen(NamedTuple):
    """One teacher at the tokens that any of them keeps."""

    log_p: Float[Tensor, "N U"]
    log_rest: Float[Tensor, " N"]
    """Of the mass outside those tokens."""
    level: Float[Tensor, " N"]
    """Of the tail (see `ShapedTail.level`); for a bucket, the log-probability of each token outside its kept ones."""


def _union(targets: Sequence[SparseTargets]) -> tuple[Int[Tensor, "N U"], Bool[Tensor, "N U"]]:
    """The ids that any of ``targets`` keeps, each once and ascending; padding is id 0."""
    ids = torch.cat([one.ids.masked_fill(~one.is_kept, _NO_ID) for one in targets], -1).sort(-1).values
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    is_kept = is_first & (ids != _NO_ID)
    return ids.masked_fill(~is_kept, 0), is_kept


def _at(
    targets: SparseTargets, tail: Tail, ids: Int[Tensor, "N U"], is_kept: Bool[Tensor, "N U"], vocab_size: int
) -> _Seen:
    """One teacher's completed target at the tokens ``ids`` and outside them."""
    own, order = targets.ids.masked_fill(~targets.is_kept, _NO_ID).sort(-1)
    place = torch.searchsorted(own, ids).clamp_max(own.shape[-1] - 1)
    is_own = own.gather(-1, place) == ids
    of_own = targets.log_probs.float().gather(-1, order.gather(-1, place))
    union = SparseTargets(ids, torch.zeros_like(of_own), is_kept, targets.log_rest)
    if isinstance(tail, ShapedTail):
        chunks = [slice(start, start + CHUNK_ROWS) for start in range(0, max(1, len(ids)), CHUNK_ROWS)]
        parts = [_shaped_tail(targets[rows], tail, union[rows]) for rows in chunks]
        of_tail, log_rest, level = (torch.cat(column) for column in zip(*parts, strict=True))
    else:
        assert isinstance(tail, BucketTail)
        outside = (vocab_size - targets.is_kept.sum(-1)).clamp_min(1)
        outside_all = vocab_size - is_kept.sum(-1)
        level = targets.log_rest.float() - outside.log()
        log_rest = (level + outside_all.log()).clamp_min(LOG_FLOOR)
        of_tail = level[:, None].expand_as(of_own)
    return _Seen(torch.where(is_own, of_own, of_tail).clamp_min(LOG_FLOOR), log_rest, level)


def _shaped_tail(targets: SparseTargets, tail: ShapedTail, union: SparseTargets) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of a tail at the union's tokens, the log of its mass outside them, and its level."""
    shape = tail.shape(targets).float().expand(len(targets), -1)
    level = targets.log_rest.float() - log_mass_outside(shape, targets)
    log_rest = (level + log_mass_outside(shape, union)).clamp_min(LOG_FLOOR)
    return level[:, None] + shape.gather(-1, union.ids), log_rest, level


def _rank(tail: Tail) -> int:
    return tail.rank if isinstance(tail, SketchTail) else 0

"""The codec `packed`: a few small stages, one after another.

    ids        -> rank among the shard's common ids   (common_ids)
               -> ascending in their row, gaps        (gaps)
               -> planes of bytes                     (gaps)
    log_probs  -> level                               (companding)
               -> levels above the deepest of its row
    all        -> zstd, by Arrow

Back, a row is sorted by falling probability, ids of one level by number, and its k + 1 cells are normalised, which
removes the part of the rounding that they have in common.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distilllens_cache.common_ids import MOST, common_ids, ids_by_rank, ranks_by_id
from distilllens_cache.companding import LOG_PROBS, PROBS, levels_of, mass_error
from distilllens_cache.errors import CacheError
from distilllens_cache.gaps import from_gaps, from_planes, num_planes, to_gaps, to_planes
from distilllens_cache.layer_codec import Codec, LayerPlace, LayerShape, count_type, list_field
from distilllens_cache.lists import lists_of
from distilllens_cache.meaning import SOURCE_TOLERANCE, FlatLayer, check_counts, check_mass, first
from distilllens_cache.ragged import Rows
from distilllens_cache.targets import LOG_FLOOR

MAX_VOCAB_SIZE = 1 << 24
"""A rank and a level are sorted as one 32-bit number."""


class PackedCodec(Codec):
    """Small: sets of ids by their gaps, log-probabilities as 256 levels."""

    name = "packed"
    is_lossless = False
    compression_level = 1
    """Nothing repeats here, only the bytes' frequencies count: levels 3 and 9, a long window and a trained dictionary
    change the size by less than 3 %. 19 saves 3 to 5 % and takes over a hundred times as long
    (`scripts/bench/storage.py --studies`)."""

    def fields(self, shape: LayerShape) -> list[pa.Field]:
        if shape.vocab_size > MAX_VOCAB_SIZE:
            raise CacheError(
                f"the codec {self.name!r} holds vocabularies of up to {MAX_VOCAB_SIZE} ids, not of {shape.vocab_size}. "
                f"Use arrow-fp16."
            )
        parts = {
            "common": pa.uint32(),
            "counts": count_type(shape.top_k, smallest=pa.uint8()),
            "deepest": pa.uint8(),
            "rest": pa.uint8(),
            **{f"gaps_{plane}": pa.uint8() for plane in range(num_planes(shape.vocab_size))},
            "above": pa.uint8(),
        }
        return [list_field(f"layer_{shape.layer}_{name}", kind) for name, kind in parts.items()]

    def row_bytes(self, shape: LayerShape) -> int:
        count = count_type(shape.top_k, smallest=pa.uint8()).bit_width // 8
        return count + 2 + shape.top_k * (num_planes(shape.vocab_size) + 1)

    def layer_bytes(self, shape: LayerShape) -> int:
        return 4 * MOST

    def encode(self, flat: FlatLayer, shape: LayerShape, place: LayerPlace) -> list[pa.Array]:
        rows = Rows(flat.counts)
        common = common_ids(flat.ids, shape.vocab_size)
        # Of each cell the rank, and its level in the low byte: sorted by rank.
        keys = ranks_by_id(common, shape.vocab_size).take(flat.ids) << np.uint32(8)
        keys |= levels_of(flat.log_probs)
        rows.sort(keys)
        levels = keys.astype(np.uint8)
        deepest = rows.maxima(levels)
        gaps = to_planes(to_gaps(keys >> np.uint32(8), rows), num_planes(shape.vocab_size))
        parts = (common, flat.counts, deepest, levels_of(flat.log_rest), *gaps, rows.spread(deepest) - levels)
        num_examples = len(place.row_bounds) - 1
        return [_one_list(part, num_examples, field) for part, field in zip(parts, self.fields(shape), strict=True)]

    def decode(self, columns: Sequence[pa.ListArray], shape: LayerShape, place: LayerPlace) -> FlatLayer:
        common, counts, deepest, rest, *planes, above = (_only_list(column, place) for column in columns)
        id_of = _id_of_rank(common, shape, place)
        num_rows = int(place.row_bounds[-1])
        if not len(counts) == len(deepest) == len(rest) == num_rows:
            raise CacheError(f"{place.name}: the counts, deepest or rest are not one for each of {num_rows} targets.")
        counts = counts.astype(np.int64)
        check_counts(counts, top_k=shape.top_k, where=place.where)
        rows = Rows(counts)
        if any(len(part) != rows.num_cells for part in (*planes, above)):
            raise CacheError(f"{place.name}: the gaps or above are not as many as its counts say, {rows.num_cells}.")
        ranks = from_gaps(from_planes(planes), rows)
        last = ranks[rows.ends - 1]
        bad = first(last >= shape.vocab_size)
        if bad is not None:
            raise CacheError(
                f"{place.where(bad)}: the gaps between ids lead to {last[bad]}, but the vocabulary has "
                f"{shape.vocab_size} ids."
            )
        levels = rows.spread(deepest)
        bad = first(above > levels)
        if bad is not None:
            row = int(np.searchsorted(rows.ends, bad, side="right"))
            raise CacheError(f"{place.where(row)}: a level lies {above[bad]} above the deepest, {levels[bad]}.")
        levels -= above
        keys = levels.astype(np.uint32) << np.uint32(24)
        keys |= id_of.take(ranks)
        rows.sort(keys)
        # numpy looks up by intp only, and would convert anything else twice.
        levels = (keys >> np.uint32(24)).astype(np.intp)
        keys &= np.uint32(MAX_VOCAB_SIZE - 1)
        mass = rows.sums(PROBS.take(levels)) + PROBS.take(rest)
        check_mass(mass, tolerance=mass_error(shape.top_k + 1) + SOURCE_TOLERANCE, where=place.where)
        log_mass = np.log(mass).astype(np.float32)
        log_probs = LOG_PROBS.take(levels)
        # Nothing rises above 0: the mass is at least that of each cell, also after rounding.
        log_probs -= rows.spread(log_mass)
        return FlatLayer(counts, keys, log_probs, np.maximum(LOG_PROBS.take(rest) - log_mass, LOG_FLOOR))


def _id_of_rank(common: NDArray[np.uint32], shape: LayerShape, place: LayerPlace) -> NDArray[np.uint32]:
    """(V,) the id of each rank, if the common ids make sense."""
    if len(common) > MOST:
        raise CacheError(f"{place.name}: {len(common)} common ids; there are at most {MOST}.")
    if len(common) and int(common.max()) >= shape.vocab_size:
        raise CacheError(
            f"{place.name}: a common id is {int(common.max())}, but the vocabulary has {shape.vocab_size} ids."
        )
    ids = ids_by_rank(common, shape.vocab_size)
    if len(ids) != shape.vocab_size:
        raise CacheError(f"{place.name}: a common id occurs twice.")
    return ids


# A shard is read as a whole, and where each example starts would cost 2 % of a middle layer, once in every column.


def _one_list(values: NDArray, num_examples: int, field: pa.Field) -> pa.ListArray:
    """Everything in the list of the first example; the others' are empty."""
    kind = field.type.value_type
    bounds = np.minimum(np.arange(num_examples + 1), 1) * len(values)
    return lists_of(pa.array(values.astype(kind.to_pandas_dtype(), copy=False), kind), bounds, field)


def _only_list(column: pa.ListArray, place: LayerPlace) -> NDArray:
    values = column.values.to_numpy()
    if (column.offsets.to_numpy()[1:] != len(values)).any():
        raise CacheError(f"{place.name}: a column is not one list at the first example, with the others empty.")
    return values

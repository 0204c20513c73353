"""Plain codecs: ids and log-probabilities as they are, for whoever reads a shard with nothing but Arrow."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distilllens_cache.layer_codec import Codec, LayerPlace, LayerShape, count_type, list_field
from distilllens_cache.lists import lists_of
from distilllens_cache.meaning import FlatLayer, check_layer
from distilllens_cache.targets import LOG_FLOOR


class PlainCodec(Codec):
    """One column each for counts, ids, log-probabilities and rests; values in a floating-point type."""

    compression_level = 3

    def __init__(self, name: str, value_type: pa.DataType, mass_tolerance: float, *, is_lossless: bool) -> None:
        """``mass_tolerance``: how far the mass of a stored row may be from 1."""
        self.name = name
        self.value_type = value_type
        self.dtype = np.dtype(value_type.to_pandas_dtype())
        self.mass_tolerance = mass_tolerance
        self.is_lossless = is_lossless

    def fields(self, shape: LayerShape) -> list[pa.Field]:
        return [
            list_field(f"layer_{shape.layer}_counts", count_type(shape.top_k, smallest=pa.uint16())),
            list_field(f"layer_{shape.layer}_ids", pa.uint32()),
            list_field(f"layer_{shape.layer}_log_probs", self.value_type),
            list_field(f"layer_{shape.layer}_log_rest", self.value_type),
        ]

    def row_bytes(self, shape: LayerShape) -> int:
        count = count_type(shape.top_k, smallest=pa.uint16()).bit_width // 8
        return count + shape.top_k * (4 + self.dtype.itemsize) + self.dtype.itemsize

    def encode(self, flat: FlatLayer, shape: LayerShape, place: LayerPlace) -> list[pa.Array]:
        cell_bounds = place.cell_bounds(np.cumsum(flat.counts))
        counts, ids, log_probs, log_rest = self.fields(shape)
        return [
            _lists(flat.counts, place.row_bounds, counts),
            _lists(flat.ids, cell_bounds, ids),
            _lists(self._quantised(flat.log_probs), cell_bounds, log_probs),
            _lists(self._quantised(flat.log_rest), place.row_bounds, log_rest),
        ]

    def decode(self, columns: Sequence[pa.ListArray], shape: LayerShape, place: LayerPlace) -> FlatLayer:
        of_counts, of_ids, of_log_probs, of_log_rest = columns
        place.check_row_lists(of_counts, "counts")
        place.check_row_lists(of_log_rest, "log_rest")
        log_probs = of_log_probs.values.to_numpy().astype(np.float32, copy=False)
        log_rest = of_log_rest.values.to_numpy().astype(np.float32, copy=False)
        counts = of_counts.values.to_numpy().astype(np.int64)
        flat = FlatLayer(counts, of_ids.values.to_numpy(), log_probs, log_rest)
        checked = check_layer(
            flat,
            top_k=shape.top_k,
            vocab_size=shape.vocab_size,
            mass_tolerance=self.mass_tolerance,
            where=place.where,
        )
        ends = checked.starts + counts
        place.check_cell_lists(of_ids, ends, "ids")
        place.check_cell_lists(of_log_probs, ends, "log_probs")
        if self.is_lossless:
            return flat
        log_mass = np.log(checked.mass).astype(np.float32)
        log_probs = np.minimum(log_probs - np.repeat(log_mass, counts), 0)
        return FlatLayer(counts, flat.ids, log_probs, np.clip(log_rest - log_mass, LOG_FLOOR, 0))

    def _quantised(self, values: NDArray[np.float32]) -> NDArray:
        return values if self.is_lossless else np.maximum(values, np.finfo(self.dtype).min).astype(self.dtype)


def _lists(values: NDArray, bounds: NDArray[np.int64], field: pa.Field) -> pa.ListArray:
    kind = field.type.value_type
    return lists_of(pa.array(values.astype(kind.to_pandas_dtype(), copy=False), kind), bounds, field)

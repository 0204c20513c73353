"""What a codec is: the one who knows how the rows of a layer lie in the columns of a shard."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distilllens_cache.errors import CacheError
from distilllens_cache.meaning import FlatLayer


class LayerShape(NamedTuple):
    """What the columns of a layer depend on."""

    layer: int
    top_k: int
    """Most ids that a row keeps."""
    vocab_size: int
    """No id reaches it."""


@dataclass(frozen=True, eq=False)
class LayerPlace:
    """Where the rows of a layer belong."""

    row_bounds: NDArray[np.int64]
    """(E + 1,) the rows of example e are those from ``row_bounds[e]`` to ``row_bounds[e + 1]``."""
    name: str
    """File and layer, for error messages."""
    where: Callable[[int], str]
    """File, layer, example and position of a row, for error messages."""

    def cell_bounds(self, ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """(E + 1,) the same for cells, in rows that end at ``ends``, (R,)."""
        return np.concatenate([[0], ends])[self.row_bounds]

    def check_row_lists(self, column: pa.ListArray, what: str) -> None:
        """Refuse a column that has not one item for each row."""
        if not np.array_equal(column.offsets.to_numpy(), self.row_bounds):
            raise CacheError(f"{self.name}: the {what} are not one for each target position.")

    def check_cell_lists(self, column: pa.ListArray, ends: NDArray[np.int64], what: str) -> None:
        """Refuse a column that has not one item for each cell."""
        if not np.array_equal(column.offsets.to_numpy(), self.cell_bounds(ends)):
            raise CacheError(f"{self.name}: the {what} of an example are not as many as its counts say.")


class Codec(ABC):
    """How the rows of a layer become columns of an Arrow file, and back."""

    name: str
    """What plans and manifests call it."""
    is_lossless: bool
    """Whether float32 comes back bit for bit. If not, decoding normalises each row's k + 1 cells."""
    compression_level: int
    """Of zstd, for the whole shard."""

    @abstractmethod
    def fields(self, shape: LayerShape) -> list[pa.Field]:
        """The exact columns of a layer; `CacheError` if the codec cannot hold such a layer."""

    @abstractmethod
    def row_bytes(self, shape: LayerShape) -> int:
        """Most bytes that one row takes before compression."""

    def layer_bytes(self, shape: LayerShape) -> int:
        """Most bytes before compression that a layer of a shard takes besides its rows."""
        return 0

    @abstractmethod
    def encode(self, flat: FlatLayer, shape: LayerShape, place: LayerPlace) -> list[pa.Array]:
        """The columns of rows that were found to make sense."""

    @abstractmethod
    def decode(self, columns: Sequence[pa.ListArray], shape: LayerShape, place: LayerPlace) -> FlatLayer:
        """The rows in columns that have the types of `fields`; `CacheError` if they make no sense.

        Each row is sorted by falling probability, without repeated ids, and its k + 1 cells add up to 1.
        """


def list_field(name: str, item: pa.DataType) -> pa.Field:
    """A column that holds one list for each example. Nothing is nullable."""
    return pa.field(name, pa.list_(pa.field("item", item, nullable=False)), nullable=False)


def count_type(top_k: int, *, smallest: pa.DataType) -> pa.DataType:
    """The narrowest of ``smallest`` and the wider unsigned types that holds 1..top_k."""
    kinds = (pa.uint8(), pa.uint16(), pa.uint32())
    fitting = [kind for kind in kinds if kind.bit_width >= smallest.bit_width and top_k < 1 << kind.bit_width]
    if not fitting:
        raise CacheError(f"rows of up to {top_k} ids are wider than this format allows.")
    return fitting[0]

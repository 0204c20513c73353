"""The index: one row for each example of the plan."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distilllens_cache.arrow_file import from_arrow, to_arrow
from distilllens_cache.errors import CacheError
from distilllens_cache.layout import INDEX
from distilllens_cache.targets import PlannedExample

MAX_ID_BYTES = 1024
"""Longest id of an example, in bytes of UTF-8."""

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("digest", pa.binary(32), nullable=False),
        pa.field("num_tokens", pa.uint32(), nullable=False),
        pa.field("num_targets", pa.uint32(), nullable=False),
    ]
)


class Index:
    """The examples of a plan, by place."""

    def __init__(self, data: bytes, *, num_examples: int) -> None:
        most = 2 * num_examples * (MAX_ID_BYTES + 4 + 32 + 4 + 4) + 1024
        batch = from_arrow(data, SCHEMA, num_rows=num_examples, name=INDEX, max_bytes=most)
        self.ids: list[str] = batch.column("id").to_pylist()
        self.num_tokens: NDArray[np.int64] = batch.column("num_tokens").to_numpy().astype(np.int64)
        """(N,) tokens of each example."""
        self.num_targets: NDArray[np.int64] = batch.column("num_targets").to_numpy().astype(np.int64)
        """(N,) target positions of each example."""
        self._digests = batch.column("digest")
        self.num_tokens.flags.writeable = self.num_targets.flags.writeable = False
        if (self.num_targets >= np.maximum(self.num_tokens, 1)).any():
            raise CacheError(f"{INDEX} has an example with as many targets as tokens.")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> PlannedExample:
        return PlannedExample(
            self.ids[number],
            self._digests[number].as_py().hex(),
            int(self.num_tokens[number]),
            int(self.num_targets[number]),
        )


def index_bytes(examples: Sequence[PlannedExample]) -> memoryview:
    """The index file of ``examples``."""
    for example in examples:
        if len(example.id) > MAX_ID_BYTES // 4 and len(example.id.encode()) > MAX_ID_BYTES:
            raise CacheError(f"the id {example.id[:40]!r}… is longer than {MAX_ID_BYTES} bytes; use a shorter one.")
    try:
        digests = pa.array([bytes.fromhex(example.digest) for example in examples], pa.binary(32))
        columns = [
            pa.array([example.id for example in examples], pa.string()),
            digests,
            pa.array([example.num_tokens for example in examples], pa.uint32()),
            pa.array([example.num_targets for example in examples], pa.uint32()),
        ]
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        raise CacheError(f"an example of the plan cannot be written: {error}") from None
    return to_arrow(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))

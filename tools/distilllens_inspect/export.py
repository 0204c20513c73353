"""A cache as one Parquet file, for readers that know neither shards nor codecs."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distilllens_cache import CachedExample, CacheReader, LayerTargets, TailSamples


def export_parquet(reader: CacheReader, output: Path) -> int:
    """Write every example of a cache, decoded; the file's size in bytes.

    One row per example: ``index``, ``id``, ``token_ids``, ``target_positions``, and for each layer n
    ``layer_n_ids`` and ``layer_n_log_probs`` (a list of kept tokens for each target, likeliest first, in nats)
    and ``layer_n_log_rest``. Where the cache stores them: ``layer_n_codes`` (for each target, of the sketch in
    ``sketches/layer_n.arrow`` of the cache), and the draws from the tail, ``layer_n_sample_ids``,
    ``layer_n_sample_draws`` (how often) and ``layer_n_sample_log_probs``, a list for each target.

    A row group is a shard. The metadata of the file has the cache's identity (JSON) and digest. The file appears
    whole or not at all.
    """
    if output.is_dir():
        raise ValueError(f"{output} is a folder; give the name of a Parquet file")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"{output.absolute().parent} is not a folder: make it first, or choose another --output")
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    identity = reader.manifest.identity
    metadata = {"distilllens.identity": identity.model_dump_json(), "distilllens.cache_digest": reader.digest}
    writer: pq.ParquetWriter | None = None
    try:
        for number in range(len(reader.manifest.shards)):
            table = _table(reader.read_shard(number), identity.layers).replace_schema_metadata(metadata)
            writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is not None:
            writer.close()
            os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return output.stat().st_size


def _table(examples: list[CachedExample], layers: tuple[int, ...]) -> pa.Table:
    columns: dict[str, pa.Array] = {
        "index": pa.array([example.index for example in examples], pa.int64()),
        "id": pa.array([example.id for example in examples], pa.string()),
        "token_ids": _lists([example.token_ids for example in examples]),
        "target_positions": _lists([example.target_positions for example in examples]),
    }
    for layer in layers:
        targets = [example.targets[layer] for example in examples]
        rows = _offsets([len(one.counts) for one in targets])
        name = f"layer_{layer}"
        for part in ("ids", "log_probs"):
            columns[f"{name}_{part}"] = _lists_of_lists(rows, targets, part)
        columns[f"{name}_log_rest"] = _lists([one.log_rest for one in targets])
        if codes := [one.codes for one in targets if one.codes is not None]:
            values = pa.array(np.concatenate(codes).ravel())
            each = _offsets([part.shape[1] for part in codes for _ in part])
            columns[f"{name}_codes"] = pa.ListArray.from_arrays(rows, pa.ListArray.from_arrays(each, values))
        if samples := [one.samples for one in targets if one.samples is not None]:
            for part in ("ids", "draws", "log_probs"):
                columns[f"{name}_sample_{part}"] = _lists_of_lists(rows, samples, part)
    return pa.table(columns)


def _lists_of_lists(rows: pa.Array, parts: Sequence[LayerTargets] | Sequence[TailSamples], name: str) -> pa.Array:
    """A list for each target of each example, from ragged rows that are stored flat."""
    each = _offsets(np.concatenate([one.counts for one in parts]).tolist())
    values = pa.array(np.concatenate([getattr(one, name) for one in parts]))
    return pa.ListArray.from_arrays(rows, pa.ListArray.from_arrays(each, values))


def _lists(parts: list[NDArray]) -> pa.Array:
    return pa.ListArray.from_arrays(_offsets([len(part) for part in parts]), pa.array(np.concatenate(parts)))


def _offsets(lengths: list[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())

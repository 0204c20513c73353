"""Bytes, error and speed of ways to store sparse targets, on the targets of a finished cache.

    distilllens cache-teacher … --top-k 128 --min-k 128 --codec arrow-fp32 --store-tail none --output-dir lossless
    python scripts/bench/storage.py lossless                # minutes on one core
    python scripts/bench/storage.py lossless --studies      # also other level scales, tables of ids and ways of zstd

From the lossless cache three sets of rows are cut: k = 64, k = 32, and as many ids as have p >= 0.001, at most 128.
Each is stored by each way, shard by shard and layer by layer, and read again. At the end come the means over the middle
layers, all but the last, and what an example takes with its name, tokens and target positions.

- ``B``: bytes per target: all compressed buffers of the file, without its metadata.
- ``KL``: mean over targets of KL(original || stored) over the k + 1 cells, in nats.
- ``encode``, ``decode``: million targets per second of CPU time, best of several rounds, from rows to the bytes of a
  file and back, without disk and digest.
- ``floor``: bytes of an order-0 coder for what `packed` stores. Sets of ids: each id is in a row or not, with the
  frequency of its bucket (64 buckets of ids by frequency, counted in the same rows), so the sum over ids of the
  entropy of that choice. To it come the entropies of the levels relative to their row's deepest one, of the deepest
  ones, and of the rests' levels.

The others' ways, written anew in numpy, so that their speed is ours:

- ``uint32 + fp32``: a plain column of each, zstd-3 (our codec arrow-fp32), read with the checks of every codec of ours.
- ``int32 + fp32, unchecked``: the same columns, only decompressed. Nothing is checked, not even the ids.
- ``uint32 + fp16``: a plain column of each, zstd (our codec arrow-fp16).
- ``17 bits + fp16``: ids bit by bit, as Megatron-LM is said to have them, zstd. Nothing is checked.
- ``DistillKit``: arcee-ai/DistillKit's compressor with the recommended and the budget setting of its README: the first
  values in bfloat16, the others as a polynomial of their place, ids bit by bit. With 16-bit ids 312 and 114 bytes, as
  they are and after zstd. Its fit is in float32, by torch's SVD of raw powers up to 111^4, and so is ours; the same in
  float64 shows what the format could do. It has no rest: what the kept ids leave of 1 stands for it, at least 1e-6,
  and the k + 1 cells are normalised. The last layer only.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
import zstandard
from numpy.typing import NDArray

from distilllens_cache import CacheError, CacheReader
from distilllens_cache.arrow_file import declared_buffers, from_arrow, to_arrow
from distilllens_cache.codec import find_codec, shard_schema
from distilllens_cache.common_ids import common_ids, ids_by_rank
from distilllens_cache.companding import KNEE, SCALE
from distilllens_cache.gaps import num_planes, to_gaps, to_planes
from distilllens_cache.layer_codec import LayerPlace, LayerShape
from distilllens_cache.lists import bounds_of
from distilllens_cache.meaning import FlatLayer
from distilllens_cache.ragged import Rows

MIN_PROB, MAX_K = 1e-3, 128
ZSTD_SHARDS = 2
"""Shards that ways of zstd are tried on: the highest level takes a second for a megabyte."""


# the data


@dataclass(frozen=True, eq=False)
class Part:
    """One layer of one shard, cut to a width."""

    flat: FlatLayer
    shape: LayerShape
    place: LayerPlace

    @property
    def num_targets(self) -> int:
        return len(self.flat.counts)


def parts_of(reader: CacheReader, layer: int) -> list[Part]:
    """Every shard's rows of a layer; each row keeps `MAX_K` ids, or `CacheError`."""
    identity = reader.manifest.identity
    parts = []
    for number in range(len(reader.manifest.shards)):
        whole = [example.targets[layer] for example in reader.read_shard(number)]
        flat = FlatLayer(
            np.concatenate([targets.counts for targets in whole]).astype(np.int64),
            np.concatenate([targets.ids for targets in whole]),
            np.concatenate([targets.log_probs for targets in whole]),
            np.concatenate([targets.log_rest for targets in whole]),
        )
        if (flat.counts < MAX_K).any():
            raise CacheError(
                f"Layer {layer} of {reader.folder} has rows of {flat.counts.min()} ids; the widths are cut from "
                f"rows that all keep {MAX_K}. Write the cache with --top-k {MAX_K} --min-k {MAX_K}."
            )
        place = LayerPlace(bounds_of([len(targets.counts) for targets in whole]), f"layer {layer}", str)
        parts.append(Part(flat, LayerShape(layer, identity.top_k[layer], identity.vocab_size), place))
    return parts


def narrowed(part: Part, width: int | str) -> Part:
    """Its rows cut to k ids or, if ``width`` is ``adaptive``, to those that matter."""
    top_k = width if isinstance(width, int) else MAX_K
    return Part(cut(part.flat, width), part.shape._replace(top_k=top_k), part.place)


def example_bytes(reader: CacheReader) -> int:
    """Bytes of what a shard holds besides layers: ``index``, ``id``, ``token_ids`` and ``target_positions``."""
    codec, identity = find_codec("packed"), reader.manifest.identity
    schema = pa.schema(list(shard_schema(codec, identity.layers, identity.top_k, identity.vocab_size))[:4])
    total = 0
    for number in range(len(reader.manifest.shards)):
        examples = reader.read_shard(number)
        columns = [
            [example.index for example in examples],
            [example.id for example in examples],
            [example.token_ids for example in examples],
            [example.target_positions for example in examples],
        ]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
        data = to_arrow(pa.RecordBatch.from_arrays(arrays, schema=schema), level=codec.compression_level)
        total += sum(buffer.stored for buffer in declared_buffers(data, name="x"))
    return total


def cut(flat: FlatLayer, width: int | str) -> FlatLayer:
    """Rows with fewer ids; the others' probability goes to the rest."""
    rows = Rows(flat.counts)
    wanted = width if isinstance(width, int) else rows.sums((flat.log_probs >= math.log(MIN_PROB)).astype(np.float64))
    counts = np.minimum(flat.counts, np.clip(wanted, 1, MAX_K)).astype(np.int64)
    is_kept = np.arange(rows.num_cells) - rows.spread(rows.starts) < rows.spread(counts)
    probs = np.exp(flat.log_probs, dtype=np.float64)
    rest = np.exp(flat.log_rest, dtype=np.float64) + rows.sums(np.where(is_kept, 0, probs))
    log_rest = np.clip(np.log(np.maximum(rest, 1e-44)), -100, 0).astype(np.float32)
    return FlatLayer(counts, flat.ids[is_kept], flat.log_probs[is_kept], log_rest)


# the ways


class Way(Protocol):
    """One way to store rows."""

    def encode(self, part: Part) -> tuple[Any, int]:
        """What is stored, and its bytes."""
        ...

    def decode(self, stored: Any, part: Part) -> FlatLayer: ...


class OfOurs:
    """A codec of `distilllens_cache`, as a file."""

    def __init__(self, name: str) -> None:
        self.codec = find_codec(name)

    def encode(self, part: Part) -> tuple[Any, int]:
        schema = pa.schema(self.codec.fields(part.shape))
        columns = self.codec.encode(part.flat, part.shape, part.place)
        data = to_arrow(pa.RecordBatch.from_arrays(columns, schema=schema), level=self.codec.compression_level)
        return bytes(data), sum(buffer.stored for buffer in declared_buffers(data, name="x"))

    def decode(self, stored: Any, part: Part) -> FlatLayer:
        schema = pa.schema(self.codec.fields(part.shape))
        batch = from_arrow(stored, schema, num_rows=len(part.place.row_bounds) - 1, name="x")
        return self.codec.decode(batch.columns, part.shape, part.place)


class Unchecked:
    """int32 and fp32 as they are, zstd-compressed."""

    def encode(self, part: Part) -> tuple[Any, int]:
        flat = part.flat
        parts = [flat.counts.astype(np.uint16), flat.ids.astype(np.int32), flat.log_probs, flat.log_rest]
        stored = [(zstd(values), values.nbytes) for values in parts]
        return stored, sum(len(data) for data, _ in stored)

    def decode(self, stored: Any, part: Part) -> FlatLayer:
        counts, ids, log_probs, log_rest = (unzstd(*one) for one in stored)
        counts = counts.view(np.uint16).astype(np.int64)
        return FlatLayer(counts, ids.view(np.uint32), log_probs.view(np.float32), log_rest.view(np.float32))


class BitsAndHalves:
    """17-bit ids and fp16, each zstd-compressed."""

    def encode(self, part: Part) -> tuple[Any, int]:
        flat = part.flat
        halves = np.maximum(np.concatenate([flat.log_probs, flat.log_rest]), -65504).astype(np.float16)
        parts = [flat.counts.astype(np.uint8), pack_bits(flat.ids, 17), halves]
        stored = [(zstd(values), values.nbytes) for values in parts]
        return stored, sum(len(data) for data, _ in stored)

    def decode(self, stored: Any, part: Part) -> FlatLayer:
        counts, bits, halves = (unzstd(*one) for one in stored)
        counts = counts.astype(np.int64)
        num_cells = int(counts.sum())
        values = halves.view(np.float16).astype(np.float32)
        return FlatLayer(counts, unpack_bits(bits, 17, num_cells), values[:num_cells], values[num_cells:])


class DistillKit:
    """First values in bfloat16, a polynomial for the others, ids bit by bit: k of them in every row."""

    def __init__(
        self, k: int, exact: int, powers: Sequence[float], *, compressed: bool = False, dtype: type = np.float32
    ) -> None:
        """``dtype``: of the fit."""
        self.k, self.exact, self.compressed, self.dtype = k, exact, compressed, dtype
        place = np.arange(k - exact, dtype=dtype)
        self.terms = np.stack([place**power for power in powers], axis=1, dtype=dtype)
        # torch's, since each library's SVD has other digits left of a condition of 1e9 in float32.
        left, values, right = torch.linalg.svd(torch.from_numpy(self.terms), full_matrices=False)
        self.left, self.right = left.numpy(), right.numpy()
        self.inverse = np.where(values.numpy() > 1e-5, 1 / values.numpy(), 0).astype(dtype)

    def encode(self, part: Part) -> tuple[Any, int]:
        values = part.flat.log_probs.reshape(-1, self.k)
        bits = np.ascontiguousarray(values[:, : self.exact]).view(np.uint32)
        exact = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        fitted = (values[:, self.exact :].astype(self.dtype) @ self.left * self.inverse) @ self.right
        ids = pack_bits(part.flat.ids.reshape(-1, self.k), (part.shape.vocab_size - 1).bit_length())
        stored = np.concatenate([exact.view(np.uint8), fitted.astype(np.float32).view(np.uint8), ids], axis=1)
        if not self.compressed:
            return stored, stored.nbytes
        data = zstd(stored)
        return (data, stored.shape), len(data)

    def decode(self, stored: Any, part: Part) -> FlatLayer:
        if self.compressed:
            stored = unzstd(stored[0], math.prod(stored[1])).reshape(stored[1])
        at = 2 * self.exact
        to = at + 4 * self.terms.shape[1]
        exact = np.ascontiguousarray(stored[:, :at]).view(np.uint16).astype(np.uint32) << np.uint32(16)
        fitted = np.ascontiguousarray(stored[:, at:to]).view(np.float32) @ self.terms.T.astype(np.float32)
        log_probs = np.concatenate([exact.view(np.float32), fitted], axis=1)
        id_bits = (part.shape.vocab_size - 1).bit_length()
        ids = unpack_bits(np.ascontiguousarray(stored[:, to:]), id_bits, self.k)
        rest = np.maximum(1 - np.exp(log_probs, dtype=np.float64).sum(1), 1e-6)
        counts = np.full(len(stored), self.k)
        return FlatLayer(counts, ids.ravel(), log_probs.ravel(), np.log(rest).astype(np.float32))


def zstd(values: NDArray, level: int = 3) -> bytes:
    return pa.Codec("zstd", compression_level=level).compress(np.ascontiguousarray(values).data.cast("B"), asbytes=True)


def unzstd(data: bytes, size: int) -> NDArray[np.uint8]:
    return np.frombuffer(pa.Codec("zstd").decompress(data, size, asbytes=True), np.uint8)


def pack_bits(numbers: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """The numbers of the last axis, highest bit first, without gaps between them."""
    shifts = np.arange(bits - 1, -1, -1, dtype=np.uint32)
    each = ((numbers[..., None] >> shifts) & np.uint32(1)).astype(np.uint8)
    return np.packbits(each.reshape(*numbers.shape[:-1], -1), axis=-1)


def unpack_bits(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint32]:
    """The first ``count`` numbers of the last axis, of up to 25 bits."""
    at = np.arange(count) * bits
    padded = np.concatenate([packed, np.zeros((*packed.shape[:-1], 4), np.uint8)], axis=-1)
    words = np.zeros((*packed.shape[:-1], count), np.uint32)
    for byte in range(4):
        words = (words << np.uint32(8)) | padded[..., (at >> 3) + byte]
    return (words >> (32 - bits - (at & 7)).astype(np.uint32)) & np.uint32((1 << bits) - 1)


WIDTHS = ("adaptive", 64, 32)
WAYS: dict[str, Way] = {
    "packed": OfOurs("packed"),
    "uint32 + fp32 + zstd-3": OfOurs("arrow-fp32"),
    "int32 + fp32 + zstd-3, unchecked": Unchecked(),
    "uint32 + fp16 + zstd": OfOurs("arrow-fp16"),
    "17 bits + fp16 + zstd": BitsAndHalves(),
}


# the measures


def divergence(stored: FlatLayer, original: FlatLayer) -> float:
    """Sum over targets of KL(original || stored) over k + 1 cells, in nats; both are normalised first."""
    rows = Rows(original.counts)
    p, q = original.log_probs.astype(np.float64), stored.log_probs.astype(np.float64)
    if not np.array_equal(stored.ids, original.ids):
        row = rows.spread(np.arange(len(rows.counts)))
        p, q = (values[np.lexsort((flat.ids, row))] for flat, values in ((original, p), (stored, q)))
    p_rest, q_rest = original.log_rest.astype(np.float64), stored.log_rest.astype(np.float64)
    for values, rest in ((p, p_rest), (q, q_rest)):
        log_mass = np.log(rows.sums(np.exp(values)) + np.exp(rest))
        values -= rows.spread(log_mass)
        rest -= log_mass
    return float((np.exp(p) * (p - q)).sum() + (np.exp(p_rest) * (p_rest - q_rest)).sum())


def entropy_bytes(values: NDArray) -> float:
    """Bytes of an order-0 coder for these numbers."""
    counts = np.bincount(values.ravel().astype(np.int64))
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum()) / 8


def set_bytes(parts: Sequence[Part], num_buckets: int = 64) -> float:
    """Bytes of a coder that knows how often ids like this one are in a row."""
    vocab_size, num_rows = parts[0].shape.vocab_size, sum(part.num_targets for part in parts)
    times = np.sort(sum(np.bincount(part.flat.ids, minlength=vocab_size) for part in parts))[::-1]
    edges = np.unique(np.round(np.geomspace(1, vocab_size, num_buckets)).astype(np.int64) - 1)
    sizes = np.diff([*edges, vocab_size])
    share = np.clip(np.add.reduceat(times, edges) / (sizes * num_rows), 1e-12, 1 - 1e-12)
    bits = -(share * np.log2(share) + (1 - share) * np.log2(1 - share))
    return float((bits * sizes).sum()) * num_rows / 8


def floor_bytes(parts: Sequence[Part], scale: float = SCALE) -> float:
    """Bytes per target of the floor."""
    above, deepest, rest = [], [], []
    for part in parts:
        rows, levels = Rows(part.flat.counts), plain_levels(part.flat.log_probs, scale)
        deepest.append(rows.maxima(levels))
        above.append(rows.spread(deepest[-1]) - levels)
        rest.append(plain_levels(part.flat.log_rest, scale))
    total = set_bytes(parts) + sum(entropy_bytes(np.concatenate(values)) for values in (above, deepest, rest))
    return total / sum(part.num_targets for part in parts)


def plain_levels(log_probs: NDArray[np.float32], scale: float) -> NDArray[np.uint8]:
    return np.minimum(np.rint(scale * np.log1p(-log_probs.astype(np.float64) / KNEE)), 255).astype(np.uint8)


def measured(ways: Mapping[str, Way], parts: Sequence[Part], rounds: int) -> dict[str, dict[str, float]]:
    """By way: bytes per target, error in nats, and million targets per second.

    The ways take turns in every round, so that a busy machine slows them alike.
    """
    targets = sum(part.num_targets for part in parts)
    num_bytes, error = (dict.fromkeys(ways, 0.0) for _ in range(2))
    seconds = {name: [0.0, 0.0] for name in ways}
    for part in parts:
        stored = {name: way.encode(part) for name, way in ways.items()}
        for name, way in ways.items():
            num_bytes[name] += stored[name][1]
            error[name] += divergence(way.decode(stored[name][0], part), part.flat)
        times = {name: [math.inf, math.inf] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                both = timed(lambda: way.encode(part)), timed(lambda: way.decode(stored[name][0], part))  # noqa: B023
                times[name] = [min(pair) for pair in zip(times[name], both, strict=True)]
        for name in ways:
            seconds[name] = [sum(pair) for pair in zip(seconds[name], times[name], strict=True)]
    return {
        name: {
            "bytes": num_bytes[name] / targets,
            "kl": error[name] / targets,
            "encode": targets / seconds[name][0] / 1e6,
            "decode": targets / seconds[name][1] / 1e6,
        }
        for name in ways
    }


def timed(work: Callable[[], object]) -> float:
    """CPU seconds."""
    started = time.process_time()
    work()
    return time.process_time() - started


# studies


def study_scales(parts: Sequence[Part]) -> dict[str, dict[str, float]]:
    """The floor and the error with coarser levels."""
    found = {}
    for scale in (32.0, 40.0, 48.0, 56.0, 64.0):
        error = 0.0
        for part in parts:
            flat = part.flat
            values = (flat.log_probs, flat.log_rest)
            rounded = [(-KNEE * np.expm1(plain_levels(one, scale) / scale)).astype(np.float32) for one in values]
            error += divergence(FlatLayer(flat.counts, flat.ids, *rounded), flat)
        targets = sum(part.num_targets for part in parts)
        found[f"{scale:g} levels"] = {"floor": floor_bytes(parts, scale), "kl": error / targets}
    return found


def study_tables(
    parts: Sequence[Part], token_ids: NDArray[np.uint32], first: int = 4096
) -> dict[str, dict[str, float]]:
    """Bytes per target of ids alone with other tables of common ids, without and with the table itself."""
    vocab_size = parts[0].shape.vocab_size
    head, ids = parts[0].flat, np.concatenate([part.flat.ids for part in parts])
    tables: dict[str, NDArray[np.uint32] | None] = {
        "none": np.zeros(0, np.uint32),
        "token frequencies of the dataset": by_frequency(token_ids, vocab_size),
        f"the first {first} targets": by_frequency(head.ids[: int(head.counts[:first].sum())], vocab_size),
        "all targets": by_frequency(ids, vocab_size),
        "each shard's own (packed)": None,
    }
    targets = sum(part.num_targets for part in parts)
    found = {}
    for name, table in tables.items():
        of_ids = of_table = 0
        for part in parts:
            own = common_ids(part.flat.ids, vocab_size) if table is None else table
            ranks = np.empty(vocab_size, np.uint32)
            ranks[ids_by_rank(own, vocab_size)] = np.arange(vocab_size)
            rows, numbers = Rows(part.flat.counts), ranks.take(part.flat.ids)
            rows.sort(numbers)
            of_ids += sum(len(zstd(plane, 1)) for plane in to_planes(to_gaps(numbers, rows), num_planes(vocab_size)))
            of_table += len(zstd(own, 1)) if table is None else 0
        of_table += 0 if table is None or name.startswith(("token", "none")) else len(zstd(table, 1))
        found[name] = {"ids": of_ids / targets, "with table": (of_ids + of_table) / targets}
    return found


def study_zstd(parts: Sequence[Part]) -> dict[str, dict[str, float]]:
    """Bytes of `packed` by other ways of zstd, as a share of those of level 1, and million targets per second.

    The dictionary is trained on the first half of every column, and both are weighed on the second.
    """
    parts = parts[:ZSTD_SHARDS]
    targets = sum(part.num_targets for part in parts)
    codec = find_codec("packed")
    columns = [
        np.ascontiguousarray(column.values.to_numpy()).tobytes()
        for part in parts
        for column in codec.encode(part.flat, part.shape, part.place)
    ]
    halves = [column[len(column) // 2 :] for column in columns]
    pages: list[Any] = [column[at : at + 4096] for column in columns for at in range(0, len(column) // 2, 4096)]
    long = zstandard.ZstdCompressionParameters.from_level(1, window_log=27, enable_ldm=True)
    one, undo = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor(max_window_size=1 << 27)
    size = sum(len(one.compress(column)) for column in columns)
    found: dict[str, dict[str, float]] = {}
    for name, compressor in {
        **{f"zstd level {level}": zstandard.ZstdCompressor(level=level) for level in (1, 3, 9, 19)},
        "zstd level 1, long window": zstandard.ZstdCompressor(compression_params=long),
    }.items():
        stored = [compressor.compress(column) for column in columns]
        seconds = timed(lambda: [compressor.compress(column) for column in columns])  # noqa: B023
        undone = min(timed(lambda: [undo.decompress(data) for data in stored]) for _ in range(3))  # noqa: B023
        found[name] = {
            "bytes": sum(map(len, stored)) / size,
            "encode": targets / seconds / 1e6,
            "decode": targets / undone / 1e6,
        }
    try:
        trained = zstandard.train_dictionary(1 << 15, pages)
    except zstandard.ZstdError:  # too little to learn from
        return found
    compressor = zstandard.ZstdCompressor(level=1, dict_data=trained)
    size_of_halves = sum(len(compressor.compress(half)) for half in halves)
    found["zstd level 1, trained dictionary"] = {
        "bytes": size_of_halves / sum(len(one.compress(half)) for half in halves)
    }
    return found


def by_frequency(ids: NDArray[np.uint32], vocab_size: int) -> NDArray[np.uint32]:
    """Every id, most frequent first."""
    return np.argsort(-np.bincount(ids, minlength=vocab_size), kind="stable").astype(np.uint32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="a finished cache with the codec arrow-fp32")
    parser.add_argument("--layers", help="e.g. 10,30; by default all")
    parser.add_argument("--rounds", type=int, default=5, help="of each timing")
    parser.add_argument("--studies", action="store_true", help="also level scales, tables of ids and ways of zstd")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    reader = CacheReader(arguments.cache)
    identity = reader.manifest.identity
    if identity.codec != "arrow-fp32":
        parser.error(f"{arguments.cache} has the codec {identity.codec}; the truth to compare with is arrow-fp32")
    layers = [int(part) for part in arguments.layers.split(",")] if arguments.layers else list(identity.layers)
    token_ids = np.concatenate([example.token_ids for example in reader])
    size = f"{len(reader)} examples, {reader.manifest.num_targets} targets, V = {identity.vocab_size}"
    print(f"{size}, {identity.teacher}\n")
    figures: list[dict[str, Any]] = []
    try:
        for layer in layers:
            figures += figures_of_layer(parts_of(reader, layer), token_ids, arguments.rounds, studies=arguments.studies)
        figures += figures_of_distillkit(parts_of(reader, layers[-1]), arguments.rounds)
    except CacheError as error:
        parser.error(str(error))
    figures += summary(figures, layers, reader)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def figures_of_layer(
    whole: Sequence[Part], token_ids: NDArray[np.uint32], rounds: int, *, studies: bool
) -> list[dict[str, Any]]:
    """A layer at every width, by every way."""
    figures: list[dict[str, Any]] = []
    layer = whole[0].shape.layer
    for width in WIDTHS:
        parts = [narrowed(part, width) for part in whole]
        mean_k = sum(len(part.flat.ids) for part in parts) / sum(part.num_targets for part in parts)
        floor = floor_bytes(parts)
        print(f"layer {layer}, {title(width)}: {mean_k:.1f} ids, floor {floor:.2f} B")
        for name, found in measured(WAYS, parts, rounds).items():
            figures.append({"layer": layer, "width": width, "ids": mean_k, "floor": floor, "way": name} | found)
            print_line(name, found, floor)
        if studies and width in WIDTHS[:2]:
            found = study_scales(parts) | study_tables(parts, token_ids) | study_zstd(parts)
            figures.append({"layer": layer, "width": width, "way": "studies", "studies": found})
            for name, values in found.items():
                line = "  ".join(f"{what} {value:.4g}" for what, value in values.items())
                print(f"    {name:<36}{line}", flush=True)
    return figures


def figures_of_distillkit(whole: Sequence[Part], rounds: int) -> list[dict[str, Any]]:
    """The last layer by DistillKit's two settings, and by ours at their width."""
    figures: list[dict[str, Any]] = []
    layer = whole[0].shape.layer
    for name, k, exact, powers in (
        ("recommended", 128, 16, (0, 1, 2, 3, 4, 0.5)),
        ("budget", 50, 1, (0, 1, 0.5)),
    ):
        parts = [narrowed(part, k) for part in whole]
        floor = floor_bytes(parts)
        print(f"layer {layer}, k = {k}: floor {floor:.2f} B")
        ways: dict[str, Way] = {
            f"DistillKit {name}": DistillKit(k, exact, powers),
            f"DistillKit {name} + zstd": DistillKit(k, exact, powers, compressed=True),
            f"DistillKit {name}, float64": DistillKit(k, exact, powers, dtype=np.float64),
            "packed": OfOurs("packed"),
        }
        for way_name, found in measured(ways, parts, rounds).items():
            figures.append({"layer": layer, "width": k, "ids": k, "floor": floor, "way": way_name} | found)
            print_line(way_name, found, floor)
    return figures


def summary(figures: Sequence[dict[str, Any]], layers: Sequence[int], reader: CacheReader) -> list[dict[str, Any]]:
    """The middle layers together, and whole examples."""
    added: list[dict[str, Any]] = []
    besides = example_bytes(reader) / len(reader)
    for width in WIDTHS:
        by_way = {
            name: [one for one in figures if (one["width"], one["way"]) == (width, name) and one["layer"] in layers]
            for name in WAYS
        }
        middle = {name: [one for one in of_way if one["layer"] != layers[-1]] for name, of_way in by_way.items()}
        if len(layers) > 1:
            print(f"mean of the {len(layers) - 1} middle layers, {title(width)}")
            for name, of_way in middle.items():
                mean = {what: float(np.mean([one[what] for one in of_way])) for what in ("ids", "floor", "bytes", "kl")}
                # Speeds as if the layers were read one after another.
                mean |= {what: len(of_way) / sum(1 / one[what] for one in of_way) for what in ("encode", "decode")}
                added.append({"layer": "middle", "width": width, "way": name} | mean)
                print_line(name, mean, mean["floor"])
        print(
            f"an example, {title(width)}: {besides:.0f} B of name, tokens and positions, and with {len(layers)} layers"
        )
        for name, of_way in by_way.items():
            total = besides + sum(one["bytes"] for one in of_way) * reader.manifest.num_targets / len(reader)
            added.append({"layer": "all", "width": width, "way": name, "bytes of an example": total})
            print(f"    {name:<34}{total:>8.0f} B together")
    return added


def title(width: int | str) -> str:
    return f"k = {width}" if isinstance(width, int) else width


def print_line(name: str, found: dict[str, float], floor: float) -> None:
    print(
        f"    {name:<34}{found['bytes']:>8.2f} B {found['bytes'] / floor:>6.2f} of the floor   KL {found['kl']:.1e}   "
        f"encode {found['encode']:>5.2f}   decode {found['decode']:>5.2f} M/s",
        flush=True,
    )


if __name__ == "__main__":
    main()

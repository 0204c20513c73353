"""A cache larger than memory streams through it: an epoch of 2 GB under an address space of 1 GB."""

import os
import resource
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from distilllens_cache import CachedExample, CacheWriter, Identity, LayerTargets, PlannedExample, example_digest
from distilllens_cache.files import record_of
from distilllens_cache.index import index_bytes
from distilllens_cache.layout import INDEX, MANIFEST, shard_name
from distilllens_cache.manifest import Manifest, ShardRecord, from_bytes, to_bytes

TinyCache: Any = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_cache_v1.py"))["TinyCache"]

NUM_SHARDS, EXAMPLES, TOKENS, TARGETS, WIDTH = 128, 8, 460_000, 32, 1024
LIMIT = 1 << 30

CHILD = """
import sys
from itertools import islice
from distilllens_cache import CacheReader, CacheStream

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmPeak"))

reader, peaks, kept = CacheReader(sys.argv[1]), [], []
with CacheStream(reader, batch_size=8, epochs=1) as stream:
    for number, batch in enumerate(stream):
        if sys.argv[2] == "keep":
            kept += batch
        if number % 32 == 31:
            peaks.append(peak())
print(*peaks)
"""


def write_large_cache(folder: Path) -> int:
    """Long sequences with a few wide targets, one real shard under many numbers, uncompressed; the bytes of it all."""
    random = np.random.default_rng(0)
    logits = -np.sort(-random.normal(size=(TARGETS, WIDTH)), axis=1)
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True) / 0.9)
    targets = LayerTargets(
        counts=np.full(TARGETS, WIDTH, np.int32),
        ids=np.stack([random.permutation(1 << 16)[:WIDTH] for _ in range(TARGETS)]).astype(np.uint32).ravel(),
        log_probs=log_probs.astype(np.float32).ravel(),
        log_rest=np.full(TARGETS, np.log(0.1), np.float32),
    )
    tokens, positions = random.integers(0, 1 << 16, TOKENS).astype(np.uint32), np.arange(TARGETS, dtype=np.uint32)
    digest = example_digest(tokens, positions)
    plan = [PlannedExample(str(n), digest, TOKENS, TARGETS) for n in range(EXAMPLES * NUM_SHARDS)]
    tiny = TinyCache(top_k={2: WIDTH}, vocab_size=1 << 16, store_tail="none")
    identity = Identity(**tiny.identity.model_dump() | {"codec": "arrow-fp32"})
    writer = CacheWriter(
        folder, identity=identity, examples=plan[:EXAMPLES], tokenizer_files={}, shards=[range(EXAMPLES)]
    )
    writer.write_shard(0, [CachedExample(n, str(n), tokens, positions, {2: targets}) for n in range(EXAMPLES)])
    manifest = from_bytes(Manifest, writer.finish().read_bytes(), name=MANIFEST)
    batch = pa.ipc.open_file(str(folder / shard_name(0))).get_batch(0)
    records = [more_of(manifest.shards[0], batch, number, folder) for number in range(NUM_SHARDS)]
    index = bytes(index_bytes(plan))
    (folder / INDEX).write_bytes(index)
    larger = manifest.model_copy(update={"shards": tuple(records), "index": record_of(INDEX, index)})
    (folder / MANIFEST).write_bytes(to_bytes(larger))
    return larger.total_bytes


def more_of(first: ShardRecord, batch: pa.RecordBatch, number: int, folder: Path) -> ShardRecord:
    places = range(number * EXAMPLES, (number + 1) * EXAMPLES)
    changed = {"index": pa.array(places, pa.int64()), "id": pa.array(list(map(str, places)), pa.string())}
    columns = [changed.get(name, batch.column(name)) for name in batch.schema.names]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=batch.schema))
    record = record_of(shard_name(number), data := memoryview(sink.getvalue()))
    (folder / record.name).write_bytes(data)
    return first.model_copy(update=record.model_dump())


def under_limit(folder: Path, mode: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), mode],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT)),
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # its threads take address space on machines of many cores
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_stays_flat_over_an_epoch_of_a_cache_larger_than_the_limit(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 4 << 30:
        pytest.skip("the disk has no room for a cache of 2 GB")
    folder = tmp_path / "cache"
    try:
        assert write_large_cache(folder) > 1.9e9
        done = under_limit(folder, "stream")
        assert done.returncode == 0, done.stderr[-2000:]
        peaks = [int(text) for text in done.stdout.split()]
        assert len(peaks) == NUM_SHARDS // 32
        assert peaks[-1] < 1.1 * peaks[0]
        # The limit is one: who keeps the examples does not get through.
        assert "MemoryError" in under_limit(folder, "keep").stderr
    finally:
        shutil.rmtree(folder, ignore_errors=True)

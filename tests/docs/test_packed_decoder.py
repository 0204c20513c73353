"""The decoder in cache/README.md reads what the codec `packed` writes, and gives what ours gives."""

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from distilllens_cache import CacheReader
from distilllens_cache.arrow_file import to_arrow
from distilllens_cache.codec import find_codec
from distilllens_cache.layer_codec import LayerPlace, LayerShape
from distilllens_cache.meaning import FlatLayer

ROOT = Path(__file__).parents[2]
TinyCache: Any = runpy.run_path(str(ROOT / "tests/golden/make_cache_v1.py"))["TinyCache"]


@pytest.fixture(scope="module")
def read_packed() -> Any:
    text = (ROOT / "cache/README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n((?:(?!```).)*def read_packed.*?)```", text, re.DOTALL)
    assert code.count("\n") <= 45
    names: dict[str, Any] = {}
    exec(code, names)
    return names["read_packed"]


def assert_equal(found: tuple[np.ndarray, ...], wanted: tuple[np.ndarray, ...]) -> None:
    assert np.array_equal(found[0], wanted[0])
    assert np.array_equal(found[1], wanted[1])
    for mine, ours in zip(found[2:], wanted[2:], strict=True):
        np.testing.assert_allclose(mine, ours, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("folder", ["golden", "new"])
def test_it_reads_whole_caches(read_packed: Any, folder: str, tmp_path: Path) -> None:
    cache = ROOT / "tests/golden/packed_v1"
    if folder == "new":
        cache = TinyCache(codec="packed", num_examples=9, examples_per_shard=4, scale=1e4).write(tmp_path / "cache")
    reader = CacheReader(cache)
    identity = reader.manifest.identity
    for number, record in enumerate(reader.manifest.shards):
        for layer in identity.layers:
            targets = [example.targets[layer] for example in reader.read_shard(number)]
            parts = ("counts", "ids", "log_probs", "log_rest")
            wanted = tuple(np.concatenate([getattr(one, part) for one in targets]) for part in parts)
            assert_equal(read_packed(str(cache / record.name), layer, identity.vocab_size), wanted)


@pytest.mark.parametrize(("vocab_size", "top_k"), [(2, 2), (256, 1), (65_537, 64), (200_000, 300)])
def test_it_reads_every_width_of_vocabulary(read_packed: Any, vocab_size: int, top_k: int) -> None:
    rng = np.random.default_rng(vocab_size)
    counts = rng.integers(1, top_k + 1, 100)
    # Ids as ragged rows of a Zipf law, so that some are common.
    ids = [np.unique(np.minimum(rng.zipf(1.3, count), vocab_size) - 1)[:count] for count in counts]
    ids = [rng.permutation(row) for row in ids]
    counts = np.array([len(row) for row in ids])
    cells = [np.sort(rng.dirichlet(np.full(len(row), 0.3)))[::-1] * 0.9 for row in ids]
    flat = FlatLayer(
        counts,
        np.concatenate(ids).astype(np.uint32),
        np.log(np.maximum(np.concatenate(cells), 1e-40)).astype(np.float32),
        np.full(100, np.log(0.1), np.float32),
    )
    codec, shape = find_codec("packed"), LayerShape(7, top_k, vocab_size)
    place = LayerPlace(np.array([0, 30, 30, 100]), "shard, layer 7", str)
    columns = codec.encode(flat, shape, place)
    file = to_arrow(pa.RecordBatch.from_arrays(columns, schema=pa.schema(codec.fields(shape))))
    wanted = codec.decode(columns, shape, place)
    found = read_packed(pa.BufferReader(bytes(file)), 7, vocab_size)
    assert_equal(found, (wanted.counts, wanted.ids, wanted.log_probs, wanted.log_rest))

"""Laws of the codec `packed`: no id is lost, no row is anything but a distribution, whatever goes in."""

import contextlib
import runpy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilllens_cache import CacheError
from distilllens_cache.codec import find_codec
from distilllens_cache.companding import mass_error
from distilllens_cache.layer_codec import LayerPlace, LayerShape
from distilllens_cache.meaning import FlatLayer, check_layer
from distilllens_cache.shard import Expected, decode_shard, encode_shard

TinyCache: Any = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_cache_v1.py"))["TinyCache"]
PACKED = find_codec("packed")


class Layer(NamedTuple):
    flat: FlatLayer
    shape: LayerShape
    place: LayerPlace

    def through(self) -> "Layer":
        columns = PACKED.encode(self.flat, self.shape, self.place)
        return self._replace(flat=PACKED.decode(columns, self.shape, self.place))


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Ragged or even rows of up to the whole vocabulary, from flat to certain, cut into examples anywhere."""
    vocab_size = draw(st.sampled_from([1, 2, 3, 50, 256, 257, 65_536, 65_537, 200_000]))
    top_k = min(vocab_size, draw(st.sampled_from([1, 2, 7, 64, 300])))
    num_rows, num_examples = draw(st.integers(0, 40)), draw(st.integers(1, 5))
    scale = draw(st.sampled_from([0.0, 0.01, 1.0, 5.0, 30.0, 1e4]))
    is_even = draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    counts = np.full(num_rows, top_k) if is_even else rng.integers(1, top_k + 1, num_rows)
    ids, log_probs, log_rest = [], [], []
    for count in counts:
        logits = scale * rng.normal(0, 1, count + (count < vocab_size))
        cells = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        kept, rest = cells[:count], cells[count:]
        # Few different ids, so that some are common.
        ids.append(rng.permutation(min(vocab_size, 2 * top_k))[:count] * (vocab_size // min(vocab_size, 2 * top_k)))
        log_probs.append(np.sort(np.minimum(kept, 0))[::-1])
        log_rest.append(np.clip(rest[0] if len(rest) else -100.0, -100, 0))
    flat = FlatLayer(
        counts.astype(np.int64),
        np.concatenate([np.zeros(0), *ids]).astype(np.uint32),
        np.concatenate([np.zeros(0), *log_probs]).astype(np.float32),
        np.array(log_rest, np.float32),
    )
    bounds = np.concatenate([[0], np.sort(rng.integers(0, num_rows + 1, num_examples - 1)), [num_rows]])
    place = LayerPlace(bounds, "shard, layer 1", lambda row: f"row {row}")
    return Layer(flat, LayerShape(1, top_k, vocab_size), place)


def rows_of(flat: FlatLayer) -> list[dict[int, float]]:
    """Each row's log-probabilities by id, in its order."""
    ends = np.cumsum(flat.counts)
    spans = list(zip(ends - flat.counts, ends, strict=True))
    return [dict(zip(flat.ids[a:b].tolist(), flat.log_probs[a:b].tolist(), strict=True)) for a, b in spans]


def assert_sound(layer: Layer) -> None:
    """All that a reader is promised, by the checks of the plain codecs; and ties by number."""
    shape = layer.shape
    check_layer(
        layer.flat, top_k=shape.top_k, vocab_size=shape.vocab_size, mass_tolerance=1e-5, where=lambda row: f"row {row}"
    )
    for row in rows_of(layer.flat):
        assert list(row) == sorted(row, key=lambda id: (-row[id], id))


@given(layers())
@settings(deadline=None, max_examples=200)
def test_every_row_keeps_its_ids_and_each_value_moves_by_its_rounding(layer: Layer) -> None:
    found = layer.through()
    assert_sound(found)
    assert np.array_equal(found.flat.counts, layer.flat.counts)
    shift = mass_error(layer.shape.top_k + 1) * 1.05
    for before, after in zip(rows_of(layer.flat), rows_of(found.flat), strict=True):
        assert before.keys() == after.keys()
        old = np.maximum(np.array(list(before.values())), -105)
        new = np.array([after[id] for id in before])
        assert (np.abs(new - old) <= (2 - old) / 128 * 1.01 + shift).all()
        assert (np.diff(new) <= 0).all()  # what was likelier is not less likely now
    rest = np.abs(found.flat.log_rest - layer.flat.log_rest)
    assert (rest <= (2 - layer.flat.log_rest) / 128 * 1.01 + shift).all()


@given(layers())
@settings(deadline=None, max_examples=60)
def test_packing_again_loses_no_id_and_moves_values_by_one_more_rounding(layer: Layer) -> None:
    once = layer.through()
    twice = once.through()
    assert_sound(twice)
    shift = mass_error(layer.shape.top_k + 1) * 1.05
    for before, after in zip(rows_of(once.flat), rows_of(twice.flat), strict=True):
        assert before.keys() == after.keys()
        assert all(abs(after[id] - before[id]) <= (2 - before[id]) / 128 * 1.01 + shift for id in before)


@given(layers(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_the_order_of_equally_likely_ids_leaves_no_trace(layer: Layer, seed: int) -> None:
    flat = layer.flat
    row = np.repeat(np.arange(len(flat.counts)), flat.counts)
    order = np.lexsort((np.random.default_rng(seed).random(len(row)), -flat.log_probs, row))
    other = FlatLayer(flat.counts, flat.ids[order], flat.log_probs[order], flat.log_rest)
    for one, two in zip(*(PACKED.encode(f, layer.shape, layer.place) for f in (flat, other)), strict=True):
        assert one.equals(two)


@given(layers(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=150)
def test_any_bytes_make_sound_rows_or_a_typed_error(layer: Layer, seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = PACKED.encode(layer.flat, layer.shape, layer.place)
    for number in range(2, len(columns)):  # all but the common ids and the counts
        part = columns[number].values.to_numpy().copy()
        hit = rng.random(len(part)) < rng.choice([0, 0, 0.02, 1])
        part[hit] = rng.integers(0, rng.choice([4, 256]), int(hit.sum()))
        columns[number] = pa.ListArray.from_arrays(columns[number].offsets, pa.array(part), type=columns[number].type)
    with contextlib.suppress(CacheError):
        assert_sound(layer._replace(flat=PACKED.decode(columns, layer.shape, layer.place)))


@given(st.integers(0, 2**32), st.sampled_from([0.0, 1.0, 5.0, 1e4]), st.integers(1, 60), st.integers(1, 60))
@settings(deadline=None, max_examples=30)
def test_shards_come_back_through_the_whole_file(seed: int, scale: float, narrow: int, wide: int) -> None:
    cache = TinyCache(codec="packed", vocab_size=60, top_k={1: narrow, 3: wide}, seed=seed, scale=scale)
    for part in cache.shards:
        expected = Expected(part.start, cache.planned[part.start : part.stop])
        examples = cache.examples[part.start : part.stop]
        data = bytes(encode_shard(examples, expected, cache.identity, name="shard").data)
        assert data == bytes(encode_shard(examples, expected, cache.identity, name="shard").data)
        for before, after in zip(
            examples, decode_shard(data, expected, cache.identity, PACKED, name="shard"), strict=True
        ):
            assert (after.index, after.id) == (before.index, before.id)
            assert np.array_equal(after.token_ids, before.token_ids)
            for layer, targets in after.targets.items():
                assert np.array_equal(targets.counts, before.targets[layer].counts)
                assert sorted(targets.ids.tolist()) == sorted(before.targets[layer].ids.tolist())
                mass = np.add.reduceat(np.exp(targets.log_probs, dtype=np.float64), targets.offsets[:-1])
                assert mass + np.exp(targets.log_rest) == pytest.approx(1, abs=1e-5)

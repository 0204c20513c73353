"""Laws of the cache: what goes in comes out, damage never passes, a killed writer leaves no trace."""

import contextlib
import errno
import os
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilllens_cache import CacheError, CacheReader, SketchSpec, TailSpec, atomic, share_shards, verify_cache
from distilllens_cache.codec import find_codec
from distilllens_cache.shard import Expected, decode_shard, encode_shard
from distilllens_cache.tail_rows import decode_tail_rows, encode_tail_rows, pack_codes, unpack_codes

MADE: Any = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_cache_v1.py"))
TinyCache = MADE["TinyCache"]
CALLS = ("create", "write", "fsync", "replace", "fsync_folder")


@st.composite
def tail_specs(draw: st.DrawFn) -> str:
    sketch = draw(st.none() | st.tuples(st.integers(1, 9), st.sampled_from([4, 8])))
    draws = draw(st.none() | st.integers(1, 12))
    return str(TailSpec(draw(st.booleans()), SketchSpec(*sketch) if sketch else None, draws))


@st.composite
def caches(draw: st.DrawFn, codec: str) -> Any:
    vocab_size = draw(st.integers(2, 60))
    width = st.integers(1, vocab_size)
    return TinyCache(
        codec=codec,
        num_examples=draw(st.integers(1, 6)),
        examples_per_shard=draw(st.integers(1, 4)),
        top_k={1: draw(width), 3: draw(width)},
        vocab_size=vocab_size,
        store_tail={1: draw(tail_specs()), 3: draw(tail_specs())},
        hidden_size=9,
        seed=draw(st.integers(0, 2**32)),
        scale=draw(st.sampled_from([0.0, 0.01, 1.0, 5.0, 30.0, 1e4, 1e6])),
    )


def through_the_codec(cache: Any) -> Iterator[tuple[Any, Any]]:
    """Each example beside what comes back."""
    codec = find_codec(cache.codec)
    for part in cache.shards:
        expected = Expected(part.start, cache.planned[part.start : part.stop])
        examples = cache.examples[part.start : part.stop]
        encoded = encode_shard(examples, expected, cache.identity, name="shard")
        decoded = decode_shard(bytes(encoded.data), expected, cache.identity, codec, name="shard")
        if cache.identity.tail_row_layers:
            how: Any = {"is_lossless": codec.is_lossless, "name": "tail rows"}
            decode_tail_rows(bytes(encode_tail_rows(examples, cache.identity, **how)), decoded, cache.identity, **how)
        yield from zip(examples, decoded, strict=True)


@given(caches("arrow-fp32"))
@settings(deadline=None, max_examples=60)
def test_the_lossless_codec_returns_every_bit(cache: Any) -> None:
    for before, after in through_the_codec(cache):
        assert (after.index, after.id) == (before.index, before.id)
        assert np.array_equal(after.token_ids, before.token_ids)
        assert np.array_equal(after.target_positions, before.target_positions)
        assert sorted(after.targets) == sorted(before.targets)
        for layer, targets in before.targets.items():
            for part in ("counts", "ids", "log_probs", "log_rest"):
                old, new = getattr(targets, part), getattr(after.targets[layer], part)
                assert old.dtype == new.dtype
                assert old.tobytes() == new.tobytes()
            assert_equal_tails(targets, after.targets[layer], ("counts", "ids", "draws", "log_probs"))


def assert_equal_tails(before: Any, after: Any, parts: tuple[str, ...]) -> None:
    assert (before.codes is None) == (after.codes is None)
    if before.codes is not None:
        assert after.codes.dtype == np.int8
        assert np.array_equal(before.codes, after.codes)
    assert (before.samples is None) == (after.samples is None)
    if before.samples is not None:
        for part in parts:
            old, new = getattr(before.samples, part), getattr(after.samples, part)
            assert old.dtype == new.dtype
            assert old.tobytes() == new.tobytes()


@given(st.integers(1, 40), st.sampled_from([4, 8]), st.integers(0, 50), st.integers(0, 2**32))
@settings(deadline=None, max_examples=200)
def test_codes_come_back_from_their_bytes(rank: int, bits: Any, rows: int, seed: int) -> None:
    spec = SketchSpec(rank, bits)
    codes = np.random.default_rng(seed).integers(-spec.limit, spec.limit + 1, (rows, rank)).astype(np.int8)
    packed = pack_codes(codes, spec)
    assert packed.shape == (rows, spec.code_bytes)
    assert np.array_equal(unpack_codes(packed, spec), codes)
    for row, code in zip(packed.tolist(), codes.tolist(), strict=True):
        number = sum((value % (1 << bits)) << (bits * place) for place, value in enumerate(code))
        assert int.from_bytes(bytes(row), "little") == number


@given(caches("arrow-fp16"))
@settings(deadline=None, max_examples=60)
def test_the_fp16_codec_errs_by_its_rounding_and_each_row_has_mass_one(cache: Any) -> None:
    for before, after in through_the_codec(cache):
        for layer, old in before.targets.items():
            new = after.targets[layer]
            assert np.array_equal(old.counts, new.counts)
            assert np.array_equal(old.ids, new.ids)
            wanted = np.maximum(old.log_probs, -65504)
            assert (np.abs(new.log_probs - wanted) <= np.abs(wanted) * 2.0**-11 + 0.005).all()
            assert (np.abs(new.log_rest - old.log_rest) <= np.abs(old.log_rest) * 2.0**-11 + 0.005).all()
            starts = new.offsets[:-1]
            mass = np.add.reduceat(np.exp(new.log_probs.astype(np.float64)), starts)
            assert np.abs(mass + np.exp(new.log_rest.astype(np.float64)) - 1).max() < 1e-5
            assert_equal_tails(old, new, ("counts", "ids", "draws"))
            if old.samples is not None:
                rounded = np.maximum(old.samples.log_probs, -65504).astype(np.float16)
                assert np.array_equal(new.samples.log_probs, rounded)


@given(caches("arrow-fp16"), st.integers(0, 5))
@settings(deadline=None, max_examples=25)
def test_padding_holds_the_ragged_rows_and_nothing_else(cache: Any, more: int) -> None:
    for example in cache.examples:
        for targets in example.targets.values():
            width = int(targets.counts.max()) + more
            ids, log_probs = targets.padded(width)
            assert ids.shape == log_probs.shape == (len(targets.counts), width)
            for row, count in enumerate(targets.counts):
                kept = slice(targets.offsets[row], targets.offsets[row + 1])
                assert np.array_equal(ids[row, :count], targets.ids[kept])
                assert np.array_equal(log_probs[row, :count], targets.log_probs[kept])
                assert (log_probs[row, count:] == -100).all()


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def everything(folder: Path) -> list[Any]:
    """All that a reader can give, as plain values."""
    reader = CacheReader(folder)
    found: list[Any] = [(folder / "tokenizer" / p.name).read_bytes() for p in sorted(reader.tokenizer_folder.iterdir())]
    found += [values.tolist() for values in reader.tail_sums().values()]
    found += [[s.basis.tolist(), s.offset.tolist(), s.softcap] for s in reader.sketches().values()]
    for example in reader:
        found += [example.id, example.token_ids.tolist(), example.target_positions.tolist()]
        for targets in example.targets.values():
            found += [targets.counts.tolist(), targets.ids.tolist()]
            found += [targets.log_probs.tolist(), targets.log_rest.tolist()]
            found += [] if targets.codes is None else [targets.codes.tolist()]
            if targets.samples is not None:
                samples = targets.samples
                found += [samples.counts.tolist(), samples.ids.tolist()]
                found += [samples.draws.tolist(), samples.log_probs.tolist()]
    return found


ONLY_FOR_WRITERS = (
    "plan.json",
    ".tails.arrow",
    "0.json",
    "1.json",
    ".projection.arrow",
    "layer_3.json",
    "layer_4.json",
)
"""How the names end of files that a reader never opens: it must give the right values whatever is in them."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes], list[Any]]:
    folder = TinyCache(**MADE["SKETCHED"]).write(tmp_path_factory.mktemp("sound") / "cache")
    return folder, files_of(folder), everything(folder)


def assert_refused(folder: Path, name: str, expected: list[Any]) -> None:
    report = verify_cache(folder)
    assert name in {problem.file for problem in report.problems}
    if name.endswith(ONLY_FOR_WRITERS):
        assert everything(folder) == expected
    else:
        with pytest.raises(CacheError):
            everything(folder)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_a_flipped_bit_is_refused_and_its_file_is_named(
    sound: tuple[Path, dict[str, bytes], list[Any]], data: st.DataObject
) -> None:
    folder, files, expected = sound
    name = data.draw(st.sampled_from(sorted(files)))
    at = data.draw(st.integers(0, len(files[name]) - 1))
    damaged = bytearray(files[name])
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(damaged)
    try:
        assert_refused(folder, name, expected)
    finally:
        (folder / name).write_bytes(files[name])


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_a_file_cut_off_or_grown_is_refused_and_named(
    sound: tuple[Path, dict[str, bytes], list[Any]], data: st.DataObject
) -> None:
    folder, files, expected = sound
    name = data.draw(st.sampled_from(sorted(files)))
    length = data.draw(st.integers(0, len(files[name]) - 1) | st.integers(-64, -1))
    content = files[name][:length] if length >= 0 else files[name] + bytes(range(-length))
    (folder / name).write_bytes(content)
    try:
        assert_refused(folder, name, expected)
    finally:
        (folder / name).write_bytes(files[name])


def test_a_missing_or_swapped_file_is_refused_and_named(
    sound: tuple[Path, dict[str, bytes], list[Any]],
) -> None:
    folder, files, expected = sound
    for name in files:
        (folder / name).unlink()
        assert_refused(folder, name, expected)
        for content in files.values():
            if content != files[name]:
                (folder / name).write_bytes(content)
                assert_refused(folder, name, expected)
        (folder / name).write_bytes(files[name])


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the writer may catch it."""


@contextlib.contextmanager
def failing_at(number: int, failure: BaseException) -> Iterator[list[str]]:
    """The ``number``-th system call of the atomic layer fails, a write after half of its bytes."""
    made: list[str] = []
    originals = {name: getattr(atomic, name) for name in CALLS}

    def wrap(name: str) -> Any:
        def call(*args: Any) -> Any:
            made.append(name)
            if len(made) == number:
                if name == "write":
                    originals[name](args[0], args[1][: len(args[1]) // 2])
                raise failure
            return originals[name](*args)

        return call

    for name in CALLS:
        setattr(atomic, name, wrap(name))
    try:
        yield made
    finally:
        for name, original in originals.items():
            setattr(atomic, name, original)


def assert_no_cache(folder: Path) -> None:
    """A reader refuses, or finds the whole cache: the last calls come after the manifest is in place."""
    try:
        CacheReader(folder)
    except CacheError:
        return
    assert verify_cache(folder).problems == []


@pytest.mark.parametrize("stored", [{}, MADE["SKETCHED"]], ids=["profile", "sketches"])
def test_a_writer_killed_at_any_system_call_is_resumed_to_the_same_bytes(tmp_path: Path, stored: Any) -> None:
    cache = TinyCache(num_examples=3, examples_per_shard=2, **stored)
    wanted = files_of(cache.write(tmp_path / "undisturbed"))
    number, is_over = 0, False
    while not is_over:
        number += 1
        folder = tmp_path / f"killed-{number}"
        with failing_at(number, Killed()) as made:
            try:
                cache.write(folder)
                is_over = True
            except Killed:
                assert_no_cache(folder)
        if is_over:
            assert number > 60
            assert number > len(made)
            break
        with failing_at(1 + number % 17, Killed()), contextlib.suppress(Killed):
            cache.write(folder)  # the resumed run is killed too
        cache.write(folder)
        assert files_of(folder) == wanted
        shutil.rmtree(folder)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_system_call_is_a_sentence_and_the_cache_is_resumed_to_the_same_bytes(
    tmp_path: Path, code: int
) -> None:
    cache = TinyCache(num_examples=3, examples_per_shard=2)
    wanted = files_of(cache.write(tmp_path / "undisturbed"))
    number = 0
    while True:
        number += 1
        folder = tmp_path / f"failed-{number}"
        failure = OSError(code, os.strerror(code))
        with failing_at(number, failure):
            try:
                cache.write(folder)
                break
            except CacheError as error:
                said = str(error)
        assert "run the same command again" in said
        assert ("no space left" in said) == (code == errno.ENOSPC)
        assert_no_cache(folder)
        assert not list(folder.rglob("*.tmp-*"))
        cache.write(folder)
        assert files_of(folder) == wanted
        shutil.rmtree(folder)
    assert number > 60


@given(st.permutations(range(4)))
@settings(deadline=None, max_examples=12)
def test_shards_written_in_any_order_by_any_number_of_runs_give_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    cache = TinyCache(num_examples=7, examples_per_shard=2)
    wanted = files_of(cache.write(tmp_path_factory.mktemp("one") / "cache"))
    folder = tmp_path_factory.mktemp("two") / "cache"
    cache.write_shards(cache.writer(folder), order[:1])
    cache.write_shards(cache.writer(folder), order[1:3])
    cache.write(folder)
    assert files_of(folder) == wanted


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 500), st.integers(1, 10_000), max_size=30), st.integers(1, 8))
def test_ranks_share_the_shards_without_gap_or_overlap_and_evenly(num_tokens: dict[int, int], world_size: int) -> None:
    shares = share_shards(num_tokens, world_size)
    assert len(shares) == world_size
    assert sorted(number for share in shares for number in share) == sorted(num_tokens)
    assert all(share == sorted(share) for share in shares)
    loads = [sum(num_tokens[number] for number in share) for share in shares]
    for share, load in zip(shares, loads, strict=True):
        assert load - min(loads) <= min((num_tokens[number] for number in share), default=0)
    assert share_shards(dict(reversed(num_tokens.items())), world_size) == shares

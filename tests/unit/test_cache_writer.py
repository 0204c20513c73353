"""The writer: what it writes, and what it refuses to write."""

import dataclasses
import hashlib
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distilllens_cache import (
    CacheError,
    CacheReader,
    Identity,
    LayerTargets,
    PlannedExample,
    example_digest,
    plan_shards,
    tail_profile,
    verify_cache,
)

TinyCache: Any = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_cache_v1.py"))["TinyCache"]


@pytest.fixture
def cache() -> Any:
    return TinyCache()


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_plan_is_there_before_any_shard_and_the_manifest_after_all(tmp_path: Path, cache: Any) -> None:
    folder = tmp_path / "deep" / "cache"
    writer = cache.writer(folder)
    assert (folder / "plan.json").is_file()
    assert writer.unfinished() == [0, 1]
    cache.write_shards(writer, [1])
    assert writer.unfinished() == [0]
    with pytest.raises(CacheError, match="still lacks 1 of 2 shards"):
        writer.finish()
    cache.write_shards(writer, [0])
    assert not (folder / "manifest.json").exists()
    assert not writer.finished
    assert writer.finish() == folder / "manifest.json"
    assert writer.finished
    shards = [p for p in (folder / "shards").iterdir() if p.suffix == ".arrow"]
    assert writer.bytes_written == sum(p.stat().st_size for p in shards)


def change(targets: Any, **arrays: Any) -> Any:
    return dataclasses.replace(targets, **arrays)


def set_at(array: np.ndarray, at: int, value: Any) -> np.ndarray:
    result = array.copy()
    result[at] = value
    return result


def wide_row(targets: Any) -> int:
    """Where a row with at least two ids starts."""
    return int(targets.offsets[np.flatnonzero(targets.counts >= 2)[0]])


NONSENSE = {
    "token id 50, but the vocabulary has 50": lambda t: change(t, ids=set_at(t.ids, 0, 50)),
    "occurs twice": lambda t: change(t, ids=set_at(t.ids, wide_row(t) + 1, t.ids[wide_row(t)])),
    "a log-probability of nan": lambda t: change(t, log_probs=set_at(t.log_probs, 0, np.nan)),
    "a log-probability of -inf": lambda t: change(t, log_probs=set_at(t.log_probs, -1, -np.inf)),
    "a log-probability of 0.5": lambda t: change(t, log_probs=set_at(t.log_probs, 0, 0.5)),
    "not sorted": lambda t: change(
        t, log_probs=set_at(t.log_probs, wide_row(t) + 1, t.log_probs[wide_row(t)] + 0.001)
    ),
    "log of the rest is nan": lambda t: change(t, log_rest=set_at(t.log_rest, 0, np.nan)),
    "log of the rest is -101": lambda t: change(t, log_rest=set_at(t.log_rest, 0, -101)),
    "log of the rest is 0.1": lambda t: change(t, log_rest=set_at(t.log_rest, 0, 0.1)),
    "instead of 1": lambda t: change(t, log_rest=set_at(t.log_rest, 0, t.log_rest[0] - 0.01)),
    "keeps 0 ids": lambda t: change(
        t,
        counts=set_at(t.counts, 0, 0),
        ids=t.ids[t.counts[0] :],
        log_probs=t.log_probs[t.counts[0] :],
    ),
    "there are": lambda t: change(t, ids=t.ids[:-1]),
    "rows for": lambda t: change(t, counts=t.counts[:-1]),
    "are expected, not": lambda t: change(t, log_probs=t.log_probs.astype(np.float64)),
}  # fmt: skip


@pytest.mark.parametrize("what", NONSENSE)
def test_targets_that_make_no_sense_are_refused_before_anything_is_written(
    tmp_path: Path, cache: Any, what: str
) -> None:
    writer = cache.writer(tmp_path / "cache")
    before = files_of(tmp_path)
    example = cache.examples[1]
    bad = dataclasses.replace(example, targets={2: example.targets[2], 4: NONSENSE[what](example.targets[4])})
    with pytest.raises(CacheError, match=f"example 1 .*{what}"):
        writer.write_shard(0, [cache.examples[0], bad, cache.examples[2]], cache.tails[0])
    assert files_of(tmp_path) == before


def test_a_row_wider_than_top_k_is_refused(tmp_path: Path) -> None:
    wide = TinyCache(top_k={2: 3, 4: 50})
    narrow = Identity(**(wide.identity.model_dump() | {"top_k": {2: 3, 4: 6}}))
    writer = wide.writer(tmp_path / "cache", identity=narrow)
    with pytest.raises(CacheError, match="expected are 1 to 6"):
        wide.write_shards(writer, [0])


def test_examples_that_are_not_the_planned_ones_are_refused(tmp_path: Path, cache: Any) -> None:
    writer = cache.writer(tmp_path / "cache")
    one, two, three = cache.examples[:3]

    def write(examples: list[Any], what: str) -> None:
        with pytest.raises(CacheError, match=what):
            writer.write_shard(0, examples, cache.tails[0])

    write([one, two], "2 examples; expected are 3")
    write([two, one, three], r"the plan has example 0")
    write([dataclasses.replace(one, id="other"), two, three], "the plan has example 0")
    flipped = set_at(one.token_ids, 0, (one.token_ids[0] + 1) % 50)
    write([dataclasses.replace(one, token_ids=flipped), two, three], "not those of the plan")
    write([dataclasses.replace(one, token_ids=one.token_ids[:-1]), two, three], "the plan has")
    late = set_at(one.target_positions, -1, len(one.token_ids) - 1)
    write([dataclasses.replace(one, target_positions=late), two, three], "must ascend and end before")
    back = one.target_positions[::-1].copy()
    write([dataclasses.replace(one, target_positions=back), two, three], "must ascend|not those")
    write([dataclasses.replace(one, token_ids=one.token_ids.astype(np.int64)), two, three], "are uint32")
    write([dataclasses.replace(one, token_ids=set_at(one.token_ids, 0, 50)), two, three], "token id 50")
    write([dataclasses.replace(one, targets={4: one.targets[4]}), two, three], "the layers")
    assert writer.unfinished() == [0, 1]


def test_tail_sums_that_cannot_be_are_refused(tmp_path: Path, cache: Any) -> None:
    writer = cache.writer(tmp_path / "cache")
    tails = cache.tails[0]

    def write(bad: Any, what: str) -> None:
        with pytest.raises(CacheError, match=what):
            writer.write_shard(0, cache.examples[:3], bad)

    write(None, "tail sums do not fit")
    write({4: tails[4]}, "layers")
    write(tails | {2: tails[2][:-1]}, r"expected is int64 \(50,\)")
    write(tails | {2: tails[2].astype(np.float64)}, "expected is int64")
    write(tails | {2: set_at(tails[2], 0, -1)}, "cannot have")
    write(tails | {2: set_at(tails[2], 0, 2**62)}, "cannot have")
    assert writer.unfinished() == [0, 1]


def test_a_cache_without_tails_has_no_files_of_them(tmp_path: Path) -> None:
    folder = TinyCache(store_tail="none").write(tmp_path / "cache")
    assert not [name for name in files_of(folder) if "tail" in name]
    assert CacheReader(folder).tail_sums() == {}
    assert verify_cache(folder).problems == []


def test_layer_statistics_are_those_of_the_targets(tmp_path: Path, cache: Any) -> None:
    manifest = CacheReader(cache.write(tmp_path / "cache")).manifest
    for layer, stats in manifest.layer_stats.items():
        kept, entropy, num_ids = 0.0, 0.0, 0
        for example in cache.examples:
            targets = example.targets[layer]
            log_cells = np.concatenate([targets.log_probs, targets.log_rest]).astype(np.float64)
            kept += np.exp(targets.log_probs.astype(np.float64)).sum()
            entropy -= (np.exp(log_cells) * log_cells).sum()
            num_ids += len(targets.ids)
        assert stats.num_targets == manifest.num_targets == sum(p.num_targets for p in cache.planned)
        assert stats.num_ids == num_ids
        assert stats.kept_mass == pytest.approx(kept, rel=1e-6)
        assert stats.entropy == pytest.approx(entropy, rel=1e-6)
        assert 0 < stats.bytes < sum(shard.size for shard in manifest.shards)
    files = files_of(tmp_path / "cache")
    sizes = [len(data) for name, data in files.items() if not name.endswith(("plan.json", "0.json", "1.json"))]
    assert manifest.total_bytes == sum(sizes) - len(files["manifest.json"])


def test_tokenizer_files_can_be_given_as_a_folder(tmp_path: Path, cache: Any) -> None:
    source = tmp_path / "tokenizer"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "tokenizer.json").write_bytes(b"{}")
    (source / "additional_chat_templates" / "tools.jinja").write_bytes(b"{{ 1 }}")
    folder = cache.write(tmp_path / "cache", tokenizer_files=source)
    found = CacheReader(folder).tokenizer_folder
    assert (found / "additional_chat_templates" / "tools.jinja").read_bytes() == b"{{ 1 }}"
    with pytest.raises(CacheError, match="a name that a cache cannot hold"):
        cache.write(tmp_path / "bad", tokenizer_files={"../tokenizer.json": b"{}"})
    assert not (tmp_path / "bad").exists()


def test_an_example_without_targets_is_kept(tmp_path: Path, cache: Any) -> None:
    for number in (0, 3, 4):  # one shard has other examples too, one has none
        example = cache.examples[number]
        empty = {
            layer: LayerTargets(t.counts[:0], t.ids[:0], t.log_probs[:0], t.log_rest[:0])
            for layer, t in example.targets.items()
        }
        none = example.target_positions[:0]
        cache.examples[number] = dataclasses.replace(example, target_positions=none, targets=empty)
        cache.planned[number] = PlannedExample(
            example.id, example_digest(example.token_ids, none), len(example.token_ids), 0
        )
    cache.tails[0] = {layer: sums // 8 for layer, sums in cache.tails[0].items()}
    cache.tails[1] = {layer: np.zeros_like(sums) for layer, sums in cache.tails[1].items()}
    reader = CacheReader(cache.write(tmp_path / "cache"))
    assert reader.num_targets.tolist()[::3] == [0, 0]
    for found, example in zip(reader, cache.examples, strict=True):
        assert found.target_positions.tolist() == example.target_positions.tolist()
        assert found.targets[4].ids.tolist() == example.targets[4].ids.tolist()
        assert found.targets[4].padded()[0].shape[0] == len(example.target_positions)
    assert verify_cache(tmp_path / "cache").problems == []


def test_an_id_or_a_digest_that_cannot_be_stored_is_refused(tmp_path: Path, cache: Any) -> None:
    for changes in (
        {"id": "x" * 1025},
        {"id": "ü" * 600},
        {"id": "\ud800"},
        {"digest": "xyz"},
        {"num_tokens": -1},
    ):
        planned = [dataclasses.replace(cache.planned[0], **changes), *cache.planned[1:]]
        with pytest.raises(CacheError, match=r"the id|example of the plan"):
            cache.writer(tmp_path / "cache", examples=planned)
    assert not (tmp_path / "cache").exists()


def planned(num_tokens: int, num_targets: int) -> PlannedExample:
    return PlannedExample("x", "0" * 64, num_tokens, num_targets)


def test_shards_follow_one_another_within_both_limits() -> None:
    examples = [planned(10, 5)] * 10
    assert plan_shards(examples, examples_per_shard=4, bytes_per_target=0) == [
        range(4), range(4, 8), range(8, 10)
    ]  # fmt: skip
    size = 40 + 5 * 100
    cut = plan_shards(examples, examples_per_shard=9, bytes_per_target=100, max_shard_bytes=3 * size)
    assert [len(part) for part in cut] == [3, 3, 3, 1]
    assert plan_shards(examples[:2], examples_per_shard=9, bytes_per_target=1e9) == [range(1), range(1, 2)]
    assert plan_shards([], examples_per_shard=9, bytes_per_target=1) == []


@pytest.mark.parametrize("shards", [[], [range(3)], [range(5), range(5, 5)], [range(1, 5)], [range(3), range(2, 5)]])
def test_shards_that_do_not_cover_the_examples_once_are_refused(
    tmp_path: Path, cache: Any, shards: list[range]
) -> None:
    with pytest.raises(CacheError, match="shards"):
        cache.writer(tmp_path / "cache", shards=shards)
    assert not (tmp_path / "cache").exists()


def test_the_digest_of_an_example_covers_tokens_positions_and_where_they_part() -> None:
    digests = [example_digest(*parts) for parts in (([1, 2], [3]), ([1], [2, 3]), ([1, 2, 3], []), ([1, 3], [2]))]
    assert len(set(digests)) == 4
    assert example_digest(np.array([1, 2], np.int64), np.array([3], np.uint32)) == digests[0]
    serialised = b"".join(n.to_bytes(4, "little") for n in (2, 1, 2, 1, 3))
    assert digests[0] == hashlib.sha256(serialised).hexdigest()
    for bad in ([-1], [2**32], [0.5], [[1]]):
        with pytest.raises(ValueError, match="token ids and positions"):
            example_digest(bad, [0])  # type: ignore[arg-type]


def test_the_tail_profile_is_a_distribution_that_is_nowhere_zero() -> None:
    profile = tail_profile(np.array([0, 2**32, 3 * 2**32]), uniform=0.3)
    assert profile == pytest.approx([0.1, 0.275, 0.625])
    assert tail_profile(np.zeros(4)) == pytest.approx([0.25] * 4)
    with pytest.raises(ValueError, match="not negative"):
        tail_profile([-1, 2])

"""The canary and the check of a whole cache."""

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distilllens_cache import CachedExample, LayerTargets, canary, verify_cache
from distilllens_cache.sealed_json import seal

TinyCache: Any = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_cache_v1.py"))["TinyCache"]


def read_by_a_teacher(
    shift: int = 0,
    *,
    foreign: bool = False,
    skill: float = 0.7,
    confidence: float = 0.6,
    num: int = 20,
    seed: int = 0,
) -> list[CachedExample]:
    """Examples whose likeliest token is, with probability ``skill``, the one ``shift`` off the next."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 1000, 40).astype(np.uint32) for _ in range(num)]
    examples = []
    for number, text in enumerate(texts):
        positions = np.arange(5, 38, dtype=np.uint32)
        size = len(positions)
        read = texts[(number + 1) % num] if foreign else text
        wanted = read[positions.astype(int) + 1 + shift]
        top = np.where(rng.random(size) < skill, wanted, 1000 + rng.integers(0, 1000, size))
        ids = np.stack([top, np.full(size, 2000)], 1).astype(np.uint32).ravel()
        rest = (1 - confidence) / 2
        log_probs = np.tile(np.log([confidence, rest]), size).astype(np.float32)
        targets = LayerTargets(np.full(size, 2, np.int32), ids, log_probs, np.full(size, np.log(rest), np.float32))
        examples.append(CachedExample(number, str(number), text, positions, {6: targets}))
    return examples


def test_targets_where_they_belong_pass() -> None:
    result = canary(read_by_a_teacher(), 6)
    assert result.verdict == "passed"
    assert result.num == 20 * 33
    assert 0.6 < result.aligned < 0.8
    assert max(result.left, result.right, result.foreign) < 0.05
    assert "70" in result.sentence or "6" in result.sentence


@pytest.mark.parametrize(("shift", "name", "why"), [(-1, "left", "too late"), (1, "right", "too early")])
def test_targets_one_position_off_fail(shift: int, name: str, why: str) -> None:
    result = canary(read_by_a_teacher(shift), 6)
    assert result.verdict == "failed"
    assert getattr(result, name) > 0.6
    assert result.aligned < 0.05
    assert why in result.sentence


def test_targets_of_the_neighbouring_example_fail() -> None:
    examples = read_by_a_teacher()
    for moved in (examples[1:] + examples[:1], examples[-1:] + examples[:-1]):
        mixed = [
            dataclasses.replace(example, targets=other.targets) for example, other in zip(examples, moved, strict=True)
        ]
        result = canary(mixed, 6)
        assert result.verdict == "failed"
        assert "mixed up" in result.sentence
    assert canary(read_by_a_teacher(foreign=True), 6).verdict == "failed"


def test_a_teacher_that_knows_nothing_is_inconclusive() -> None:
    for seed in range(20):
        assert canary(read_by_a_teacher(skill=0.01, seed=seed), 6).verdict == "inconclusive"


def test_text_that_repeats_itself_is_inconclusive() -> None:
    same = [
        dataclasses.replace(
            example,
            token_ids=np.full_like(example.token_ids, 3),
            targets={6: dataclasses.replace(example.targets[6], ids=np.tile([3, 4], 33).astype(np.uint32))},
        )
        for example in read_by_a_teacher()
    ]
    result = canary(same, 6)
    assert (result.aligned, result.left, result.right, result.foreign) == (1, 1, 1, 1)
    assert result.verdict == "inconclusive"


@pytest.mark.parametrize("shift", [0, -1])
def test_too_few_targets_are_inconclusive(shift: int) -> None:
    result = canary(read_by_a_teacher(shift)[:3], 6)
    assert result.num == 99
    assert result.verdict == "inconclusive"
    assert "at least 100" in result.sentence


def test_one_long_example_is_enough() -> None:
    examples = read_by_a_teacher()
    one = examples[0]
    tokens = np.concatenate([example.token_ids for example in examples])
    positions = np.concatenate([e.target_positions + 40 * e.index for e in examples]).astype(np.uint32)
    parts = [example.targets[6] for example in examples]
    targets = LayerTargets(
        counts=np.concatenate([part.counts for part in parts]),
        ids=np.concatenate([part.ids for part in parts]),
        log_probs=np.concatenate([part.log_probs for part in parts]),
        log_rest=np.concatenate([part.log_rest for part in parts]),
    )
    long = dataclasses.replace(one, token_ids=tokens, target_positions=positions, targets={6: targets})
    assert canary([long], 6).verdict == "passed"
    assert canary([], 6).verdict == "inconclusive"


def test_an_untrained_teacher_that_echoes_its_input_is_not_taken_for_a_shift() -> None:
    result = canary(read_by_a_teacher(-1, skill=0.95, confidence=0.01), 6)
    assert result.verdict == "inconclusive"
    assert "echoes" in result.sentence
    assert canary(read_by_a_teacher(-1, skill=0.4, confidence=0.15), 6).verdict == "failed"


def test_the_verdict_of_the_canary_is_part_of_the_check(tmp_path: Path) -> None:
    cache = TinyCache(num_examples=60, examples_per_shard=20, copies_the_text=True)
    report = verify_cache(cache.write(tmp_path / "sound"))
    assert report.problems == []
    assert report.is_sound
    assert report.canary is not None
    assert report.canary.verdict == "passed"
    assert report.canary.aligned > 0.99
    moved = TinyCache(num_examples=60, examples_per_shard=20, copies_the_text=True)
    for example in moved.examples:
        rolled = {}
        for layer, t in example.targets.items():
            last, rest = slice(t.offsets[-2], None), slice(None, t.offsets[-2])
            rolled[layer] = LayerTargets(
                np.roll(t.counts, 1),
                np.concatenate([t.ids[last], t.ids[rest]]),
                np.concatenate([t.log_probs[last], t.log_probs[rest]]),
                np.roll(t.log_rest, 1),
            )
        example.targets.update(rolled)
    report = verify_cache(moved.write(tmp_path / "moved"))
    assert [problem.file for problem in report.problems] == ["manifest.json"]
    assert "one position too late" in report.problems[0].what


def test_every_file_of_a_sound_cache_is_checked_and_counted(tmp_path: Path) -> None:
    folder = TinyCache().write(tmp_path / "cache")
    seen: list[tuple[str, int, int]] = []
    report = verify_cache(folder, progress=lambda *args: seen.append(args))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert report.files == len(files)
    assert report.num_bytes == sum(path.stat().st_size for path in files)
    assert sorted(name for name, _, _ in seen) == sorted(p.relative_to(folder).as_posix() for p in files)
    assert all(done <= total for _, done, total in seen)


def test_an_unfinished_cache_is_reported_and_its_shards_are_checked(tmp_path: Path) -> None:
    cache = TinyCache()
    cache.write_shards(cache.writer(tmp_path), [0])
    report = verify_cache(tmp_path)
    assert [problem.file for problem in report.problems] == ["manifest.json"]
    assert "unfinished" in report.problems[0].what
    (tmp_path / "shards/00000.arrow").write_bytes(b"x")
    assert [p.file for p in verify_cache(tmp_path).problems] == ["manifest.json", "shards/00000.arrow"]


def test_a_folder_that_is_no_cache_is_a_problem_not_a_traceback(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        report = verify_cache(folder)
        assert [problem.file for problem in report.problems] == ["manifest.json"]
        assert report.canary is None


def edit(folder: Path, name: str, change: Any) -> None:
    content = json.loads((folder / name).read_bytes())
    content.pop("sha256")
    change(content)
    (folder / name).write_bytes(seal(content))


def more_ids(content: dict[str, Any]) -> None:
    content["layer_stats"]["4"]["num_ids"] += 1


def another_count(content: dict[str, Any]) -> None:
    content["shard"]["num_tokens"] += 1


def another_plan(content: dict[str, Any]) -> None:
    content["plan_sha256"] = "0" * 64


def another_teacher(content: dict[str, Any]) -> None:
    content["identity"]["teacher"] = "another"


@pytest.mark.parametrize(
    ("name", "change", "problem", "what"),
    [
        ("shards/00000.json", more_ids, "shards/00000.json", "statistics of layer 4"),
        ("manifest.json", more_ids, "manifest.json", "not the sums"),
        ("shards/00000.json", another_count, "shards/00000.json", "sidecar and manifest contradict"),
        ("shards/00000.json", another_plan, "shards/00000.json", "another plan"),
        ("plan.json", another_teacher, "plan.json", "not the plan that the manifest"),
        ("manifest.json", another_teacher, "plan.json", "contradict"),
    ],
)
def test_sealed_records_that_contradict_each_other_are_named(
    tmp_path: Path, name: str, change: Any, problem: str, what: str
) -> None:
    folder = TinyCache().write(tmp_path / "cache")
    edit(folder, name, change)
    found = {one.file: one.what for one in verify_cache(folder).problems}
    assert what in found[problem]


def test_tail_sums_that_are_not_the_sum_of_the_shards_are_named(tmp_path: Path) -> None:
    cache, other = TinyCache(), TinyCache(seed=1)
    folder = cache.write(tmp_path / "cache")
    swapped = (other.write(tmp_path / "other") / "tail_sums.arrow").read_bytes()
    import hashlib

    (folder / "tail_sums.arrow").write_bytes(swapped)
    record = {"name": "tail_sums.arrow", "size": len(swapped), "sha256": hashlib.sha256(swapped).hexdigest()}
    edit(folder, "manifest.json", lambda content: content.update(tail_sums=record))
    assert [p.file for p in verify_cache(folder).problems] == ["tail_sums.arrow"]

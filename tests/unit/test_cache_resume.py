"""Folders that hold something already: a cache to go on with, to repair, to replace, or to leave alone."""

import dataclasses
import os
import runpy
from pathlib import Path
from typing import Any

import pytest

from distilllens_cache import (
    CacheError,
    CacheReader,
    Identity,
    atomic,
)

TinyCache: Any = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_cache_v1.py"))["TinyCache"]


@pytest.fixture
def cache() -> Any:
    return TinyCache()


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_finished_cache_has_nothing_left_to_do_and_keeps_its_bytes(tmp_path: Path, cache: Any) -> None:
    folder = cache.write(tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    writer = cache.writer(folder)
    assert writer.finished
    assert writer.unfinished() == []
    writer.finish()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(CacheError, match="not one of the shards still to be written"):
        cache.write_shards(writer, [0])


OTHER = {
    "format_version": 2,
    "teacher": "other",
    "teacher_digest": "aa",
    "teacher_config_digest": "bb",
    "num_layers": 5,
    "dtype": "bfloat16",
    "attn_implementation": "sdpa",
    "torch_version": "2.14",
    "transformers_version": "6",
    "device": "cuda",
    "tokenizer_digest": "cc",
    "template_digest": "dd",
    "vocab_size": 51,
    "dataset_digest": "ee",
    "layers": (3, 4),
    "lens_norm": "none",
    "top_k": {2: 3, 4: 5},
    "min_k": {4: 2},
    "min_prob": {2: 0.001},
    "top_p": {4: 0.98},
    "store_tail": {2: "profile", 4: "none"},
    "calibration_targets": 1000,
    "temperature": 2.0,
    "codec": "arrow-fp16",
    "batch_tokens": 65,
    "examples_per_shard": 4,
    "seed": 1,
}


def test_every_field_of_an_identity_is_tried() -> None:
    assert set(OTHER) == set(Identity.model_fields)


@pytest.mark.parametrize("field", OTHER)
def test_a_run_that_differs_in_one_field_is_refused_and_the_field_is_named(
    tmp_path: Path, cache: Any, field: str
) -> None:
    writer = cache.writer(tmp_path / "cache")
    cache.write_shards(writer, [0])
    before = files_of(tmp_path)
    changes = {field: OTHER[field]}
    if field == "layers":
        changes["top_k"] = {3: 3, 4: 6}
    if field == "num_layers":
        changes |= {"layers": (2, 5), "top_k": {2: 3, 5: 6}}
    other = Identity(**(cache.identity.model_dump() | changes))
    with pytest.raises(CacheError, match=rf"{field}: cache has .*, this run has .*") as caught:
        cache.writer(tmp_path / "cache", identity=other)
    assert "--overwrite" in str(caught.value)
    assert files_of(tmp_path) == before


def test_other_examples_other_shards_or_another_tokenizer_are_refused(tmp_path: Path, cache: Any) -> None:
    folder = tmp_path / "cache"
    cache.writer(folder)
    planned = list(cache.planned)
    planned[3] = dataclasses.replace(planned[3], digest="0" * 64)
    with pytest.raises(CacheError, match="other examples: at place 3"):
        cache.writer(folder, examples=planned)
    with pytest.raises(CacheError, match="it has 5, this run has 4"):
        cache.writer(folder, examples=planned[:4], shards=[range(4)])
    with pytest.raises(CacheError, match="cut elsewhere"):
        cache.writer(folder, shards=[range(2), range(2, 5)])
    with pytest.raises(CacheError, match="other tokenizer files"):
        cache.writer(folder, tokenizer_files={"tokenizer.json": b"{}"})


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_holds_something_else_is_refused_untouched(tmp_path: Path, cache: Any, overwrite: bool) -> None:
    for name in ("thesis.txt", "shards/notes.txt", "tokenizer/tokenizer.json", "plan.json"):
        folder = tmp_path / name.replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("my work")
        with pytest.raises(CacheError, match="holds something that is not a cache"):
            cache.writer(folder, overwrite=overwrite)
        assert files_of(folder) == {name: b"my work"}
        assert {p.name for p in folder.iterdir()} == {name.split("/")[0]}
    with pytest.raises(CacheError, match="is a file"):
        cache.writer(tmp_path / "thesis.txt" / "thesis.txt", overwrite=overwrite)


def test_overwrite_starts_anew_and_deletes_only_what_belongs_to_a_cache(tmp_path: Path, cache: Any) -> None:
    folder = TinyCache(seed=9, num_examples=9).write(tmp_path / "cache")
    (folder / "tokenizer" / "stale.json").write_text("{}")
    (folder / "shards" / "00007.arrow.tmp-12").write_text("torn")
    keep = ("notes.txt", "shards/mine.txt")
    for name in keep:
        (folder / name).write_text("my work")
    writer = cache.writer(folder, overwrite=True)
    assert writer.unfinished() == [0, 1]
    with pytest.raises(CacheError, match="unfinished"):
        CacheReader(folder)
    cache.write(folder)
    wanted = files_of(cache.write(tmp_path / "fresh")) | dict.fromkeys(keep, b"my work")
    assert files_of(folder) == wanted


def test_overwrite_takes_the_manifest_away_first(tmp_path: Path, cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache.write(tmp_path / "cache")
    removed: list[str] = []
    original = atomic.remove
    monkeypatch.setattr(atomic, "remove", lambda path: (removed.append(path.name), original(path)))
    writer = cache.writer(folder, overwrite=True)
    assert not writer.finished
    assert removed[0] == "manifest.json"
    assert "plan.json" not in removed
    assert len([name for name in removed if not name.endswith(".lock")]) == 11


def test_overwrite_follows_no_links_out_of_the_folder(tmp_path: Path, cache: Any) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "00000.arrow").write_text("my work")
    folder = cache.write(tmp_path / "cache")
    for path in (folder / "shards").iterdir():
        path.unlink()
    (folder / "shards").rmdir()
    (folder / "shards").symlink_to(outside)
    with pytest.raises(CacheError, match="no ordinary folder"):
        cache.writer(folder, overwrite=True)
    assert (outside / "00000.arrow").read_text() == "my work"


@pytest.mark.parametrize("name", ["shards/00000.arrow", "shards/00000.tails.arrow", "shards/00000.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_shard_is_written_again_to_the_same_bytes(tmp_path: Path, cache: Any, name: str, damage: str) -> None:
    folder = cache.write(tmp_path / "cache")
    wanted = files_of(folder)
    content = bytearray(wanted[name])
    content[30] ^= 4
    if damage == "gone":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if damage == "flip" else content[:-1])
    writer = cache.writer(folder)
    assert not writer.finished
    assert writer.unfinished() == [0]
    with pytest.raises(CacheError, match="unfinished"):
        CacheReader(folder)
    cache.write(folder)
    assert files_of(folder) == wanted


@pytest.mark.parametrize("name", ["index.arrow", "tokenizer/tokenizer.json", "tail_sums.arrow", "manifest.json"])
def test_any_other_damaged_file_but_the_plan_is_written_again(tmp_path: Path, cache: Any, name: str) -> None:
    folder = cache.write(tmp_path / "cache")
    wanted = files_of(folder)
    (folder / name).write_bytes(wanted[name][:-3])
    assert cache.writer(folder).unfinished() == []
    cache.write(folder)
    assert files_of(folder) == wanted


def test_a_damaged_plan_cannot_be_continued_but_overwritten(tmp_path: Path, cache: Any) -> None:
    folder = cache.write(tmp_path / "cache")
    wanted = files_of(folder)
    for content in (wanted["plan.json"].replace(b"handmade", b"handmode"), wanted["plan.json"][:100], b""):
        (folder / "plan.json").write_bytes(content)
        with pytest.raises(CacheError, match=r"cannot be continued: plan\.json .* --overwrite"):
            cache.writer(folder)
        cache.write(folder, overwrite=True)
        assert files_of(folder) == wanted


def test_shards_of_another_plan_are_not_taken_for_finished(tmp_path: Path, cache: Any) -> None:
    other = TinyCache(seed=3)
    folder = cache.write(tmp_path / "cache")
    other.write(tmp_path / "other")
    for path in (tmp_path / "other" / "shards").iterdir():
        (folder / "shards" / path.name).write_bytes(path.read_bytes())
    assert cache.writer(folder).unfinished() == [0, 1]


def test_half_written_files_of_a_killed_writer_are_cleared(tmp_path: Path, cache: Any) -> None:
    folder = tmp_path / "cache"
    writer = cache.writer(folder)
    cache.write_shards(writer, [0])
    beside = ("README.md", "config.resolved.yaml")
    torn = ("plan.json.tmp-1", "shards/00001.arrow.tmp-77", "tokenizer/tokenizer.json.tmp-5")
    torn += tuple(f"{name}.tmp-3" for name in beside)
    for name in (*torn, *beside, "notes.tmp-3"):
        (folder / name).write_bytes(b"torn")
    assert cache.writer(folder).unfinished() == [1]
    cache.write(folder)
    assert not any((folder / name).exists() for name in torn)
    assert all((folder / name).exists() for name in (*beside, "notes.tmp-3"))  # no files of the writer's


def test_a_start_killed_before_its_plan_was_whole_is_started_again(tmp_path: Path, cache: Any) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "plan.json.tmp-123").write_bytes(b"{")
    wanted = files_of(cache.write(tmp_path / "fresh"))
    assert files_of(cache.write(folder)) == wanted


def test_a_full_disk_is_a_sentence_and_the_run_can_go_on(
    tmp_path: Path, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    import signal

    writer = cache.writer(tmp_path / "cache")
    cache.write_shards(writer, [0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(CacheError, match=r"no space left .* run the same command again"):
            cache.write_shards(writer, [1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert cache.writer(tmp_path / "cache").unfinished() == [1]
    assert files_of(cache.write(tmp_path / "cache")) == files_of(cache.write(tmp_path / "fresh"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path, cache: Any) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CacheError, match="could not write"):
        cache.write(tmp_path / "cache")

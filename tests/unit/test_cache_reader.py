"""The reader: what it gives, what it refuses, and that it only reads."""

import os
import pickle
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distilllens_cache import CacheError, CacheReader

TinyCache: Any = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_cache_v1.py"))["TinyCache"]


@pytest.fixture(scope="module")
def cache() -> Any:
    return TinyCache(num_examples=9, examples_per_shard=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cache: Any) -> Path:
    return cache.write(tmp_path_factory.mktemp("reader") / "cache")


def test_examples_are_found_by_their_place(folder: Path, cache: Any) -> None:
    reader = CacheReader(folder)
    assert len(reader) == 9
    assert reader.ids == [example.id for example in cache.examples]
    assert reader.num_tokens.tolist() == [len(example.token_ids) for example in cache.examples]
    assert reader.num_targets.tolist() == [len(example.target_positions) for example in cache.examples]
    assert reader.shard_of.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    for index in (8, 0, 3, 2, 8, 5):
        assert reader[index].id == f"row-{index}"
        assert np.array_equal(reader[index].token_ids, cache.examples[index].token_ids)
    for index in (-1, 9):
        with pytest.raises(IndexError, match="which has 9"):
            reader[index]
    with pytest.raises(IndexError, match="which has 5"):
        reader.read_shard(5)


def test_only_the_shards_used_last_stay_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = CacheReader(folder, shards_in_memory=2)
    read: list[int] = []
    original = reader.read_shard
    monkeypatch.setattr(reader, "read_shard", lambda number: (read.append(number), original(number))[1])
    for index in (0, 1, 2, 0, 4, 0, 2):
        assert reader[index].index == index
    assert read == [0, 1, 2, 1]


def test_arrays_of_a_cache_cannot_be_changed(folder: Path) -> None:
    reader = CacheReader(folder)
    example = reader[0]
    targets = example.targets[4]
    arrays = [example.token_ids, example.target_positions, reader.num_targets, reader.tail_sums()[4]]
    arrays += [targets.counts, targets.ids, targets.log_probs, targets.log_rest]
    for array in arrays:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_a_reader_can_be_sent_to_another_process(folder: Path) -> None:
    copy = pickle.loads(pickle.dumps(CacheReader(folder)))
    assert copy[8].id == "row-8"


def test_tail_sums_are_those_of_all_shards(folder: Path, cache: Any) -> None:
    sums = CacheReader(folder).tail_sums()
    assert sorted(sums) == [2, 4]
    for layer, values in sums.items():
        assert values.dtype == np.int64
        assert np.array_equal(values, np.sum([tails[layer] for tails in cache.tails], axis=0))


def test_the_digest_of_a_cache_is_that_of_its_manifest(folder: Path, tmp_path: Path) -> None:
    import hashlib

    assert CacheReader(folder).digest == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    other = TinyCache(num_examples=9, examples_per_shard=2, seed=1).write(tmp_path / "cache")
    assert CacheReader(other).digest != CacheReader(folder).digest


def test_a_cache_that_is_absent_or_unfinished_says_what_to_do(tmp_path: Path, cache: Any) -> None:
    with pytest.raises(CacheError, match=r"is not a folder.*cache-teacher"):
        CacheReader(tmp_path / "nothing")
    with pytest.raises(CacheError, match=r"has no manifest\.json: not a teacher cache"):
        CacheReader(tmp_path)
    writer = cache.writer(tmp_path / "cache")
    cache.write_shards(writer, [0])
    with pytest.raises(CacheError, match=r"unfinished.*Run `distilllens cache-teacher` again"):
        CacheReader(tmp_path / "cache")


def test_a_run_that_needs_something_else_is_refused_with_each_field(folder: Path) -> None:
    reader = CacheReader(folder)
    fits = {"tokenizer_digest": "33" * 32, "vocab_size": 50, "lens_norm": "final", "temperature": 1.0}
    assert reader.require(**fits, layers=[4, 2]) == []
    assert reader.require() == []
    with pytest.raises(CacheError) as caught:
        reader.require(**(fits | {"vocab_size": 51, "temperature": 2.0}), layers=[2, 3])
    text = str(caught.value)
    assert "vocab_size: cache has 50, this run has 51" in text
    assert "temperature: cache has 1.0, this run has 2.0" in text
    assert "layers: cache has [2, 4], this run also wants [3]" in text
    assert "tokenizer_digest" not in text
    assert "--allow-mismatch" in text


def test_a_mismatch_can_be_allowed_by_name_but_never_one_of_layers(folder: Path) -> None:
    reader = CacheReader(folder)
    allowed = reader.require(lens_norm="none", temperature=1.0, allow_mismatch=["lens_norm", "temperature"])
    assert allowed == ["lens_norm: cache has 'final', this run has 'none'"]
    with pytest.raises(CacheError, match="layers"):
        reader.require(layers=[3], allow_mismatch=["layers"])
    with pytest.raises(CacheError, match="no such field"):
        reader.require(allow_mismatch=["teacher"])


def test_a_file_beside_the_tokenizers_files_is_refused(tmp_path: Path, cache: Any) -> None:
    folder = cache.write(tmp_path / "cache")
    assert CacheReader(folder).tokenizer_folder == folder / "tokenizer"
    (folder / "tokenizer" / "added_tokens.json").write_text('{"x": 7}')
    with pytest.raises(CacheError, match=r"tokenizer/added_tokens\.json .* Remove it"):
        _ = CacheReader(folder).tokenizer_folder


@pytest.mark.parametrize(
    "name",
    [
        *("manifest.json", "index.arrow", "shards/00000.arrow", "tail_sums.arrow"),
        "tokenizer/tokenizer.json",
    ],
)
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_link_a_pipe_or_a_folder_in_place_of_a_file_is_refused(
    tmp_path: Path, cache: Any, name: str, kind: str
) -> None:
    folder = cache.write(tmp_path / "cache")
    (folder / name).rename(tmp_path / "elsewhere")
    if kind == "link":
        (folder / name).symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).mkdir()
    with pytest.raises(CacheError, match=name.split("/")[-1].replace(".", r"\.")):
        read_everything(folder)


def test_a_linked_folder_of_shards_is_refused(tmp_path: Path, cache: Any) -> None:
    folder = cache.write(tmp_path / "cache")
    (folder / "shards").rename(tmp_path / "elsewhere")
    (folder / "shards").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="no ordinary folder"):
        read_everything(folder)


def read_everything(folder: Path) -> None:
    reader = CacheReader(folder)
    list(reader)
    reader.tail_sums()
    _ = reader.tokenizer_folder


WATCHED: list[str] = []
"""What the audit hook saw while it was watching; None of this is what a reader does."""
_watching = False


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if not _watching:
        return
    is_write = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    forbidden = ("socket.", "subprocess.", "os.system", "os.exec", "os.remove", "os.rename", "pickle.")
    if is_write or event.startswith(forbidden):
        WATCHED.append(f"{event} {args}")


def test_a_reader_writes_nothing_and_opens_no_connection(folder: Path) -> None:
    global _watching
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    sys.addaudithook(_watch)
    _watching = True
    try:
        read_everything(folder)
    finally:
        _watching = False
    assert WATCHED == []
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_the_package_needs_neither_torch_nor_transformers() -> None:
    import subprocess

    code = "import sys, distilllens_cache; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"

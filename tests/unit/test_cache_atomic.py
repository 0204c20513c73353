"""Files appear whole or not at all."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from distilllens_cache import CacheError, atomic

CALLS = ("create", "write", "fsync", "replace", "fsync_folder")


def test_a_file_is_flushed_before_it_gets_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def noted(name: str, original: Any) -> Any:
        def call(*args: Any) -> Any:
            made.append(name)
            assert (tmp_path / "file").exists() == (name == "fsync_folder")
            return original(*args)

        return call

    for name in CALLS:
        monkeypatch.setattr(atomic, name, noted(name, getattr(atomic, name)))
    atomic.write_file(tmp_path / "file", b"whole")
    assert made == list(CALLS)
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "write", lambda handle, data: os.write(handle, data[:3]))
    atomic.write_file(tmp_path / "file", b"more than three bytes")
    assert (tmp_path / "file").read_bytes() == b"more than three bytes"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic.write_file(tmp_path / "file", b"old")

    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "fsync", fail)
    with pytest.raises(CacheError, match=r"no space left for .*file \(3 bytes\)"):
        atomic.write_file(tmp_path / "file", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CacheError, match="could not write"):
            atomic.make_folder(path)

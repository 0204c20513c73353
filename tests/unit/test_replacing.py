"""What was in an output folder is gone once the new has begun, and back where it was if it could not."""

import os
import shutil
from pathlib import Path

import pytest

from distilllens.replacing import HELD, recover, recover_once, replacing


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        os.makedirs((folder / name).parent, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-1" / "model").write_text("old weights")
    (tmp_path / "run" / "metrics").write_text("old")
    (tmp_path / "elsewhere").write_text("not ours")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "run"


def test_what_begins_takes_the_place_of_what_was_there(folder: Path, tmp_path: Path) -> None:
    inode = folder.stat().st_ino
    with replacing(folder):
        assert not (folder / "metrics").exists()
        (folder / "metrics").write_text("new")
    assert contents(folder) == {"metrics": "new"}
    assert folder.stat().st_ino == inode  # it may be a mount point
    assert (tmp_path / "elsewhere").read_text() == "not ours"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_cannot_begin_leaves_what_was_there(folder: Path, error: type[BaseException]) -> None:
    before = contents(folder)

    def begin() -> None:
        with replacing(folder):
            (folder / "metrics").write_text("new")
            (folder / "tracker").mkdir()
            (folder / "tracker" / "events").write_text("new")
            raise error

    with pytest.raises(error):
        begin()
    assert contents(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1", "link", "metrics"]


def test_a_folder_that_was_not_there_is_made(tmp_path: Path) -> None:
    with replacing(tmp_path / "new" / "run"):
        pass
    assert list((tmp_path / "new" / "run").iterdir()) == []


class Killed(BaseException):
    """What a process that is gone doesn't see: nothing runs after it."""


@pytest.mark.parametrize("begins", [True, False])
def test_whoever_is_killed_at_any_touch_of_the_disk_and_again_leaves_the_old_or_the_new(
    begins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call that changes the folder is the last one; then each call of the recovery is."""
    old, new = {"a/model": "old", "b": "old"}, {"b": "new"}
    calls, kill_at = 0, 0

    def counted(touch):
        def call(*arguments, **settings):
            nonlocal calls
            calls += 1
            if kill_at and calls >= kill_at:
                raise Killed
            return touch(*arguments, **settings)

        return call

    for name in ("mkdir", "rename", "unlink", "rmdir"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    monkeypatch.setattr("shutil.rmtree", counted(shutil.rmtree))

    def run(work, at: int) -> bool:
        nonlocal calls, kill_at
        calls, kill_at = 0, at
        try:
            work()
        except (Killed, ZeroDivisionError):
            return True
        finally:
            kill_at = 0
        return False

    for first in range(1, 40):
        for second in range(1, 20):
            folder = tmp_path / f"{first}-{second}"
            write(folder, old)

            def replace(folder: Path = folder) -> None:
                with replacing(folder):
                    write(folder, new)
                    assert begins or 1 / 0

            was_killed = run(replace, first)
            again = run(lambda folder=folder: recover(folder), second)
            recover(folder)
            found = contents(folder)
            assert found in (old, new)
            assert begins or found == old
            assert not any("tmp" in path.name for path in folder.iterdir())
            if not again:
                break
        if begins and not was_killed:
            assert found == new
            return
    assert not begins


def test_other_ranks_wait_for_the_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)
    recover_once(folder, rank=1)
    (folder / HELD).mkdir()
    for path in list(folder.iterdir()):
        if path.name != HELD:
            path.rename(folder / HELD / path.name)
    (folder / "metrics").write_text("new")
    monkeypatch.setattr("time.sleep", lambda seconds: recover_once(folder, rank=0))
    recover_once(folder, rank=1)
    assert contents(folder) == before
    (folder / HELD).mkdir()
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("distilllens.replacing.SECONDS_TO_WAIT", 0.0)
    with pytest.raises(ValueError, match="of a run that was killed"):
        recover_once(folder, rank=1)

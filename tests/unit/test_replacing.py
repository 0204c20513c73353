"""What was in an output folder is gone once the new has begun, and back where it was if it could not."""

from pathlib import Path

import pytest

from distilllens.replacing import replacing


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


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

"""An output folder cleared for what is about to begin, and filled again if it cannot."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MOVING, HELD, DROPPED = "moving.tmp-replaced", "held.tmp-replaced", "dropped.tmp-replaced"
"""Names in the folder of what it held: while that is moved, in or out; while the new begins; while it is removed. They
tell how far somebody came who was killed."""
SECONDS_TO_WAIT = 60.0


@contextmanager
def replacing(folder: Path) -> Iterator[None]:
    """Within, ``folder`` is there and as if empty. What it held is removed afterwards, or back after an error.

    It is kept inside: ``folder`` may be a mount point. What somebody leaves who is killed within, `recover` puts back.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
    moving, held = folder / MOVING, list(folder.iterdir())
    moving.mkdir()
    try:
        for path in held:
            path.rename(moving / path.name)
        moving.rename(folder / HELD)
        yield
        (folder / HELD).rename(folder / DROPPED)
    finally:
        recover(folder)


def recover(folder: Path) -> None:
    """End a replacement that was broken off: what ``folder`` held is back unless the new had begun, and then gone."""
    held, moving, dropped = folder / HELD, folder / MOVING, folder / DROPPED
    if held.is_dir():
        for path in folder.iterdir():
            if path != held:
                _remove(path)
        held.rename(moving)
    if moving.is_dir():
        for path in moving.iterdir():
            path.rename(folder / path.name)
        moving.rmdir()
    if dropped.is_dir():
        shutil.rmtree(dropped)


def recover_once(folder: Path, *, rank: int) -> None:
    """`recover`, by rank 0 alone; the other ranks return once it is done."""
    if rank == 0:
        recover(folder)
        return
    until = time.monotonic() + SECONDS_TO_WAIT
    while left := [name for name in (MOVING, HELD, DROPPED) if (folder / name).is_dir()]:
        if time.monotonic() > until:
            raise ValueError(f"{folder} still holds {left[0]}, of a run that was killed: start the first rank again")
        time.sleep(0.1)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()

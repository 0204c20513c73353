"""An output folder cleared for what is about to begin, and filled again if it cannot."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(folder: Path) -> Iterator[None]:
    """Within, ``folder`` is there and as if empty. What it held is removed afterwards, or back after an error.

    It is kept inside: ``folder`` may be a mount point. Whoever is killed within leaves it in ``replaced.tmp-...``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = list(folder.iterdir())
    aside = Path(tempfile.mkdtemp(prefix="replaced.tmp-", dir=folder))
    try:
        for path in held:
            path.rename(aside / path.name)
        yield
    except BaseException:
        for path in folder.iterdir():
            if path != aside:
                _remove(path)
        for path in aside.iterdir():
            path.rename(folder / path.name)
        raise
    finally:
        shutil.rmtree(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()

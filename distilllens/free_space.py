"""Whether what is to be written fits on the disk."""

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal


class NoSpaceError(ValueError):
    """It cannot fit. Ends a command with exit code 3."""


@dataclass(frozen=True)
class Space:
    """The room that there is for an output folder."""

    parent: Path
    """The folder itself, or the nearest one above it that exists."""
    free: int
    """Bytes free on its disk."""
    present: int
    """Bytes that the output folder holds already, which a run that continues does not write again. Negative where more
    than the output has to come there: a remote cache that is added to."""

    def fits(self, num_bytes: float) -> bool:
        """Whether an output of ``num_bytes`` in all has room."""
        return num_bytes <= self.free + self.present

    def require(self, num_bytes: float) -> None:
        """`NoSpaceError` unless an output of ``num_bytes`` in all has room."""
        if not self.fits(num_bytes):
            held = f" and holds {decimal(self.present)} of it" if self.present > 0 else ""
            raise NoSpaceError(
                f"the cache needs about {decimal(int(num_bytes))}, and {self.parent} has {decimal(self.free)} free"
                f"{held}: give another --output-dir (for a URL, another --staging-dir), a smaller --top-k, fewer "
                f"--layers or a --limit"
            )


def space_for(folder: Path) -> Space:
    """The room for an output in ``folder``, which need not exist."""
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    present = folder_size(folder) if folder.is_dir() else 0
    return Space(parent, shutil.disk_usage(parent).free, present)


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder, in which others may be at work."""
    size = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            size += file.stat().st_size if file.is_file() else 0
    return size

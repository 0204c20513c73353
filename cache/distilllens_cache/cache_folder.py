"""Where a cache lies: an ordinary folder, or a remote one that is read through a spool."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from distilllens_cache import files, layout
from distilllens_cache.errors import CacheError
from distilllens_cache.manifest import FileRecord
from distilllens_cache.remote_folder import RemoteFolder
from distilllens_cache.spool import Spool


class CacheFolder(Protocol):
    """A place that a cache's files are read from. Its ``str`` is what the user called it."""

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        ...

    def require(self) -> None:
        """`CacheError` unless the folder is there."""
        ...

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """The bytes of a file without a record; `CacheError` if it has more than ``max_bytes``."""
        ...

    def read_recorded(self, record: FileRecord, *, max_bytes: int) -> bytes:
        """The bytes of a file that has exactly the size and the digest of its record; `CacheError` otherwise."""
        ...

    def tokenizer(self, records: Sequence[FileRecord]) -> Path:
        """A local folder with the tokenizer's files, each digested, and with nothing beside them."""
        ...


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine. No link in it is followed."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def exists(self, name: str) -> bool:
        return (self.path / name).is_file()

    def require(self) -> None:
        if not self.path.is_dir():
            raise CacheError(f"{self} is not a folder. A cache is a folder that `distilllens cache-teacher` made.")

    def read(self, name: str, *, max_bytes: int) -> bytes:
        return files.read_plain(self.path, name, max_bytes=max_bytes)

    def read_recorded(self, record: FileRecord, *, max_bytes: int) -> bytes:
        return files.read_recorded(self.path, record, max_bytes=max_bytes)

    def tokenizer(self, records: Sequence[FileRecord]) -> Path:
        for record in records:
            self.read_recorded(record, max_bytes=layout.MAX_FILE_BYTES)
        path = self.path / layout.TOKENIZER
        known = {record.name for record in records}
        for found in sorted(path.rglob("*")):
            name = found.relative_to(self.path).as_posix()
            if name not in known and (found.is_symlink() or not found.is_dir()):
                raise CacheError(
                    f"{name} in {self} is not part of the cache and could change its tokenizer. Remove it."
                )
        return path


def open_folder(location: Path | str | CacheFolder, *, spool: Spool | None = None) -> CacheFolder:
    """The folder at ``location``: a path, or a URL of fsspec such as ``s3://bucket/cache``, read through ``spool``."""
    if isinstance(location, Path):
        return LocalFolder(location)
    if not isinstance(location, str):
        return location
    return RemoteFolder(location, spool or Spool()) if is_remote(location) else LocalFolder(Path(location))


def is_remote(location: Path | str) -> bool:
    """Whether ``location`` is a URL. ``file://`` is one too, and is read through a spool like any other."""
    return "://" in str(location)

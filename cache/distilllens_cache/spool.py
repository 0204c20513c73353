"""The spool: verified local copies of remote files, bounded, shared by processes, the least recently used go first."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from distilllens_cache import atomic, layout
from distilllens_cache.errors import CacheError
from distilllens_cache.files import read_recorded
from distilllens_cache.manifest import FileRecord

DEFAULT_BYTES = 64 << 30
"""Bytes that a spool holds unless told otherwise."""


def choose_spool(folder: Path | None, max_bytes: int | None) -> "Spool":
    """The spool that a user's options name; None leaves the default."""
    return Spool(folder or default_folder(), max_bytes or DEFAULT_BYTES)


def default_folder() -> Path:
    """The spool in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distilllens" / "spool"


@dataclass(frozen=True)
class Spool:
    """Files by their digest, whatever cache they belong to, so that several caches share one bound.

    Processes may share a spool: of those that want one file at a time, one fetches it. Every copy is digested again
    when it is read, and replaced where it was damaged.
    """

    folder: Path = field(default_factory=default_folder)
    max_bytes: int = DEFAULT_BYTES
    """Most bytes of all files together. A larger file is not kept."""

    def read(self, record: FileRecord, fetch: Callable[[], bytes]) -> bytes:
        """The bytes of a recorded file: from the spool, or from ``fetch``, which gives sound bytes or raises."""
        local = FileRecord(name=f"files/{record.sha256}", size=record.size, sha256=record.sha256)
        found = self._find(local)
        if found is not None:
            return found
        with self._locked(f"fetch-{record.sha256[:2]}"):
            found = self._find(local)  # another process may have fetched it meanwhile
            if found is None:
                found = fetch()
                self._keep(local, found)
        return found

    def unpack(self, records: list[FileRecord], read: Callable[[FileRecord], bytes], *, below: str) -> Path:
        """A folder that holds these files and nothing else; their names lie ``below`` a folder, which is left out."""
        names = "\n".join(f"{record.name} {record.sha256}" for record in records)
        folder = self.folder / "folders" / hashlib.sha256(names.encode()).hexdigest()
        with self._locked("folders"):
            for record in records:
                path = folder / record.name.removeprefix(f"{below}/")
                data = read(record)
                if not path.is_file() or path.is_symlink() or path.read_bytes() != data:
                    self._write(path, data)
        return folder

    def _find(self, local: FileRecord) -> bytes | None:
        try:
            data = read_recorded(self.folder, local, max_bytes=layout.MAX_FILE_BYTES)
        except CacheError:
            return None  # absent, or damaged here: to be fetched
        with suppress(OSError):  # another process may have dropped it meanwhile
            os.utime(self.folder / local.name)
        return data

    def _keep(self, local: FileRecord, data: bytes) -> None:
        if local.size > self.max_bytes:
            return
        path = self.folder / local.name
        with self._locked("keep"):
            self._make_room(local.size, instead_of=path)
            self._write(path, data)

    def _make_room(self, num_bytes: int, *, instead_of: Path) -> None:
        """Drop the files used longest ago until ``num_bytes`` more are within the bound."""
        kept = []
        for path in (self.folder / "files").glob("*"):
            with suppress(FileNotFoundError):
                state = path.lstat()
                kept.append((state.st_mtime_ns, state.st_size, path))
        free = self.max_bytes - num_bytes - sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            is_half = layout.TEMPORARY.fullmatch(path.name) is not None  # of a process that was killed
            if free < 0 or is_half or path == instead_of:
                atomic.remove(path)
                free += size

    def _write(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_file(path, data)
        except (OSError, CacheError) as error:
            raise self._explain(error) from None

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold one of the spool's locks, against other processes and other threads; the system frees it on a crash."""
        path = self.folder / "locks" / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._explain(error) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _explain(self, error: Exception) -> CacheError:
        cause = error.__cause__ if isinstance(error, CacheError) else error
        reason = getattr(cause, "strerror", None) or str(error)
        return CacheError(
            f"the spool {self.folder} cannot be written: {reason}. "
            f"Give another --spool-dir, or a smaller --spool-bytes."
        )

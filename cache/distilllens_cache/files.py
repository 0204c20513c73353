"""Files read as their record promises: size and digest are compared before anyone parses them."""

import hashlib
import os
import stat
from pathlib import Path

from distilllens_cache.errors import REPAIR, CacheError
from distilllens_cache.layout import is_safe_name
from distilllens_cache.manifest import FileRecord


def record_of(name: str, data: bytes | memoryview) -> FileRecord:
    """The record of a file called ``name`` that holds ``data``."""
    return FileRecord(name=name, size=memoryview(data).nbytes, sha256=hashlib.sha256(data).hexdigest())


def read_recorded(folder: Path, record: FileRecord, *, max_bytes: int) -> bytes:
    """The bytes of a file that has exactly the size and the digest of its record; `CacheError` otherwise."""
    if record.size > max_bytes:
        raise CacheError(
            f"{record.name} in {folder} is said to have {record.size} bytes; at most {max_bytes} are read. "
            f"This is no cache of ours."
        )
    data = read_plain(folder, record.name, max_bytes=record.size)
    check_recorded(data, record, where=folder)
    return data


def check_recorded(data: bytes, record: FileRecord, *, where: object) -> None:
    """`CacheError` unless the bytes of a file, found ``where``, have the size and the digest of its record."""
    if len(data) != record.size:
        raise CacheError(f"{record.name} in {where} has {len(data)} bytes, its record says {record.size}. {REPAIR}")
    found = hashlib.sha256(data).hexdigest()
    if found != record.sha256:
        raise CacheError(
            f"{record.name} in {where} is damaged: its bytes have the sha256 {found[:12]}…, its record says "
            f"{record.sha256[:12]}…. {REPAIR}"
        )


def read_plain(folder: Path, name: str, *, max_bytes: int) -> bytes:
    """The bytes of an ordinary file below ``folder``. No link is followed, no pipe awaited, no giant read."""
    if not is_safe_name(name):
        raise CacheError(f"{name[:80]!r} is no name of a file in a cache.")
    path = folder / name
    try:
        for parent in path.relative_to(folder).parents:
            if not stat.S_ISDIR(os.stat(folder / parent, follow_symlinks=parent == Path()).st_mode):
                raise CacheError(f"{parent} in {folder} is no ordinary folder; a cache has no links in it.")
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(handle, "rb") as file:
            state = os.fstat(handle)
            if not stat.S_ISREG(state.st_mode):
                raise CacheError(f"{name} in {folder} is no ordinary file.")
            if state.st_size > max_bytes:
                raise CacheError(
                    f"{name} in {folder} has {state.st_size} bytes, expected are at most {max_bytes}. {REPAIR}"
                )
            return file.read(max_bytes + 1)
    except FileNotFoundError:
        raise CacheError(f"{name} is missing in {folder}. {REPAIR}") from None
    except OSError as error:
        if path.is_symlink():
            raise CacheError(f"{name} in {folder} is a link; a cache has no links in it.") from None
        raise CacheError(f"{name} in {folder} could not be read: {error.strerror}.") from error

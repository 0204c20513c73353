"""Files that appear whole or not at all."""

import errno
import fcntl
import os
import secrets
from pathlib import Path

from distilllens_cache.errors import CacheError

NO_SPACE = {"ENOSPC", "EDQUOT", "EFBIG"}


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Put ``data`` at ``path``: under a temporary name, flushed, renamed, and the folder flushed too.

    A process killed at any moment leaves the old file, or none, or the new one; at worst a file
    `NAME.tmp-NUMBER` beside it. A failing system call becomes a `CacheError`.
    """
    # Two hosts may write one file at once, and their processes may have one number.
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}{secrets.randbelow(10**9):09d}")
    try:
        handle = create(temporary)
        try:
            rest = memoryview(data).cast("B")
            while len(rest):
                rest = rest[write(handle, rest) :]
            fsync(handle)
        finally:
            os.close(handle)
        replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        remove(temporary)
        raise explain(error, path, len(data)) from error


def make_folder(path: Path) -> None:
    """Make ``path`` and its parents, durably. An existing folder is fine."""
    if path.is_dir():
        return
    try:
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        fsync_folder(path.parent)
    except OSError as error:
        raise explain(error, path, 0) from error


def remove(path: Path) -> None:
    """Delete the file or link ``path`` if it is there."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CacheError(f"could not delete {path}: {error.strerror}. Check who owns the folder.") from error


def explain(error: OSError, path: Path, num_bytes: int) -> CacheError:
    """What a failed write means for the user."""
    code = errno.errorcode.get(error.errno or 0, "?")
    reason = error.strerror or str(error)
    if code in NO_SPACE:
        return CacheError(
            f"no space left for {path} ({num_bytes} bytes): {reason}. Make room and run the same command "
            f"again: finished shards are kept, and it continues after them."
        )
    return CacheError(
        f"could not write {path}: {reason} ({code}). Repair that and run the same command again: finished "
        f"shards are kept."
    )


# Each system call has a name of its own here, so that tests can fail or kill the N-th one.


def create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o666)


def write(handle: int, data: memoryview) -> int:
    return os.write(handle, data[: 1 << 24])


def fsync(handle: int) -> None:
    os.fsync(handle)


def replace(source: Path, target: Path) -> None:
    os.replace(source, target)


def fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)


def lock(handle: int) -> None:
    fcntl.flock(handle, fcntl.LOCK_EX)


def try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock of the file ``path``. Asking keeps nobody from taking it for long."""
    handle = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one called ``path``."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    opened = os.fstat(handle)
    return (found.st_dev, found.st_ino) == (opened.st_dev, opened.st_ino)


def touch(handle: int) -> None:
    os.utime(handle)

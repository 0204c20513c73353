"""An audit hook: what readers of caches must never do, caught while they read."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

NEVER = (
    *("exec compile marshal.loads pickle.find_class code.__new__ import ctypes. subprocess. socket. urllib.".split()),
    *("os.system os.exec os.posix_spawn os.spawn os.fork os.rename os.remove os.mkdir os.rmdir os.link".split()),
    *("os.symlink os.truncate os.chmod os.chown os.utime os.chdir shutil. webbrowser. http. ftplib.".split()),
)
"""Audit events by how their names begin."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Collects what this process does within ``with`` blocks beyond reading files of ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.seen: list[str] = []
        self.opened = 0
        self._folder = os.fspath(folder.resolve())
        self._is_on = False
        sys.addaudithook(self._hook)  # for good: a hook cannot be taken away

    def __enter__(self) -> "Watch":
        self.seen, self._is_on = [], True
        return self

    def __exit__(self, *_: object) -> None:
        self._is_on = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_on:
            return
        if event == "open":
            path, mode, flags = arguments
            self.opened += 1
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & _WRITING:
                self.seen.append(f"opened {path} to write")
            elif not isinstance(path, int) and not os.path.abspath(os.fsdecode(path)).startswith(self._folder):
                self.seen.append(f"opened {path}, outside the cache")
        elif event.startswith(NEVER):
            self.seen.append(f"{event}{str(arguments)[:200]}")


def catches(folder: Path) -> bool:
    """Whether a watch sees code run, a file written and one opened outside: a hook that sees nothing proves nothing."""
    watch = Watch(folder)
    with watch, tempfile.TemporaryFile() as file:
        exec("1 + 1")
        file.write(b"x")
        Path("/dev/null").read_bytes()
    return all(any(word in seen for seen in watch.seen) for word in ("exec", "to write", "outside"))

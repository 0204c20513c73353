"""The system calls of a writer: counted, and one of them made fatal or failing."""

import errno
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

NAMES = ("open", "write", "fsync", "replace", "mkdir", "unlink", "rename", "link", "ftruncate")
"""Functions of `os` that writers use. Reads through `os.open` are among them."""

Moment = Literal["before", "after", "half"]
MOMENTS: tuple[Moment, ...] = ("before", "after", "half")
FAILURES = (
    *(("ENOSPC", False), ("EIO", False), ("EINTR", False), ("EACCES", False), ("short", False)),
    *(("ENOSPC", True), ("EIO", True)),
)
"""Errors of the n-th call, and whether all that follow fail too. "short" is a write that takes only half."""


@dataclass
class Calls:
    """From `install` on, every system call of this process goes through here. Only for a child: nothing is put back."""

    act: Callable[["Calls", str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
    count: int = 0

    def install(self) -> "Calls":
        for name in NAMES:
            setattr(os, name, self._wrap(name, getattr(os, name)))
        return self

    def _wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            return self.act(self, name, call, arguments, options)

        return counted


def counting() -> Calls:
    """Counts calls and changes none."""
    return Calls(lambda calls, name, call, arguments, options: call(*arguments, **options))


def killing(nth: int, moment: Moment) -> Calls:
    """SIGKILL at the n-th call: before it, after it, or in the middle of a write."""

    def act(calls: Calls, name: str, call: Callable[..., Any], arguments: Any, options: Any) -> Any:
        if calls.count != nth:
            return call(*arguments, **options)
        if moment == "after":
            call(*arguments, **options)
        elif moment == "half" and name == "write":
            call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
        return os.kill(os.getpid(), signal.SIGKILL)

    return Calls(act)


def failing(nth: int, error: str, *, for_good: bool = False) -> Calls:
    """The n-th call, or every one from the n-th on, fails with ``error``."""

    def act(calls: Calls, name: str, call: Callable[..., Any], arguments: Any, options: Any) -> Any:
        if calls.count < nth or (calls.count > nth and not for_good):
            return call(*arguments, **options)
        if error == "short":
            if name == "write" and len(arguments[1]) > 1:
                return call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            return call(*arguments, **options)
        if error == "ENOSPC" and name == "unlink":  # a full disk lets go of files
            return call(*arguments, **options)
        code = getattr(errno, error)
        raise OSError(code, os.strerror(code), arguments[0] if isinstance(arguments[0], str | os.PathLike) else None)

    return Calls(act)

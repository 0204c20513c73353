"""Something done in a process of its own, which may be killed at any moment."""

import os
import signal
import time
import traceback
from collections.abc import Callable
from typing import Literal, NamedTuple

from distilllens_cache import CacheError

_report = os.write
"""As it was before somebody made it fail."""


class Ended(NamedTuple):
    """How a process ended."""

    how: Literal["done", "refused", "raised", "killed"]
    text: str = ""
    """What it said: the `CacheError` that it was refused with, or the trace of another exception."""


def in_child(work: Callable[[], object], *, kill_after: float | None = None) -> Ended:
    """Do ``work`` in a child; after ``kill_after`` seconds it gets SIGKILL, if it lives so long."""
    return wait_for(start(work), kill_after=kill_after)


def start(work: Callable[[], object]) -> tuple[int, int]:
    """Begin ``work`` in a child: its process id, and the pipe that it reports on."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    try:
        os.close(read)
        try:
            work()
            message = "done\n"
        except CacheError as error:
            message = f"refused\n{error}"
        except BaseException:
            message = f"raised\n{traceback.format_exc()[-1500:]}"
        _report(write, message.encode())
    finally:
        os._exit(0)


def wait_for(started: tuple[int, int], *, kill_after: float | None = None) -> Ended:
    """How a child ended."""
    pid, pipe = started
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    with open(pipe, "rb") as file:
        message = file.read().decode()
    _, status = os.waitpid(pid, 0)
    if not message:
        is_ours = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        return Ended("killed") if is_ours else Ended("raised", f"it ended with status {status} and said nothing")
    how, text = message.split("\n", 1)
    assert how in ("done", "refused", "raised")
    return Ended(how, text)

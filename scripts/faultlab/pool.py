"""Trials in limited child processes: one that dies, hangs or eats memory is an outcome, not the end of the run."""

import json
import math
import os
import resource
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from faultlab.outcome import Outcome, Tally

Trial = Callable[[int], Outcome]

TRIALS_PER_CHILD = 2000
"""A child is replaced after so many, so that its memory means something."""
MEMORY_MB = 768
"""What a child may allocate beyond what it starts with."""


@dataclass
class _Child:
    pid: int
    pipe: int
    left: list[int]
    """Trials it still has to report."""
    since: float
    """When it last reported one."""
    rest: bytes = b""


def run(
    trial: Trial,
    numbers: Sequence[int],
    *,
    workers: int = 1,
    memory_mb: int = MEMORY_MB,
    seconds: float = 120,
    until: float = math.inf,
    progress: Callable[[int], None] | None = None,
) -> Tally:
    """Run ``trial(number)`` for all ``numbers`` in ``workers`` processes at a time, each within memory and time.

    A child that dies is a fault of the trial it was at, as is one that reports nothing for ``seconds``. No trial
    starts after ``until``, a time of `time.monotonic`.
    """
    tally = Tally()
    parts = max(min(workers, len(numbers)), -(-len(numbers) // TRIALS_PER_CHILD))
    waiting = [list(numbers[part::parts]) for part in range(parts)]
    with selectors.DefaultSelector() as selector:
        running: dict[int, _Child] = {}

        def start(numbers: list[int]) -> None:
            child = _fork(trial, numbers, memory_mb, until)
            running[child.pipe] = child
            selector.register(child.pipe, selectors.EVENT_READ)

        def end(child: _Child, why: str = "") -> None:
            selector.unregister(child.pipe)
            os.close(child.pipe)
            del running[child.pipe]
            _, status = os.waitpid(child.pid, 0)
            if child.left and (status or why):
                died = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {status >> 8}"
                number = child.left.pop(0)
                tally.add(Outcome("crashed", why or died), f"trial {number}", time.monotonic() - child.since)
                if child.left:
                    waiting.append(child.left)

        while waiting or running:
            if time.monotonic() > until:
                waiting.clear()
            while waiting and len(running) < workers:
                start(waiting.pop())
            for key, _ in selector.select(timeout=1):
                child = running[key.fd]
                data = os.read(child.pipe, 1 << 16)
                if not data:
                    end(child)
                    continue
                *lines, child.rest = (child.rest + data).split(b"\n")
                for line in lines:
                    what, fault, took, peak = json.loads(line)
                    tally.add(Outcome(what, fault), f"trial {child.left.pop(0)}", took)
                    tally.peak_mb = max(tally.peak_mb, peak)
                    child.since = time.monotonic()
                if progress is not None:
                    progress(tally.trials)
            for child in list(running.values()):
                if time.monotonic() - child.since > seconds:
                    os.kill(child.pid, signal.SIGKILL)
                    end(child, f"nothing heard for {seconds:.0f} s")
    return tally


def _fork(trial: Trial, numbers: list[int], memory_mb: int, until: float) -> _Child:
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(write)
        return _Child(pid, read, list(numbers), time.monotonic())
    code = 70
    try:
        os.close(read)
        _limit_memory(memory_mb)
        for number in numbers:
            started = time.monotonic()
            if started > until:
                break
            try:
                outcome = trial(number)
            except Exception as error:
                outcome = Outcome("raised", f"{error!r} at {_place(error)}")
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            _send(write, [*outcome, time.monotonic() - started, peak])
        code = 0
    finally:
        os._exit(code)


def _send(pipe: int, message: Any) -> None:
    data = memoryview(json.dumps(message).encode() + b"\n")
    while len(data):
        data = data[os.write(pipe, data) :]


def _limit_memory(memory_mb: int) -> None:
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    most = pages * resource.getpagesize() + (memory_mb << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _place(error: BaseException) -> str:
    return " < ".join(f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[:-4:-1])

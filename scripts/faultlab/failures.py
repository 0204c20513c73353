"""System calls that fail, and disks that are full."""

import ctypes
import os
import resource
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from faultlab.child import Ended, in_child
from faultlab.outcome import Outcome
from faultlab.system_calls import FAILURES, failing
from faultlab.writing import STARTS, Refusals, Start


@dataclass
class FailingCalls(Refusals):
    """The N-th call fails, once or with all that follow, for N = 1, 2, … until a run is clean.

    Trial n is the n-th of all points, which come in the order of `points`.
    """

    @cached_property
    def points(self) -> list[tuple[Start, int, str, bool]]:
        return [
            (start, nth, error, for_good)
            for start in STARTS
            for nth in range(1, self.count_calls(start) + 2)
            for error, for_good in FAILURES
        ]

    def __call__(self, number: int) -> Outcome:
        start, nth, error, for_good = self.points[number % len(self.points)]
        folder = self.folder(start)

        def work() -> None:
            failing(nth, error, for_good=for_good).install()
            self.write(folder, start)

        return self.outcome(in_child(work), folder, start)


@dataclass
class SmallFiles(Refusals):
    """No file may grow beyond a limit: RLIMIT_FSIZE at evenly spread sizes, then without."""

    trials: int = 20

    def __call__(self, number: int) -> Outcome:
        most = max(map(len, self.wanted.values()))
        folder = self.folder()

        def work() -> None:
            limit = most * (number + 1) // (self.trials + 1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            self.material.write(folder)

        return self.outcome(in_child(work), folder)


@dataclass
class FullDisks(Refusals):
    """A tmpfs that is too small by more or less, then made larger."""

    trials: int = 20

    def __call__(self, number: int) -> Outcome:
        page = resource.getpagesize()
        size = sum(-(-len(data) // page) * page for data in self.wanted.values())
        folder = self.folder()
        folder.parent.joinpath("disk").mkdir()
        disk = folder.parent / "disk"
        small = max(page, size * (number + 1) // (self.trials + 1))
        refused: list[Ended] = []

        def work() -> None:
            mount(disk, small)
            ended = in_child(lambda: self.material.write(disk / "cache"))
            refused.append(ended)
            assert ended.how in ("refused", "done"), ended.text
            assert ended.how == "done" or "no space left" in ended.text, ended.text
            assert not self.between(disk / "cache")
            mount(disk, 4 * size + (1 << 20), again=True)
            self.material.write(disk / "cache")
            if fault := self.difference(disk / "cache"):
                raise AssertionError(fault)
            raise SystemExit(ended.how)

        ended = in_child(work)
        text = ended.text.strip().splitlines()[-1] if ended.text else ""
        how = text.removeprefix("SystemExit: ")
        return Outcome(how) if text.startswith("SystemExit: ") else Outcome("raised", ended.text)


def mount(folder: Path, size: int, *, again: bool = False) -> None:
    """A tmpfs of ``size`` bytes at ``folder``, seen by this process alone; or the one there made larger."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not again:
        user = os.geteuid() != 0
        _check(libc.unshare(0x00020000 | (0x10000000 if user else 0)))  # CLONE_NEWNS, CLONE_NEWUSER
        _check(libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None))  # MS_REC | MS_PRIVATE
    options = f"size={size}".encode()
    _check(libc.mount(b"none", os.fsencode(folder), b"tmpfs", 32 if again else 0, options))  # MS_REMOUNT


def _check(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise PermissionError(code, f"this process may not mount: {os.strerror(code)}")


def may_mount(scratch: Path) -> bool:
    """Whether this process may mount a disk for itself."""
    return in_child(lambda: mount(scratch, 1 << 20)).how == "done"

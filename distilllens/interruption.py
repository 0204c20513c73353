"""Ctrl-C and SIGTERM, held back until a step is done, so that what is saved is always a whole step."""

import signal
from types import FrameType
from typing import Any


class Interruption:
    """While entered, the first signal only sets ``asked``; a second one interrupts at once.

    Under a launcher it doesn't: a terminal's Ctrl-C reaches each rank and the launcher, which passes it on once more.
    """

    def __init__(self, *, has_launcher: bool = False) -> None:
        self.asked = False
        self._has_launcher = has_launcher
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and not self._has_launcher:
            raise KeyboardInterrupt
        self.asked = True

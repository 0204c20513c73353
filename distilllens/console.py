"""What a command says: beside its results on stderr, once, from the main rank; and how it counts."""

import os
import sys


def say(text: str) -> None:
    """Print ``text`` on stderr, unless it is empty or another rank speaks."""
    if text and int(os.environ.get("RANK", "0")) == 0:
        print(text, file=sys.stderr, flush=True)


def counted(number: int, noun: str) -> str:
    """A number of things, as ``1 file`` or ``2 files``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"

"""What a command says beside its results: on stderr, once, from the main rank."""

import os
import sys


def say(text: str) -> None:
    """Print ``text`` on stderr, unless it is empty or another rank speaks."""
    if text and int(os.environ.get("RANK", "0")) == 0:
        print(text, file=sys.stderr, flush=True)

"""Where results go: a console on stdout, JSON for machines, numbers as people read them."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console, RenderableType

UNBOUNDED_WIDTH = 10_000
"""Columns of a console that writes to a file or a pipe: lines are left whole."""


def make_console() -> Console:
    """A console on stdout: as wide as the terminal, or without line breaks of its own where there is none."""
    _never_fail_on_a_character()
    console = Console(file=sys.stdout, highlight=False, emoji=False, markup=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = UNBOUNDED_WIDTH
    return console


def has_colour(console: Console) -> bool:
    """False for a pipe, a dumb terminal and where NO_COLOR is set: marks have to do what colours would."""
    return console.is_terminal and console.color_system is not None and not console.no_color


def put(console: Console, renderable: RenderableType) -> None:
    """Print a table without the blanks that fill its lines up to the width."""
    with console.capture() as captured:
        console.print(renderable)
    for line in captured.get().splitlines():
        console.file.write(f"{line.rstrip()}\n")


def print_json(content: Mapping[str, Any]) -> None:
    """One JSON object on stdout, the same bytes for the same content."""
    print(json.dumps(content, indent=2, ensure_ascii=True, allow_nan=False))


def bytes_text(count: float) -> str:
    """A number of bytes in the largest fitting unit: 812 B, 4.1 KiB, 512 MiB."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}" if count < 100 else f"{count:.0f} {unit}"
    return f"{count / 1024:,.1f} TiB"


def probability_text(value: float) -> str:
    """A probability with three decimals; what would round to 0.000 is shown as <0.001."""
    return "<0.001" if 0 < value < 0.0005 else f"{value:.3f}"


def _never_fail_on_a_character() -> None:
    """A terminal in an old encoding shows \\uXXXX for what it has no sign for, instead of a traceback."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")

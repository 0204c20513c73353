"""The colour scale of the heat map: probability of the true next token, in eight steps, for both themes.

The steps are even in OKLCH lightness and change one way only, so that their order survives grey print and
every form of colour blindness. Each step has its own text colour with a contrast of at least 4.5 to 1.
"""

from bisect import bisect_right
from dataclasses import dataclass

EDGES = (0.001, 0.01, 0.05, 0.15, 0.35, 0.6, 0.85)
"""Probabilities at which one step ends and the next begins. Denser near 0, where early layers are."""


@dataclass(frozen=True)
class Step:
    """One colour of the scale with the text colour that is readable on it."""

    background: str
    text: str


_INK, _PAPER = "#10151c", "#ffffff"
LIGHT = (
    Step("#eef9fc", _INK),
    Step("#c1e2ee", _INK),
    Step("#96cae2", _INK),
    Step("#70b0d6", _INK),
    Step("#4f95c8", _INK),
    Step("#357ab8", _PAPER),
    Step("#255ea4", _PAPER),
    Step("#1d438c", _PAPER),
)
_NIGHT, _MOON = "#0b1016", "#f2f5f8"
DARK = (
    Step("#1b212a", _MOON),
    Step("#27374b", _MOON),
    Step("#2e516c", _MOON),
    Step("#306d8c", _MOON),
    Step("#318ba9", _NIGHT),
    Step("#36aac1", _NIGHT),
    Step("#47c9d6", _NIGHT),
    Step("#65e9e8", _NIGHT),
)


def step_of(probability: float) -> int:
    """The number of the step that a probability falls in, 0 to 7."""
    return bisect_right(EDGES, probability)


def step_labels() -> list[str]:
    """Where each step begins, from the least likely: "<0.001", "0.001", "0.01", …"""
    return [f"<{EDGES[0]:g}", *(f"{edge:g}" for edge in EDGES)]

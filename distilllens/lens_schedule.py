"""The weight of the lens over a run: a pure function of the step, so a resumed run has nothing to restore."""

import math

SCHEDULES = ("constant", "linear", "cosine", "warm-off")
DEFAULT_WARM_SHARE = 0.5
"""Share of the steps after which ``warm-off`` turns the lens off."""


def parse_schedule(text: str) -> tuple[str, float]:
    """Name and share of the steps that ``constant``, ``linear``, ``cosine`` or ``warm-off[:share]`` means."""
    name, _, share = text.strip().partition(":")
    if name not in SCHEDULES or (share and name != "warm-off"):
        raise ValueError(f"{text!r} is not a schedule: expected {', '.join(SCHEDULES)}, or a share as in warm-off:0.3")
    try:
        value = float(share) if share else DEFAULT_WARM_SHARE
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise ValueError(f"{text!r}: warm-off takes a share of the steps between 0 and 1, as in warm-off:0.3")
    return name, value


def lens_factor(schedule: str, *, step: int, num_steps: int) -> float:
    """What the lens weight is multiplied with in optimizer step ``step`` (from 0) of ``num_steps``.

    With t = step / num_steps: ``constant`` is 1, ``linear`` 1 - t, ``cosine`` (1 + cos(pi t)) / 2, and
    ``warm-off:share`` 1 while t < share, then 0.
    """
    name, share = parse_schedule(schedule)
    t = step / num_steps
    match name:
        case "linear":
            return 1 - t
        case "cosine":
            return (1 + math.cos(math.pi * t)) / 2
        case "warm-off":
            return float(t < share)
        case _:
            return 1.0

"""The curves of a run as charts: what is drawn where, in the units of the picture."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from distilllens_inspect.run_files import Points, RunFiles

WIDTH, HEIGHT = 480, 200
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 24
MOST_POINTS = 240
"""Points drawn of one curve."""
MOST_DOTS = 60
"""Points that are marked, and say their value when they are pointed at."""
COLOURS = 6
CACHE = "(?:(.+)/)?"
"""In a name, the cache that a value is of, where a run has several teachers."""


@dataclass(frozen=True)
class Dot:
    """A marked point."""

    x: str
    y: str
    text: str


@dataclass(frozen=True)
class Curve:
    """One name's values."""

    name: str
    style: str
    """Classes of the line."""
    points: str
    """What an SVG polyline takes."""
    dots: tuple[Dot, ...]
    last: str
    """The newest value."""


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: str
    text: str


@dataclass(frozen=True)
class Chart:
    """Curves over the steps, on one scale."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def charts_of(run: RunFiles) -> list[Chart]:
    """The charts that a run has values for."""

    def named(prefix: str, *names: str) -> dict[str, str]:
        return {f"{prefix}{name}": name for name in names}

    logged = run.names()

    def places(pattern: str) -> dict[str, str]:
        """Labels of the names that ``pattern`` matches: of several caches the cache's name, then the place."""
        found = {name: re.fullmatch(pattern, name) for name in logged}
        return {name: " ".join(filter(None, match.groups())) for name, match in found.items() if match}

    kept = {name: f"teacher {place}" for name, place in places(f"train/{CACHE}kept_mass/(.+)").items()}
    own = {name: f"student {place}" for name, place in places(f"train/{CACHE}student_mass/(.+)").items()}
    wanted = [
        ("Loss in training", "nats per target", named("train/", "loss", "task", "lens")),
        ("Loss by teacher", "nats per target", places("train/(.+)/(task|lens)")),
        ("JSD between the teachers", "nats per target", places("train/teacher_jsd/(.+)")),
        ("KL to the teacher on held-out rows", "nats per target", named("eval/", "kl")),
        ("Cross-entropy of the text", "nats per target", {"train/ce": "training", "eval/loss": "held-out rows"}),
        ("Lens divergence in training, by pair", "nats per target", places(f"train/{CACHE}lens/(.+)")),
        ("Lens JSD on held-out rows, by pair", "nats per target", places("eval/lens_jsd/(.+)")),
        ("ROUGE-L of greedy answers", "0 to 100", named("eval/", "rouge_l")),
        ("Likeliest token on held-out rows", "share", named("eval/", "top1_agreement", "calibration_error")),
        ("Probability of the kept tokens", "share", {**kept, **own}),
        ("Gradient norm", "before clipping", named("train/", "grad_norm")),
        ("Learning rate", "", named("train/", "learning_rate")),
        ("Speed", "tokens per second", named("train/", "tokens_per_s")),
        ("Waiting for data", "share of the time", named("train/", "data_wait")),
        ("Peak memory", "GB", named("train/", "peak_memory_gb")),
    ]
    charts = []
    for title, unit, names in wanted:
        found = {label: run.points(name) for name, label in names.items() if run.points(name)}
        if found:
            charts.append(make_chart(title, unit, found, last_step=max(int(line["step"]) for line in run.lines)))
    return charts


def make_chart(title: str, unit: str, series: dict[str, Points], *, last_step: int) -> Chart:
    """Lay out some curves by their labels. A label "teacher X" is dashed in the colour of "student X"."""
    values = [value for points in series.values() for _, value in points]
    y_ticks = nice_ticks(min(values), max(values))
    low, high = y_ticks[0], y_ticks[-1]

    def x(step: float) -> str:
        return f"{LEFT + (WIDTH - LEFT - RIGHT) * step / max(1, last_step):.1f}"

    def y(value: float) -> str:
        return f"{HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low):.1f}"

    places = list(dict.fromkeys(_place(label) for label in series))
    curves = []
    for label, points in series.items():
        number = places.index(_place(label))
        is_dashed = label.startswith("teacher ") or number >= COLOURS
        shown = thinned(points)
        dots = shown if len(shown) <= MOST_DOTS else []
        curves.append(
            Curve(
                name=label,
                style=f"k{number % COLOURS}" + (" dashed" if is_dashed else ""),
                points=" ".join(f"{x(step)},{y(value)}" for step, value in shown),
                dots=tuple(Dot(x(step), y(value), f"{label}, step {step}: {value:.4g}") for step, value in dots),
                last=f"{points[-1][1]:.4g}",
            )
        )
    x_ticks = [step for step in nice_ticks(0, max(1, last_step)) if step <= last_step and step == int(step)]
    return Chart(
        title=title,
        unit=unit,
        curves=tuple(curves),
        x_ticks=tuple(Tick(x(step), f"{step:,.0f}") for step in x_ticks),
        y_ticks=tuple(Tick(y(value), f"{value:.6g}") for value in y_ticks),
    )


def thinned(points: Points) -> Points:
    """At most MOST_POINTS of them: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    stretches = MOST_POINTS // 2
    bounds = [len(points) * n // stretches for n in range(stretches + 1)]
    kept: Points = []
    for start, end in pairwise(bounds):
        part = points[start:end]
        kept += sorted({min(part, key=lambda one: one[1]), max(part, key=lambda one: one[1])})
    return kept


def nice_ticks(low: float, high: float) -> Sequence[float]:
    """Four to seven round numbers that enclose ``low`` and ``high``."""
    # What differs in the last digits only is a level line: ticks between would be rounding errors.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) / 2
        low, high = low - margin, high + (margin or 1.0)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12 - math.floor(math.log10(step))) for n in range(first, last + 1)]


def _place(label: str) -> str:
    return label.removeprefix("teacher ").removeprefix("student ")

"""Student and teacher read side by side: layer pairs (the last on top) by targets, as data for the page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distilllens_inspect.colours import step_of
from distilllens_inspect.heat_map import Cell, Column
from distilllens_inspect.text import TokenText, one_line


@dataclass(frozen=True)
class Distance:
    """How far the student is from the teacher at one target: JSD in nats, and a bar of at most 100 (ln 2)."""

    text: str
    length: str


@dataclass(frozen=True)
class PairRows:
    """One pair: the teacher's layer above the student's, and their distance."""

    student_layer: int
    teacher_layer: int
    teacher: tuple[Cell, ...]
    student: tuple[Cell, ...]
    distances: tuple[Distance, ...]


@dataclass(frozen=True)
class Comparison:
    """All of one example that the page shows."""

    index: int
    id: str
    columns: tuple[Column, ...]
    pairs: tuple[PairRows, ...]
    num_left_out: int
    details: dict[str, Any]
    """What a cell says when it is pointed at, by row and column; JSON."""


def compare(samples: dict[str, Any], token_text: TokenText, *, max_positions: int) -> list[Comparison]:
    """Lay out the examples of lens_samples.json. ValueError where it is not what training writes."""
    try:
        pairs = [(int(own), int(teacher)) for own, teacher in samples["pairs"]]
        return [_comparison(one, pairs, token_text, max_positions) for one in samples["examples"]]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"lens_samples.json is not what `distilllens train` writes ({error!r}).") from None


def _comparison(
    sample: dict[str, Any], pairs: Sequence[tuple[int, int]], token_text: TokenText, max_positions: int
) -> Comparison:
    token_ids = [int(token) for token in sample["token_ids"]]
    positions = [int(position) for position in sample["positions"]][:max_positions]
    columns = tuple(
        Column(position, token_text.shown(token_ids[position]), token_text.shown(token_ids[position + 1]))
        for position in positions
    )
    details = _Details(token_text)
    rows = []
    for (own, teacher), read in reversed(list(zip(pairs, sample["pairs"], strict=True))):
        teachers, students, distances = (read[name][: len(positions)] for name in ("teacher", "student", "jsd"))
        if not len(teachers) == len(students) == len(distances) == len(positions):
            raise ValueError("rows of different lengths")
        rows.append(
            PairRows(own, teacher, details.row(teachers), details.row(students), tuple(map(_distance, distances)))
        )
    return Comparison(
        index=int(sample["index"]),
        id=one_line(str(sample["id"])),
        columns=columns,
        pairs=tuple(rows),
        num_left_out=int(sample["num_targets"]) - len(positions),
        details=details.content(),
    )


class _Details:
    """Collects the numbers behind the cells; each token's text is kept once."""

    def __init__(self, token_text: TokenText) -> None:
        self._token_text = token_text
        self._number_of: dict[int, int] = {}
        self._rows: list[list[dict[str, Any]]] = []

    def row(self, entries: Sequence[dict[str, Any]]) -> tuple[Cell, ...]:
        self._rows.append([self._entry(entry) for entry in entries])
        return tuple(self._cell(entry) for entry in entries)

    def content(self) -> dict[str, Any]:
        return {"tokens": [self._token_text.shown(token) for token in self._number_of], "rows": self._rows}

    def _entry(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Only what a cell shows, as numbers: the file may hold anything."""
        found: dict[str, Any] = {name: _number(entry[name]) for name in ("rest", "entropy", "next")}
        top = [(int(token), _number(probability)) for token, probability in entry["top"]]
        found["top"] = [[self._number_of.setdefault(token, len(self._number_of)), p] for token, p in top]
        if "rank" in entry:
            found["rank"] = int(entry["rank"])
        if "others" in entry:
            count, mass = entry["others"]
            found["others"] = [int(count), _number(mass)]
        return found

    def _cell(self, entry: dict[str, Any]) -> Cell:
        is_known = "rank" in entry
        return Cell(
            token=self._token_text.shown(int(entry["top"][0][0])) if entry["top"] else "",
            step=step_of(_number(entry["next"])) if is_known else None,
            is_right=is_known and int(entry["rank"]) == 1,
        )


def _distance(jsd: Any) -> Distance:
    value = max(0.0, _number(jsd))
    return Distance(text=f"{value:.3f}", length=f"{min(100.0, 100 * value / math.log(2)):.1f}")


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} where a number belongs")
    return number

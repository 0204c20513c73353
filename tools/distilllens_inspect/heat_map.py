"""The heat map of one example: layers (rows, the last on top) by targets (columns), as data for the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distilllens_cache import CachedExample
from distilllens_inspect.colours import step_of
from distilllens_inspect.readings import Reading, is_supervised, read_layer
from distilllens_inspect.text import TokenText, one_line

TOP_SHOWN = 10
"""Most tokens listed for one cell; the others kept are summed up in one line."""


@dataclass(frozen=True)
class Column:
    """One target: the token at its position and the true next token."""

    position: int
    token: str
    next_token: str


@dataclass(frozen=True)
class Cell:
    """The lens's likeliest token at one layer and target, and how likely it finds the true next one."""

    token: str
    step: int | None
    """Step of the colour scale, None when the true next token is not among the kept."""
    is_right: bool
    """The likeliest token is the true next one."""

    @property
    def style(self) -> str:
        """Classes of the cell in the page."""
        return ("outside" if self.step is None else f"s{self.step}") + (" right" if self.is_right else "")


@dataclass(frozen=True)
class Row:
    """One layer over the targets shown."""

    layer: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class HeatMap:
    """All of one example that the page shows."""

    index: int
    id: str
    num_tokens: int
    text: tuple[tuple[bool, str], ...]
    """Running text in pieces, with True where the student learns it."""
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    num_left_out: int
    """Targets after the last one shown."""
    details: dict[str, Any]
    """What a cell says when it is pointed at, by row and column; JSON."""

    @property
    def num_targets(self) -> int:
        """Targets of the example, shown or not."""
        return len(self.columns) + self.num_left_out


def make_heat_map(example: CachedExample, token_text: TokenText, *, max_positions: int) -> HeatMap:
    """Lay out the first ``max_positions`` targets of an example over all layers of the cache."""
    positions = example.target_positions.tolist()
    shown = positions[:max_positions]
    token_ids = example.token_ids.tolist()
    columns = tuple(
        Column(
            position=position,
            token=token_text.shown(token_ids[position]),
            next_token=token_text.shown(token_ids[position + 1]),
        )
        for position in shown
    )
    rows: list[Row] = []
    details = _Details(token_text)
    for layer in sorted(example.targets, reverse=True):
        readings = read_layer(example, layer)[: len(shown)]
        rows.append(Row(layer=layer, cells=tuple(_cell(reading, token_text) for reading in readings)))
        details.add_row(readings)
    return HeatMap(
        index=example.index,
        id=one_line(example.id),
        num_tokens=len(token_ids),
        text=_pieces(token_ids, is_supervised(example), token_text),
        columns=columns,
        rows=tuple(rows),
        num_left_out=len(positions) - len(shown),
        details=details.content(),
    )


def _cell(reading: Reading, token_text: TokenText) -> Cell:
    probability = reading.next_probability
    return Cell(
        token=token_text.shown(reading.token_ids[0]) if reading.token_ids else "",
        step=None if probability is None else step_of(probability),
        is_right=reading.next_rank == 1,
    )


class _Details:
    """Collects the numbers behind the cells; each token's text is kept once."""

    def __init__(self, token_text: TokenText) -> None:
        self._token_text = token_text
        self._number_of: dict[int, int] = {}
        self._rows: list[list[dict[str, Any]]] = []

    def add_row(self, readings: Sequence[Reading]) -> None:
        self._rows.append([self._entry(reading) for reading in readings])

    def content(self) -> dict[str, Any]:
        return {"tokens": [self._token_text.shown(token) for token in self._number_of], "rows": self._rows}

    def _entry(self, reading: Reading) -> dict[str, Any]:
        entry = reading.entry(TOP_SHOWN)
        return entry | {"top": [[self._number(token), probability] for token, probability in entry["top"]]}

    def _number(self, token_id: int) -> int:
        return self._number_of.setdefault(token_id, len(self._number_of))


def _pieces(
    token_ids: Sequence[int], supervised: Sequence[bool], token_text: TokenText
) -> tuple[tuple[bool, str], ...]:
    """The running text, cut where what is learned begins or ends."""
    pieces: list[tuple[bool, str]] = []
    start = 0
    for end in range(1, len(token_ids) + 1):
        if end == len(token_ids) or supervised[end] != supervised[start]:
            pieces.append((supervised[start], token_text.join(token_ids[start:end])))
            start = end
    return tuple(pieces)

"""The table of one target on the terminal: layers down, the teacher's likeliest tokens across."""

from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from distilllens_inspect.console import probability_text
from distilllens_inspect.readings import Reading
from distilllens_inspect.text import TokenText

TOKEN_WIDTH = 14
"""Columns of a token; longer ones are cut with an ellipsis."""


class LayerTables:
    """The tables of all positions with the same columns: as many of the top tokens as fit the console."""

    def __init__(self, readings: Sequence[Reading], token_text: TokenText, top: int, width: int) -> None:
        self._token_text = token_text
        shown = [self._cut(token_id) for reading in readings for token_id in reading.token_ids[:top]]
        self._token_width = max((cell_len(text) for text in shown), default=1)
        most = max((min(top, len(reading.token_ids)) for reading in readings), default=0)
        fixed = 8 + 18 + 8 + 10
        self.num_top = min(most, max(1, (width - fixed) // (self._token_width + 10)))
        self._num_hidden = most - self.num_top

    def table(self, readings: Sequence[Reading]) -> Table:
        """One row per layer: the true next token, the likeliest tokens, the rest, the entropy."""
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("layer", justify="right", no_wrap=True)
        table.add_column("next token", justify="right", no_wrap=True, min_width=14)
        for rank in range(1, self.num_top + 1):
            table.add_column(f"top {rank}", no_wrap=True, min_width=self._token_width + 7)
        table.add_column("rest", justify="right", no_wrap=True, min_width=6)
        table.add_column("entropy", justify="right", no_wrap=True)
        for reading in readings:
            pairs = reading.top(self.num_top)
            table.add_row(
                str(reading.layer),
                _next_text(reading),
                *(self._cell(token_id, value, token_id == reading.next_id) for token_id, value in pairs),
                *([""] * (self.num_top - len(pairs))),
                probability_text(reading.rest),
                f"{reading.entropy:.2f}",
            )
        return table

    def note(self) -> str:
        """What the columns mean, and what did not fit."""
        hidden = (
            f"\n{self.num_top} of the top {self.num_top + self._num_hidden} fit this width; --json shows all."
            if self._num_hidden
            else ""
        )
        return (
            "next token: probability and rank of the true next one, or outside the kept ones.\n"
            "rest: all tokens that were not kept. entropy: in nats, a lower bound." + hidden
        )

    def _cell(self, token_id: int, probability: float, is_next: bool) -> Text:
        shown = self._cut(token_id)
        gap = " " * (self._token_width - cell_len(shown))
        cell = Text(shown, style="bold green" if is_next else "")
        return cell.append(f"{gap} {probability_text(probability):>6}", style="not bold default")

    def _cut(self, token_id: int) -> str:
        text = Text(self._token_text.shown(token_id))
        text.truncate(TOKEN_WIDTH, overflow="ellipsis")
        return text.plain


def _next_text(reading: Reading) -> str:
    rank, probability = reading.next_rank, reading.next_probability
    if rank is None or probability is None:
        return f"outside top-{len(reading.token_ids)}"
    return f"{probability_text(probability)} (#{rank})"

"""One example of a cache on the terminal: its tokens, and what the teacher says at chosen targets."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from distilllens_cache import CachedExample, CacheReader
from distilllens_inspect.console import has_colour, put
from distilllens_inspect.layer_table import LayerTables
from distilllens_inspect.readings import Reading, is_supervised, read_layer
from distilllens_inspect.text import TokenText, one_line

MARKS = ("[[", "]]")
"""Around what is learned, where there are no colours."""
LINE_WIDTH = 100
"""Columns of the token view on anything that is not a terminal."""


def show_json(
    reader: CacheReader, example: CachedExample, positions: Sequence[int], layers: Sequence[int], top: int
) -> dict[str, Any]:
    """The same content for machines; token texts are exact, not escaped."""
    token_text = TokenText.of_folder(reader.tokenizer_folder)
    token_ids, learned = example.token_ids.tolist(), is_supervised(example)
    by_layer = {layer: _readings_at(example, layer, positions) for layer in layers}

    def token(token_id: int) -> dict[str, Any]:
        return {"id": token_id, "text": token_text.plain(token_id)}

    def layer_content(reading: Reading) -> dict[str, Any]:
        return {
            "layer": reading.layer,
            "next_probability": reading.next_probability,
            "next_rank": reading.next_rank,
            "top": [token(token_id) | {"probability": probability} for token_id, probability in reading.top(top)],
            "num_ids": len(reading.token_ids),
            "rest": reading.rest,
            "entropy_lower_bound": reading.entropy,
        }

    return {
        "example": example.index,
        "id": example.id,
        "num_tokens": len(token_ids),
        "num_targets": len(example.target_positions),
        "tokens": [
            {"position": position, **token(token_id), "is_supervised": supervised}
            for position, (token_id, supervised) in enumerate(zip(token_ids, learned, strict=True))
        ],
        "positions": [
            {
                "position": position,
                "token": token(token_ids[position]),
                "next": token(token_ids[position + 1]),
                "layers": [layer_content(by_layer[layer][place]) for layer in layers],
            }
            for place, position in enumerate(positions)
        ],
    }


def print_example(
    reader: CacheReader,
    example: CachedExample,
    positions: Sequence[int],
    layers: Sequence[int],
    top: int,
    console: Console,
) -> None:
    """Tokens with the position of each line's first in the margin, then one table per position."""
    token_text = TokenText.of_folder(reader.tokenizer_folder)
    num_tokens, num_targets = len(example.token_ids), len(example.target_positions)
    console.print(
        f"Example {example.index} (id {one_line(example.id)}): {num_tokens} tokens, {num_targets} supervised"
        f" ({num_targets / max(1, num_tokens):.1%}), {_legend(console)}"
    )
    console.print()
    for line in _token_lines(example, token_text, console):
        console.print(line, no_wrap=True, overflow="ignore", crop=False)
    if not num_targets:
        console.print("\nWarning: no target here, so nothing is learned from this example.", style="yellow")
        return
    readings = {layer: _readings_at(example, layer, positions) for layer in layers}
    all_readings = [reading for rows in readings.values() for reading in rows]
    columns = LayerTables(all_readings, token_text, top, console.width)
    for place, position in enumerate(positions):
        before, after = (token_text.shown(int(example.token_ids[at])) for at in (position, position + 1))
        console.print()
        console.print(f"Position {position}: after {before} the true next token is {after}")
        put(console, columns.table([readings[layer][place] for layer in layers]))
    console.print()
    console.print(columns.note())


def _legend(console: Console) -> str:
    if has_colour(console):
        return "shown in green"
    return f"between {MARKS[0]} and {MARKS[1]}"


def _token_lines(example: CachedExample, token_text: TokenText, console: Console) -> Iterator[Text]:
    """Lines of whole tokens, broken after line breaks and at the width; a margin tells where each begins."""
    colour = has_colour(console)
    token_ids, supervised = example.token_ids.tolist(), is_supervised(example)
    margin = len(str(len(token_ids))) + 2
    width = max(20, (min(console.width, LINE_WIDTH) if not console.is_terminal else console.width) - margin)
    line, used = Text(), 0
    for position, token_id in enumerate(token_ids):
        shown = token_text.shown(token_id)
        learned = supervised[position]
        if not colour:
            begins = learned and not (position and supervised[position - 1])
            ends = learned and not (position + 1 < len(token_ids) and supervised[position + 1])
            shown = f"{MARKS[0] if begins else ''}{shown}{MARKS[1] if ends else ''}"
        if used and used + cell_len(shown) > width:
            yield line
            line, used = Text(), 0
        if not line:
            line = Text().append(f"{position:>{margin - 2}}  ", style="dim")
        line.append(shown, style="bold green" if learned and colour else None)
        used += cell_len(shown)
        if (token_text.raw(token_id) or b"").endswith(b"\n"):
            yield line
            line, used = Text(), 0
    if line:
        yield line


def _readings_at(example: CachedExample, layer: int, positions: Sequence[int]) -> list[Reading]:
    wanted = set(positions)
    return [reading for reading in read_layer(example, layer) if reading.position in wanted]

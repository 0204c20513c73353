"""One self-contained HTML page about a cache, a training run, or both: numbers, curves and heat maps."""

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from distilllens_cache import CacheReader
from distilllens_inspect.colours import DARK, LIGHT, Step, step_labels
from distilllens_inspect.console import bytes_text
from distilllens_inspect.heat_map import HeatMap, make_heat_map
from distilllens_inspect.run_page import RunPage, open_run_page
from distilllens_inspect.summary import Summary, identity_rows, summarize, warnings_of
from distilllens_inspect.text import TokenText, one_line

MEASURES = ("Bytes per target", "Kept mass", "Ids kept", "Entropy, nats")


@dataclass(frozen=True)
class Bar:
    """A number with a bar beside it."""

    text: str
    length: str
    """Percent of the full length."""


@dataclass(frozen=True)
class LayerRow:
    """One layer's bars, in the order of ``MEASURES``."""

    name: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class ByteRow:
    """One part of the cache with its share of the bytes."""

    name: str
    text: str
    length: str


def write_report(
    reader: CacheReader | None, output: Path, *, examples: Sequence[int], max_positions: int, run: Path | None = None
) -> int:
    """Write the page about a cache, a run, or both, and give its size in bytes. Equal input gives equal bytes."""
    check_output(output)
    token_text = TokenText.of_folder(reader.tokenizer_folder) if reader is not None else None
    run_page = open_run_page(run, token_text, max_positions=max_positions) if run is not None else None
    maps: list[HeatMap] = []
    if reader is not None and token_text is not None:
        maps = [make_heat_map(reader[number], token_text, max_positions=max_positions) for number in examples]
    page = render(summarize(reader) if reader is not None else None, maps, run_page).encode("utf-8")
    _write_whole(output, page)
    return len(page)


def render(summary: Summary | None, maps: Sequence[HeatMap], run: RunPage | None = None) -> str:
    """The page as text. Everything from files is escaped; the only script is ours, named by its hash."""
    style = _own_file("report.css") + _step_styles()
    script = _own_file("report.js")
    assert summary is not None or run is not None, "a page about nothing"
    title = _title(summary) if summary is not None else f"Training run: {run.name}" if run is not None else ""
    return _template().render(
        title=title,
        summary=summary,
        **(_of_cache(summary) if summary is not None else {}),
        run=run,
        step_labels=step_labels(),
        maps=maps,
        style=Markup(style),
        style_hash=_csp_hash(style),
        script=Markup(script),
        script_hash=_csp_hash(script),
    )


def _title(summary: Summary) -> str:
    return f"Teacher cache: {one_line(summary.identity['teacher'])}"


def _of_cache(summary: Summary) -> dict[str, Any]:
    return {
        "teacher": one_line(summary.identity["teacher"]),
        "facts": _facts(summary),
        "warnings": warnings_of(summary),
        "identity": [(name, one_line(value)) for name, value in identity_rows(summary)],
        "measures": MEASURES,
        "layer_rows": _layer_rows(summary),
        "byte_rows": _byte_rows(summary),
        "total_bytes": bytes_text(summary.total_bytes),
    }


@cache
def _template() -> Template:
    loader = PackageLoader("distilllens_inspect", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html.j2")


def check_output(output: Path) -> None:
    """A ValueError when there can be no file at ``output``, before any work is done."""
    if output.is_dir():
        raise ValueError(f"{output} is a folder; --output names a file, such as {output}/report.html.")
    if output.exists() and not output.is_file():
        raise ValueError(f"{output} is no ordinary file; --output names one, such as report.html.")
    if not output.parent.is_dir():
        raise ValueError(f"{output} cannot be written: {output.parent} is no folder. Make it first.")


def _facts(summary: Summary) -> list[tuple[str, str]]:
    return [
        ("examples", f"{summary.num_examples:,}"),
        ("tokens", f"{summary.num_tokens:,}"),
        (f"targets, {summary.target_share:.0%} of tokens", f"{summary.num_targets:,}"),
        ("size", bytes_text(summary.total_bytes)),
        ("bytes per target and layer", f"{summary.bytes_per_target_and_layer:.1f}"),
    ]


def _layer_rows(summary: Summary) -> list[LayerRow]:
    """The last layer on top, as in the heat maps."""

    def bar(value: float, text: str, full: float) -> Bar:
        return Bar(text=text, length=_percent(value, full))

    layers = summary.layers
    most_bytes = max(layer.bytes_per_target for layer in layers)
    most_ids = max(layer.top_k for layer in layers)
    most_entropy = max(layer.mean_entropy for layer in layers)
    return [
        LayerRow(
            name=str(layer.layer),
            bars=(
                bar(layer.bytes_per_target, f"{layer.bytes_per_target:.1f}", most_bytes),
                bar(layer.mean_kept_mass, f"{layer.mean_kept_mass:.4f}", 1.0),
                bar(layer.mean_num_ids, f"{layer.mean_num_ids:.1f}", most_ids),
                bar(layer.mean_entropy, f"{layer.mean_entropy:.3f}", most_entropy),
            ),
        )
        for layer in reversed(layers)
    ]


def _byte_rows(summary: Summary) -> list[ByteRow]:
    return [
        ByteRow(name=name, text=bytes_text(size), length=_percent(size, summary.total_bytes))
        for name, size in summary.bytes_of.items()
    ]


def _percent(value: float, full: float) -> str:
    return f"{100 * value / full:.1f}" if full > 0 else "0"


def _step_styles() -> str:
    def rules(steps: Sequence[Step]) -> str:
        return "".join(f".s{n}{{background:{s.background};color:{s.text}}}" for n, s in enumerate(steps))

    return f"{rules(LIGHT)}\n@media (prefers-color-scheme: dark){{{rules(DARK)}}}\n"


def _own_file(name: str) -> str:
    return files("distilllens_inspect").joinpath(name).read_text(encoding="utf-8")


def _csp_hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode("ascii")


def _write_whole(output: Path, content: bytes) -> None:
    """Replace ``output`` in one step, so that a stopped run leaves the old page or the new one."""
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, output)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(
            f"{output} cannot be written: {error.strerror}. Choose another file with --output, or make room."
        ) from error

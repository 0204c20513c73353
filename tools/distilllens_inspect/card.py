"""A dataset card: what a cache holds and how to use it, as a model hub shows it beside the files.

It follows from manifest and index alone, so the same cache has the same card, wherever it lies.
"""

from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from distilllens_cache import CacheReader, layout
from distilllens_cache.atomic import write_file
from distilllens_inspect.console import bytes_text
from distilllens_inspect.summary import Summary, identity_rows, summarize
from distilllens_inspect.text import one_line

CARD = layout.CARD
MARK = "<!-- Written by distilllens; a card without this line is never replaced. -->"
SIZE_CATEGORIES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
DIGESTS = ("teacher digest", "config digest", "tokenizer digest", "template digest", "dataset digest", "cache digest")


def write_card(folder: Path, *, license_name: str | None = None) -> bool:
    """Write the card of the finished cache in ``folder``; False where a card that somebody else wrote is left alone."""
    path = folder / CARD
    if path.is_symlink() or (path.exists() and not _is_ours(path)):
        return False
    card = render_card(CacheReader(folder), license_name=license_name).encode("utf-8")
    if not path.exists() or path.read_bytes() != card:
        write_file(path, card)
    return True


def _is_ours(path: Path) -> bool:
    return path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace")


def render_card(reader: CacheReader, *, license_name: str | None = None) -> str:
    """The card as Markdown with a YAML header, ending in a line break."""
    summary = summarize(reader)
    template = Environment(
        loader=PackageLoader("distilllens_inspect", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    ).get_template("card.md.j2")
    rows = [(name, _cell(value)) for name, value in identity_rows(summary)]
    return template.render(
        header=yaml.safe_dump(_header(summary, license_name), sort_keys=False, allow_unicode=True),
        mark=MARK,
        summary=summary,
        teacher=_cell(summary.identity["teacher"]),
        is_licensed=license_name is not None,
        is_packed=summary.identity["codec"] == "packed",
        size=bytes_text(summary.total_bytes),
        facts=[row for row in rows if row[0] not in ("teacher", *DIGESTS)],
        digests=[row for row in rows if row[0] in DIGESTS],
    )


def _header(summary: Summary, license_name: str | None) -> dict[str, object]:
    """What the hub reads. Without a license none is claimed."""
    category = next((name for most, name in SIZE_CATEGORIES if summary.num_examples < most), "n>1M")
    named = {} if license_name is None else {"license": license_name}
    return {
        "pretty_name": f"Teacher cache of {one_line(summary.identity['teacher'])}",
        **named,
        "tags": ["distilllens", "knowledge-distillation", "logit-lens"],
        "size_categories": [category],
        "configs": [{"config_name": "default", "data_files": "shards/*[0-9].arrow"}],
    }


def _cell(text: str) -> str:
    """Text of the cache as a cell of a table: it cannot end the cell, nor become markup."""
    return "`" + one_line(text).replace("`", "'").replace("|", "\\|") + "`"

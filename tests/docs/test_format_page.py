"""The page of the format names every file, key and column that a cache can have."""

import re
import runpy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import BaseModel

from distilllens_cache import CODECS, Identity, layout
from distilllens_cache.manifest import (
    FileRecord,
    LayerStats,
    Manifest,
    Plan,
    PlannedShard,
    ShardRecord,
    Sidecar,
    SketchCommit,
    SketchRecord,
)

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "cache" / "README.md").read_text(encoding="utf-8")
TinyCache: Any = runpy.run_path(str(ROOT / "tests/golden/make_cache_v1.py"))["TinyCache"]
RECORDS = (
    FileRecord,
    Identity,
    LayerStats,
    Manifest,
    Plan,
    PlannedShard,
    ShardRecord,
    Sidecar,
    SketchCommit,
    SketchRecord,
)


def named() -> set[str]:
    """All words in code font outside blocks."""
    text = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    return {word for code in re.findall(r"`([^`\n]+)`", text) for word in re.findall(r"\w+", code)}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_every_key_is_named(record: type[BaseModel]) -> None:
    assert set(record.model_fields) <= named(), sorted(set(record.model_fields) - named())


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_every_file_and_column_of_a_cache_is_named(codec: str, tmp_path: Path) -> None:
    tails = {2: "profile+sampled:2", 4: "profile+sketch:4:8+sampled:2"}
    folder = TinyCache(codec=codec, store_tail=tails).write(tmp_path / "cache")
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != layout.TOKENIZER]
    patterns = {re.sub(r"layer_\d+", "layer_N", path.relative_to(folder).as_posix()) for path in files}
    assert {name.replace("00001", "00000") for name in patterns} <= set(re.findall(r"^[\w./]+", PAGE, re.MULTILINE))
    for path in (path for path in files if path.suffix == ".arrow"):
        columns = pa.ipc.open_file(str(path)).schema.names
        words = {re.sub(r"layer_\d+", "layer_N", name) for name in columns}
        words = {re.sub(r"(?<=gaps)_[12]$", "_0", name) for name in words}
        assert words <= named(), sorted(words - named())


def test_every_file_beside_a_cache_is_named() -> None:
    beside = (layout.CARD, layout.CONFIG, layout.CALIBRATION, layout.DOOR, layout.REMOTE_LOCK)
    assert all(f"`{name}`" in PAGE for name in (*beside, "writer.RANK.lock", "NAME.tmp-NUMBER"))

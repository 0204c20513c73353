"""Caches of the codec `packed` stay readable, and what is packed today looks as it did then."""

import json
import runpy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest

from distilllens_cache import verify_cache

MAKE = runpy.run_path(str(Path(__file__).with_name("make_packed_v1.py")))
FOLDER, VALUES, PARTS, contents, source = (MAKE[name] for name in ("FOLDER", "VALUES", "PARTS", "contents", "source"))


def test_the_golden_packed_cache_holds_what_it_held() -> None:
    found, wanted = contents(FOLDER), json.loads(VALUES.read_text())
    assert len(found) == len(wanted) == 7
    for one, other in zip(found, wanted, strict=True):
        assert one["id"] == other["id"]
        for layer, targets in one["targets"].items():
            assert targets["counts"] == other["targets"][layer]["counts"]
            assert targets["ids"] == other["targets"][layer]["ids"]
            for part in ("log_probs", "log_rest"):
                np.testing.assert_allclose(targets[part], other["targets"][layer][part], rtol=1e-6, atol=1e-7)


def test_the_golden_packed_cache_is_sound_and_small() -> None:
    report = verify_cache(FOLDER)
    assert report.problems == []
    assert report.files == 9
    assert sum(path.stat().st_size for path in FOLDER.glob("**/*") if path.is_file()) < 30_000


@pytest.mark.parametrize("shard", ["00000", "00001"])
def test_what_is_packed_today_has_the_columns_it_had(shard: str, tmp_path: Path) -> None:
    """Columns, not bytes: those also depend on the version of zstd."""
    folders = (FOLDER, source().write(tmp_path / "cache"))
    old, new = (
        pyarrow.ipc.open_file(pa.BufferReader((folder / f"shards/{shard}.arrow").read_bytes())).read_all()
        for folder in folders
    )
    assert old.schema.equals(new.schema)
    assert old.equals(new)
    assert len(old["layer_4_common"][0]) > 2 or shard == "00001"

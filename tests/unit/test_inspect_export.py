"""An exported cache holds what the reader gives, for tools that know nothing of ours."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from click.testing import CliRunner

from distilllens_cache import CacheReader
from distilllens_inspect.commands import inspect

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["cache_v1", "cache_v1_fp16"])
def test_a_parquet_export_opens_with_datasets_and_holds_every_target(name: str, tmp_path: Path) -> None:
    file = tmp_path / "cache.parquet"
    result = CliRunner().invoke(inspect, ["export", str(GOLDEN / name), "--output", str(file)])
    assert result.exit_code == 0, result.output
    rows = datasets.load_dataset("parquet", data_files=str(file), cache_dir=str(tmp_path / "hf"), split="train")
    reader = CacheReader(GOLDEN / name)
    assert len(rows) == len(reader)
    for row, example in zip(rows, reader, strict=True):
        assert (row["index"], row["id"]) == (example.index, example.id)
        assert row["token_ids"] == example.token_ids.tolist()
        assert row["target_positions"] == example.target_positions.tolist()
        for layer, targets in example.targets.items():
            assert [len(ids) for ids in row[f"layer_{layer}_ids"]] == targets.counts.tolist()
            assert np.concatenate([[], *row[f"layer_{layer}_ids"]]).tolist() == targets.ids.tolist()
            got = np.concatenate([[], *row[f"layer_{layer}_log_probs"]]).astype(np.float32)
            assert (got == targets.log_probs).all()
            assert (np.float32(row[f"layer_{layer}_log_rest"]) == targets.log_rest).all()


def test_an_export_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    for output in (tmp_path, tmp_path / "absent" / "cache.parquet"):
        result = CliRunner().invoke(inspect, ["export", str(GOLDEN / "cache_v1"), "--output", str(output)])
        assert result.exit_code == 1
        assert "folder" in str(result.exception)
    assert not list(tmp_path.iterdir())

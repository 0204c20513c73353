"""An exported cache holds what the reader gives, for tools that know nothing of ours."""

from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from distilllens_cache import CacheReader, Identity
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


def test_an_export_holds_the_codes_and_draws_of_each_target_where_they_are_stored(tmp_path: Path) -> None:
    file = tmp_path / "cache.parquet"
    arguments = ["export", str(GOLDEN / "cache_v1_sketch"), "--to", "parquet", "--output", str(file)]
    assert CliRunner().invoke(inspect, arguments).exit_code == 0
    rows = datasets.load_dataset("parquet", data_files=str(file), cache_dir=str(tmp_path / "hf"), split="train")
    reader = CacheReader(GOLDEN / "cache_v1_sketch")
    compared = 0
    for row, example in zip(rows, reader, strict=True):
        for layer, targets in example.targets.items():
            assert (f"layer_{layer}_codes" in row) == (targets.codes is not None)
            assert (f"layer_{layer}_sample_ids" in row) == (targets.samples is not None)
            if targets.codes is not None:
                assert row[f"layer_{layer}_codes"] == targets.codes.tolist()
            if targets.samples is not None:
                for part in ("ids", "draws", "log_probs"):
                    found = row[f"layer_{layer}_sample_{part}"]
                    assert [len(one) for one in found] == targets.samples.counts.tolist()
                    got = np.concatenate([[], *found]).astype(np.float32)
                    assert (got == getattr(targets.samples, part).astype(np.float32)).all()
                    compared += got.size
    assert compared
    metadata = pq.read_schema(file).metadata
    assert Identity.model_validate_json(metadata[b"distilllens.identity"]) == reader.manifest.identity
    assert metadata[b"distilllens.cache_digest"].decode() == reader.digest


def test_an_export_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    for output in (tmp_path, tmp_path / "absent" / "cache.parquet"):
        result = CliRunner().invoke(inspect, ["export", str(GOLDEN / "cache_v1"), "--output", str(output)])
        assert result.exit_code == 1
        assert "folder" in str(result.exception)
    assert not list(tmp_path.iterdir())

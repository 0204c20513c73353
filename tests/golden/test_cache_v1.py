"""Caches of format v1 stay readable: the committed ones hold what they held when they were made."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distilllens_cache import CacheReader, verify_cache

HERE = Path(__file__).parent
FOLDERS = {"cache_v1": 0.0, "cache_v1_fp16": 0.01}
"""By folder, how far a value may be from the original, in nats."""


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((HERE / "cache_v1.json").read_text())


@pytest.mark.parametrize("name", FOLDERS)
def test_the_golden_cache_holds_what_it_held(name: str, expected: dict[str, Any]) -> None:
    reader = CacheReader(HERE / name)
    assert len(reader) == len(expected["examples"]) == 5
    assert len(reader.manifest.shards) == 2
    assert reader.manifest.identity.layers == (2, 4)
    for found, wanted in zip(reader, expected["examples"], strict=True):
        assert found.id == wanted["id"]
        assert found.token_ids.tolist() == wanted["token_ids"]
        assert found.target_positions.tolist() == wanted["target_positions"]
        for layer, targets in found.targets.items():
            values = wanted["targets"][str(layer)]
            assert targets.counts.tolist() == values["counts"]
            assert targets.ids.tolist() == values["ids"]
            for part in ("log_probs", "log_rest"):
                error = np.abs(getattr(targets, part).astype(np.float64) - values[part])
                assert error.max() <= FOLDERS[name]
    sums = {str(layer): values.tolist() for layer, values in reader.tail_sums().items()}
    assert sums == expected["tail_sums"]


@pytest.mark.parametrize("name", FOLDERS)
def test_the_golden_cache_is_sound(name: str) -> None:
    report = verify_cache(HERE / name)
    assert report.problems == []
    assert report.files == 12


def test_the_golden_cache_with_sketches_and_samples_holds_what_it_held() -> None:
    expected = json.loads((HERE / "cache_v1_sketch.json").read_text())
    reader = CacheReader(HERE / "cache_v1_sketch")
    identity = reader.manifest.identity
    assert [str(spec) for spec in identity.tail_specs.values()] == [
        *("profile+sampled:5", "sketch:4:8", "profile+sketch:5+sampled:8"),
    ]
    assert (identity.min_k, identity.min_prob, identity.top_p) == ({2: 1, 4: 2}, {2: 0.001}, {4: 0.98})
    assert identity.calibration_targets == 100
    for found, wanted, tails in zip(reader, expected["examples"], expected["tail_rows"], strict=True):
        assert found.id == wanted["id"]
        for layer, targets in found.targets.items():
            values = wanted["targets"][str(layer)] | tails[str(layer)]
            samples = values.pop("samples")
            assert {name: plain(getattr(targets, name)) for name in values} == values
            assert (targets.samples is None) == (samples is None)
            if samples is not None:
                assert {name: plain(getattr(targets.samples, name)) for name in samples} == samples
    sketches = {
        str(layer): {"softcap": sketch.softcap, "basis": plain(sketch.basis), "offset": plain(sketch.offset)}
        for layer, sketch in reader.sketches().items()
    }
    assert sketches == expected["sketches"]
    assert {str(layer): plain(values) for layer, values in reader.tail_sums().items()} == expected["tail_sums"]
    report = verify_cache(HERE / "cache_v1_sketch")
    assert report.problems == []
    assert report.files == 20


def plain(values: np.ndarray | None) -> list[Any] | None:
    return None if values is None else values.tolist()


def test_the_golden_tokenizer_still_opens() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(CacheReader(HERE / "cache_v1").tokenizer_folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 50
    assert tokenizer.encode("the cat sat on a tree").tokens == ["the", "cat", "sat", "on", "a", "tree"]


def test_the_shards_open_with_plain_pyarrow(expected: dict[str, Any]) -> None:
    import pyarrow.ipc

    table = pyarrow.ipc.open_file(HERE / "cache_v1" / "shards" / "00000.arrow").read_all()
    assert table.column_names[:4] == ["index", "id", "token_ids", "target_positions"]
    assert table["layer_4_ids"][0].as_py() == expected["examples"][0]["targets"]["4"]["ids"]


def test_the_golden_caches_are_small() -> None:
    sizes = [path.stat().st_size for path in HERE.glob("cache_v1*/**/*") if path.is_file()]
    assert sum(sizes) < 100_000

"""The scripts that stand behind the figures in the documents, each run whole on tiny models."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from distilllens.cache_teacher import run_cache_teacher
from distilllens.config import CacheTeacherConfig
from distilllens_cache import CacheReader

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """``run_script("bench/loss.py", *arguments)`` runs it in this process; what it printed."""

    def run(name: str, *arguments: object) -> str:
        file = SCRIPTS / name
        monkeypatch.syspath_prepend(str(file.parent))
        monkeypatch.setattr(sys, "argv", [str(file), *map(str, arguments)])
        before = set(sys.modules)
        try:
            runpy.run_path(str(file), run_name="__main__")
        finally:
            for module in set(sys.modules) - before:  # siblings of one script are not those of another
                if str(getattr(sys.modules[module], "__file__", "")).startswith(str(SCRIPTS)):
                    del sys.modules[module]
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, tiny_rows, write_jsonl) -> Path:
    short = [{"instruction": row["instruction"][:12], "output": row["output"]} for row in tiny_rows]
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", short)


def test_loss_measures_every_way_against_the_floor(run_script) -> None:
    out = run_script(
        "bench/loss.py", "--rows", 24, "--hidden", 16, "--vocab", 300, "--top-k", 8, "--rounds", 1, "--threads", 1
    )
    for way in ("floor", "fused", "dense", "checkpointed"):
        assert way in out


def test_the_experiment_gives_a_line_for_each_arm(run_script, tmp_path: Path, tiny_model_folder, rows: Path) -> None:
    arguments = (
        *("--teacher", tiny_model_folder(num_layers=4, hidden_size=64)),
        *("--student", tiny_model_folder(num_layers=2, hidden_size=64, seed=1)),
        *("--data", rows, "--rows", 20, "--held-out", 4, "--layers", "2", "--steps", 2, "--batch-size", 2),
        *("--threads", 1, "--output", tmp_path),
    )
    out = run_script("reproduce/dense_against_cached.py", *arguments)
    arms = {json.loads(file.read_text())["arm"] for file in tmp_path.glob("*-seed0.json")}
    assert arms == {"dense", "default", "sketch", "bucket", "sampled", "renorm", "quarter"}
    assert len(out.splitlines()) >= len(arms)
    # A second call takes what is there.
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*-seed0.json")}
    run_script("reproduce/dense_against_cached.py", *arguments)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*-seed0.json")} == before


def test_a_share_of_the_lens_rows_points_the_way_of_all_of_them(
    run_script, tmp_path: Path, tiny_model_folder, rows: Path
) -> None:
    cache = tmp_path / "cache"
    write_cache(tiny_model_folder(num_layers=4), rows, cache)
    run_script(
        "bench/lens_rows.py",
        *("--student", tiny_model_folder(num_layers=2, seed=1), "--cache", cache, "--shares", 0.9, 0.2),
        *("--batches", 2, "--batch-size", 3, "--draws", 2, "--threads", 1, "--output", tmp_path / "found.json"),
    )
    shares = json.loads((tmp_path / "found.json").read_text())["shares"]
    assert 0.9 < shares["0.9"]["lens"] < 1.0
    assert shares["0.2"]["lens"] < shares["0.9"]["lens"]
    assert shares["0.2"]["loss"] > 0.5


def test_train_step_weighs_ours_against_fine_tuning_and_the_teacher_in_memory(
    run_script, tmp_path: Path, tiny_model_folder, rows: Path
) -> None:
    teacher, cache = tiny_model_folder(num_layers=4), tmp_path / "cache"
    write_cache(teacher, rows, cache)
    run_script(
        "bench/train_step.py",
        *("--teacher", teacher, "--student", tiny_model_folder(num_layers=2, seed=1), "--cache", cache),
        *("--steps", 1, "--rounds", 1, "--threads", 1, "--json", tmp_path / "found.json"),
    )
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(one["time"] > 0 for one in found["ways"].values())
    assert found["ways"][found["floor"]]["time"] == 1.0


def test_storage_prints_ours_beside_the_others(run_script, tmp_path: Path, tiny_model_folder, rows: Path) -> None:
    cache = tmp_path / "cache"
    write_cache(tiny_model_folder(num_layers=4), rows, cache, codec="arrow-fp32", min_prob="0")
    run_script("bench/storage.py", cache, "--rounds", 1, "--studies", "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    ways = {one["way"]: one for one in found if one["layer"] == 4 and one["width"] == 64}
    studies = ways.pop("studies")["studies"]
    assert studies["zstd level 1"]["bytes"] == 1
    assert {"48 levels", "zstd level 19", "zstd level 1, long window"} < set(studies)
    sizes = {name: one["bytes"] for name, one in ways.items()}
    assert sizes["packed"] < min(sizes["17 bits + fp16 + zstd"], sizes["uint32 + fp16 + zstd"])
    assert ways["uint32 + fp32 + zstd-3"]["kl"] == ways["int32 + fp32 + zstd-3, unchecked"]["kl"] == 0
    assert 0 < ways["packed"]["kl"] < 5e-4

    def of_packed(layer: int | str, what: str) -> float:
        (value,) = (one[what] for one in found if (one["layer"], one["width"], one["way"]) == (layer, 64, "packed"))
        return value

    assert of_packed("middle", "bytes") == of_packed(2, "bytes")
    reader = CacheReader(cache)
    of_layers = (of_packed(2, "bytes") + of_packed(4, "bytes")) * reader.manifest.num_targets / len(reader)
    besides = of_packed("all", "bytes of an example") - of_layers
    assert 0 < besides < 8 + 4 * (reader.num_tokens.sum() + reader.manifest.num_targets) / len(reader) + 50


def test_storage_refuses_rows_that_are_narrower_than_its_widths(
    run_script, tmp_path: Path, tiny_model_folder, rows: Path, capsys: pytest.CaptureFixture
) -> None:
    cache = tmp_path / "cache"
    write_cache(tiny_model_folder(num_layers=4), rows, cache, codec="arrow-fp32", top_k="64", min_prob="0")
    with pytest.raises(SystemExit):
        run_script("bench/storage.py", cache)
    assert "rows of 64 ids" in capsys.readouterr().err


def test_fidelity_finds_a_wide_target_better_than_a_narrow_one(
    run_script, tmp_path: Path, tiny_model_folder, rows: Path
) -> None:
    run_script(
        "bench/fidelity.py",
        "measure",
        *("--teacher", tiny_model_folder(num_layers=4, hidden_size=128), "--data", rows, "--layers", "2"),
        *("--student", f"0={tiny_model_folder(num_layers=2, hidden_size=128, seed=1)}"),
        *("--calibration-rows", 16, "--rows", 8, "--targets", 16, "--threads", 1, "--output", tmp_path),
    )
    final = {one["name"]: one for one in json.loads((tmp_path / "fidelity.json").read_text())["final"]}
    assert final["k=128 bucket"]["jsd"]["cosine"] > final["k=4 bucket"]["jsd"]["cosine"]
    assert (tmp_path / "fidelity.svg").stat().st_size > 1000


def write_cache(teacher: Path, rows: Path, folder: Path, **settings: str) -> None:
    config = CacheTeacherConfig(teacher=str(teacher), dataset=str(rows), layers="2", output_dir=folder, **settings)
    run_cache_teacher(config)

"""`cache-teacher --repair`: what is damaged is written again to the same bytes, and nothing else is touched."""

import shutil
from pathlib import Path

import pytest

from distilllens.cache_teacher import run_cache_teacher
from distilllens.config import CacheTeacherConfig
from distilllens.repair import run_repair
from distilllens_cache import CacheError, verify_cache


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model_folder, tiny_rows, write_jsonl) -> CacheTeacherConfig:
    folder = tmp_path_factory.mktemp("repair")
    config = CacheTeacherConfig(
        teacher=str(tiny_model_folder("llama")),
        dataset=str(write_jsonl(folder / "rows.jsonl", tiny_rows)),
        output_dir=folder / "cache",
        layers="2",
        top_k="16",
        store_tail="lens=sampled:4,final=profile+sketch:8",
        max_length=300,
        examples_per_shard=5,
        batch_tokens=600,
        device="cpu",
    )
    run_cache_teacher(config)
    return config


@pytest.fixture
def damaged(config: CacheTeacherConfig, tmp_path: Path) -> CacheTeacherConfig:
    """The config of a copy of the cache, to be damaged and repaired."""
    shutil.copytree(config.output_dir, tmp_path / "cache")
    return config.model_copy(update={"output_dir": tmp_path / "cache", "repair": True})


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "config.resolved.yaml")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def states(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


SKETCH_4 = {f"sketches/layer_4{end}" for end in (".arrow", ".projection.arrow", ".json")}
SHARD_1 = {f"shards/00001{end}" for end in (".arrow", ".tails.arrow", ".tail_rows.arrow", ".json")}


@pytest.mark.parametrize(
    ("names", "written"),
    [
        ({"shards/00001.arrow"}, SHARD_1),
        ({"shards/00001.json", "tokenizer/tokenizer.json", "index.arrow"}, SHARD_1),
        ({"sketches/layer_4.arrow", "tail_sums.arrow"}, SKETCH_4),
        ({"sketches/layer_4.projection.arrow"}, SKETCH_4),
        ({"plan.json"}, set()),
        ({"manifest.json"}, set()),
    ],
)
def test_only_what_is_damaged_is_written_again_and_to_the_same_bytes(config, damaged, capsys, names, written) -> None:
    folder, wanted = damaged.output_dir, contents(config.output_dir)
    for name in names:
        flip(folder / name)
    before = states(folder)
    run_repair(damaged)
    assert contents(folder) == wanted
    assert verify_cache(folder).is_sound
    after = states(folder)
    changed = {name for name in after if after[name] != before[name]} - {"config.resolved.yaml"}
    assert names <= changed <= names | written | {"manifest.json", "tail_sums.arrow"}
    told = capsys.readouterr()
    assert all(f"Damaged: {name}" in told.err for name in names)
    assert all(name in told.out for name in changed)
    assert "is sound again" in told.out


def test_a_missing_plan_is_restored_and_a_run_without_repair_deletes_nothing(config, damaged) -> None:
    folder, wanted = damaged.output_dir, contents(config.output_dir)
    (folder / "plan.json").unlink()
    with pytest.raises(CacheError, match=r"no plan\.json; nothing was changed\. --repair"):
        run_cache_teacher(damaged.model_copy(update={"repair": False}))
    assert contents(folder) == {name: data for name, data in wanted.items() if name != "plan.json"}
    run_repair(damaged)
    assert contents(folder) == wanted


def test_a_sound_cache_is_left_as_it_is_without_a_teacher(damaged, capsys) -> None:
    before = states(damaged.output_dir)
    run_repair(damaged.model_copy(update={"teacher": "nowhere/at-all"}))
    assert "is sound: nothing to repair" in capsys.readouterr().out
    assert states(damaged.output_dir) == before


def test_a_dry_run_names_the_damage_and_changes_nothing(damaged, capsys) -> None:
    flip(damaged.output_dir / "shards/00000.arrow")
    before = states(damaged.output_dir)
    run_repair(damaged.model_copy(update={"dry_run": True}))
    told = capsys.readouterr()
    assert "Damaged: shards/00000.arrow" in told.err
    assert "1 problem; without --dry-run it would be repaired" in told.out
    assert states(damaged.output_dir) == before


def test_without_plan_and_manifest_there_is_nothing_to_repair_from(damaged) -> None:
    folder = damaged.output_dir
    flip(folder / "plan.json")
    flip(folder / "manifest.json")
    before = states(folder)
    with pytest.raises(CacheError, match=r"nothing to be repaired from.*plan\.json.*manifest\.json.*--overwrite"):
        run_repair(damaged)
    assert states(folder) == before


def test_other_settings_are_refused_and_named(damaged) -> None:
    flip(damaged.output_dir / "shards/00000.arrow")
    before = states(damaged.output_dir)
    with pytest.raises(CacheError, match="top_k: cache has"):
        run_repair(damaged.model_copy(update={"top_k": "8"}))
    assert states(damaged.output_dir) == before


def test_an_unfinished_cache_or_none_is_refused(damaged, tmp_path) -> None:
    (damaged.output_dir / "manifest.json").unlink()
    with pytest.raises(CacheError, match=r"not finished\. Run the same command without --repair"):
        run_repair(damaged)
    with pytest.raises(CacheError, match="holds no cache"):
        run_repair(damaged.model_copy(update={"output_dir": tmp_path / "nothing"}))


def test_what_does_not_belong_to_the_cache_is_named_and_left(damaged) -> None:
    stray = damaged.output_dir / "tokenizer" / "added_tokens.json"
    stray.write_text("{}")
    flip(damaged.output_dir / "shards/00000.arrow")
    with pytest.raises(ValueError, match=r"still not sound: tokenizer.*added_tokens\.json.*Remove it"):
        run_repair(damaged)
    assert stray.read_text() == "{}"
    assert [problem.file for problem in verify_cache(damaged.output_dir).problems] == ["tokenizer"]


@pytest.mark.parametrize(
    "names",
    [
        ("shards/00000.arrow", "shards/00005.arrow"),
        ("sketches/layer_4.json",),
        ("sketches/layer_4.arrow", "sketches/layer_4.json"),
    ],
)
def test_a_cache_that_grew_is_repaired_by_the_command_that_made_it_grow(
    config, damaged, tmp_path, tiny_rows, write_jsonl, names
) -> None:
    """A sketch is fitted to the rows that it was fitted to before, so that all shards are kept."""
    more = write_jsonl(
        tmp_path / "more.jsonl", [row | {"instruction": "again " + row["instruction"]} for row in tiny_rows[:6]]
    )
    grown = damaged.model_copy(update={"append": str(more)})
    run_cache_teacher(grown.model_copy(update={"repair": False}))
    wanted = contents(grown.output_dir)
    for name in names:
        flip(grown.output_dir / name)
    before = states(grown.output_dir)
    run_repair(grown)
    assert contents(grown.output_dir) == wanted
    after = states(grown.output_dir)
    shards = {name for name in after if name.endswith(".arrow") and name.startswith("shards/")}
    assert {name for name in shards if after[name] != before[name]} <= {
        f"{name[:12]}{end}" for name in names for end in (".arrow", ".tails.arrow", ".tail_rows.arrow")
    }


def test_repair_is_for_one_process(damaged, monkeypatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="in one process"):
        run_repair(damaged)


def test_a_damaged_shard_is_written_again_also_where_a_run_simply_continues(config, damaged) -> None:
    """Its sidecar is whole, and a rank that looks what others have done believes sidecars."""
    wanted = contents(damaged.output_dir)
    flip(damaged.output_dir / "shards" / "00001.arrow")
    run_cache_teacher(damaged.model_copy(update={"repair": False}))
    assert contents(damaged.output_dir) == wanted

"""What the full counts found once, as tests of its own."""

import json
import resource
import time
from pathlib import Path

import pytest

from distilllens_cache import CacheError, verify_cache
from distilllens_cache.sealed_json import seal
from faultlab.child import in_child
from faultlab.material import files_of, handmade
from faultlab.seals import resealed, unsealed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return handmade(tmp_path / "cache", codec="packed", size="tiny")


def forge(folder: Path, name: str, content: dict) -> None:
    for changed, data in resealed(files_of(folder), {name: seal(content)}).items():
        (folder / changed).write_bytes(data)


def test_statistics_of_layers_that_the_cache_has_not_are_a_problem_of_the_sidecar(folder: Path) -> None:
    content = unsealed((folder / "shards/00000.json").read_bytes())
    content["layer_stats"]["1"] = content["layer_stats"]["4"]
    forge(folder, "shards/00000.json", content)
    problems = verify_cache(folder).problems
    assert [problem.file for problem in problems] == ["shards/00000.json"]
    assert "statistics of the layers [1, 3, 4]" in problems[0].what


def test_a_record_that_promises_gigabytes_takes_no_memory(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_bytes())
    del content["sha256"]
    content["shards"][0]["tails"]["size"] = 1 << 32
    (folder / "manifest.json").write_bytes(seal(content))

    def work() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
        raise CacheError("; ".join(str(problem) for problem in verify_cache(folder).problems))

    ended = in_child(work)
    assert ended.how == "refused", ended.text
    assert "00000.tails.arrow" in ended.text
    assert "its record says 4294967296" in ended.text


def test_a_lost_plan_costs_no_finished_cache(folder: Path) -> None:
    from faultlab.material import Material

    material = Material.of(folder)
    (folder / "plan.json").unlink()
    before = files_of(folder)
    with pytest.raises(CacheError, match=r"no plan\.json; nothing was changed"):
        material.write(folder)
    assert files_of(folder) == before


def test_a_time_zone_of_a_whole_day_hinders_no_writer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from faultlab.material import Material

    material = Material.of(folder)

    def work() -> None:
        monkeypatch.setenv("TZ", "XXX-25")
        time.tzset()
        material.write(folder, overwrite=True)

    assert in_child(work).how == "done"

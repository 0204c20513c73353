"""Adding examples to a finished cache: the old one or the new one, and never anything else."""

import dataclasses
import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distilllens_cache import CacheError, CacheReader, CacheWriter, Identity, Seat, atomic, cut_of, verify_cache

GOLDEN: Any = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_cache_v1.py"))
TinyCache, SKETCHED = GOLDEN["TinyCache"], GOLDEN["SKETCHED"]
CALLS = ("create", "write", "fsync", "replace", "fsync_folder", "remove")


class Grown:
    """A cache of 5 examples in shards of 3 and 2, and what an append of 3 more makes of it."""

    def __init__(self, **settings: Any) -> None:
        self.old = TinyCache(num_examples=5, examples_per_shard=3, **settings)
        self.all = TinyCache(num_examples=8, examples_per_shard=3, **settings)
        self.all.shards = [range(3), range(3, 5), range(5, 8)]
        single = TinyCache(num_examples=8, examples_per_shard=1, **settings)
        self.all.tails = [
            {layer: np.sum([single.tails[n][layer] for n in part], axis=0) for layer in single.identity.profile_layers}
            for part in self.all.shards
        ]
        self.identity: Identity = self.all.identity.model_copy(update={"dataset_digest": "66" * 32})

    def writer(self, folder: Path, **settings: Any) -> CacheWriter:
        return self.all.writer(folder, **({"identity": self.identity, "append": True} | settings))

    def append(self, folder: Path) -> Path:
        with self.writer(folder) as writer:
            self.all.write_shards(writer, writer.unfinished())
            writer.finish()
        return folder

    def at_once(self, folder: Path) -> Path:
        """A cache of all examples, cut in the same way, that was never anything else."""
        with self.all.writer(folder, identity=self.identity) as writer:
            if self.all.sketches:
                writer._sketches.num_examples = 5  # the sketches are those of the first examples, and say so
            for layer in writer.missing_sketches():
                writer.write_sketch(layer, *self.all.sketches[layer])
            self.all.write_shards(writer, writer.unfinished())
            writer.finish()
        return folder


@pytest.fixture(params=[{}, SKETCHED], ids=["profile", "sketches and samples"])
def grown(request) -> Grown:
    return Grown(**request.param)


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_cache_that_grew_has_the_bytes_of_one_made_at_once(tmp_path: Path, grown: Grown) -> None:
    old = files_of(grown.old.write(tmp_path / "cache"))
    folder = grown.append(tmp_path / "cache")
    new = files_of(folder)
    assert new == files_of(grown.at_once(tmp_path / "fresh"))
    arrow = [name for name in old if name.startswith(("shards/", "sketches/")) and name.endswith(".arrow")]
    assert len(arrow) >= 4
    assert all(new[name] == old[name] for name in arrow)
    report = verify_cache(folder)
    assert report.is_sound, report.problems
    assert len(CacheReader(folder)) == 8


def test_the_old_cache_can_be_read_and_verified_until_the_last_new_shard_is_written(
    tmp_path: Path, grown: Grown
) -> None:
    folder = grown.old.write(tmp_path / "cache")
    before = files_of(folder)
    with grown.writer(folder) as writer:
        assert writer.unfinished() == [2]
        assert not writer.finished
        grown.all.write_shards(writer, [2])
    assert {name: data for name, data in files_of(folder).items() if name in before} == before
    assert len(CacheReader(folder)) == 5
    assert verify_cache(folder).is_sound
    assert grown.old.writer(folder).finished  # a run that wants the old cache has nothing to do
    assert grown.writer(folder).unfinished() == []  # and the append goes on where it was


@pytest.mark.parametrize("names", [("layer_4.json",), ("layer_4.arrow",), ("layer_4.projection.arrow", "layer_4.json")])
def test_a_sketch_of_a_cache_that_grew_is_fitted_again_to_the_examples_it_was_fitted_to(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    """Then it is the same sketch, and the shards with their codes are kept."""
    grown = Grown(**SKETCHED)
    grown.old.write(tmp_path / "cache")
    wanted = files_of(grown.append(tmp_path / "cache"))
    for name in names:
        (tmp_path / "cache" / "sketches" / name).write_bytes(b"damaged")
    writer = grown.writer(tmp_path / "cache", append=False)
    assert writer.num_calibration_examples == 5
    assert writer.missing_sketches() == ([] if names == ("layer_4.json",) else [4])
    for layer in writer.missing_sketches():
        writer.close()  # killed after the manifest was taken away, and begun again
        writer = grown.writer(tmp_path / "cache", append=False)
        assert writer.num_calibration_examples == 5
        writer.write_sketch(layer, *grown.all.sketches[layer])
    assert writer.unfinished() == []
    writer.finish()
    assert files_of(tmp_path / "cache") == wanted


def test_the_same_append_again_has_nothing_to_do_and_the_next_one_adds_more(tmp_path: Path) -> None:
    grown = Grown()
    grown.old.write(tmp_path / "cache")
    before = files_of(grown.append(tmp_path / "cache"))
    assert grown.writer(tmp_path / "cache").finished
    assert grown.writer(tmp_path / "cache", append=False).finished
    assert files_of(tmp_path / "cache") == before
    assert cut_of(tmp_path / "cache") == grown.all.shards
    with pytest.raises(CacheError, match="other examples: it has 8, this run has 5"):
        grown.old.writer(tmp_path / "cache", identity=grown.identity, append=True)


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def killed_at(number: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> bool:
    """Run ``act`` and stop it before its system call of this number; whether it came so far."""
    made: list[str] = []

    def stop(name: str, original: Any) -> Any:
        def call(*args: Any) -> Any:
            if not any(str(one).endswith(".lock") for one in args):
                made.append(name)
                if len(made) == number:
                    raise Killed
            return original(*args)

        return call

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(atomic, name, stop(name, getattr(atomic, name)))
        try:
            act()
        except Killed:
            return True
    return False


def test_a_kill_at_any_call_leaves_the_old_cache_or_one_that_the_same_command_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown = Grown(**SKETCHED)
    old, wanted = grown.old.write(tmp_path / "old"), files_of(grown.at_once(tmp_path / "wanted"))
    num_readable = num_unfinished = 0
    for number in range(1, 1000):
        folder = tmp_path / "cache"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(old, folder)
        is_killed = killed_at(number, monkeypatch, lambda folder=folder: grown.append(folder))
        if (folder / "manifest.json").exists():
            reader = CacheReader(folder)
            assert len(reader) in (5, 8)
            assert [example.id for example in reader] == [f"row-{n}" for n in range(len(reader))]
            num_readable += 1
        else:
            with pytest.raises(CacheError, match="unfinished"):
                CacheReader(folder)
            num_unfinished += 1
        killed_at(number // 2 + 1, monkeypatch, lambda folder=folder: grown.append(folder))  # and once more on the way
        assert files_of(grown.append(folder)) == wanted
        if not is_killed:
            break
    assert num_readable > 20
    assert num_unfinished > 20
    assert not is_killed


def test_a_run_for_the_old_cache_restores_it_from_an_append_that_was_killed_while_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown = Grown()
    before = files_of(grown.old.write(tmp_path / "cache"))
    number = 1
    while True:
        assert killed_at(number, monkeypatch, lambda: grown.append(tmp_path / "cache"))
        if b"66666666" in (tmp_path / "cache" / "plan.json").read_bytes():
            break
        grown.old.write(tmp_path / "cache")
        restored = files_of(tmp_path / "cache")
        assert {name: restored[name] for name in before} == before
        number += 5


@pytest.mark.parametrize("field", ["teacher_digest", "torch_version", "temperature", "seed", "batch_tokens", "codec"])
def test_examples_of_another_teacher_or_setting_are_refused_by_field(tmp_path: Path, field: str) -> None:
    grown = Grown()
    folder = grown.old.write(tmp_path / "cache")
    before = files_of(folder)
    value = {"temperature": 2.0, "seed": 5, "batch_tokens": 3, "codec": "packed"}.get(field, "other")
    with pytest.raises(CacheError, match=f"{field}: cache has") as caught:
        grown.writer(folder, identity=grown.identity.model_copy(update={field: value}))
    assert "dataset_digest" not in str(caught.value)
    assert files_of(folder) == before


def test_rows_that_do_not_begin_with_the_old_ones_are_refused(tmp_path: Path) -> None:
    grown = Grown()
    folder = grown.old.write(tmp_path / "cache")
    before = files_of(folder)
    planned = list(grown.all.planned)
    planned[3] = dataclasses.replace(planned[3], digest="0" * 64)
    with pytest.raises(CacheError, match="other examples: at place 3"):
        grown.writer(folder, examples=planned)
    with pytest.raises(CacheError, match="cut elsewhere"):
        grown.writer(folder, shards=[range(3), range(3, 8)])
    assert files_of(folder) == before


def test_a_longer_dataset_without_append_is_refused_and_the_flag_is_named(tmp_path: Path) -> None:
    grown = Grown()
    folder = grown.old.write(tmp_path / "cache")
    with pytest.raises(CacheError, match=r"dataset_digest: .*\n.*--append adds the others"):
        grown.writer(folder, append=False)
    with pytest.raises(CacheError) as caught:
        grown.old.writer(folder, identity=grown.identity)
    assert "--append" not in str(caught.value)


def test_nothing_is_added_to_no_cache_or_an_unfinished_one(tmp_path: Path) -> None:
    grown = Grown()
    with pytest.raises(CacheError, match="without --append"):
        grown.writer(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    with grown.old.writer(tmp_path / "cache") as writer:
        grown.old.write_shards(writer, [1])
    with pytest.raises(CacheError, match="unfinished or damaged"):
        grown.writer(tmp_path / "cache")
    assert json.loads((tmp_path / "cache" / "plan.json").read_bytes())["shards"][-1]["stop"] == 5


def test_a_damaged_cache_is_refused_and_left_as_it_is(tmp_path: Path, grown: Grown) -> None:
    """`--repair` comes first; a sidecar that the refusal took away would be one more thing to repair."""
    folder = grown.old.write(tmp_path / "cache")
    shard = folder / "shards" / "00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CacheError, match="unfinished or damaged"):
        grown.writer(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_ranks_append_together(tmp_path: Path, grown: Grown) -> None:
    folder = grown.old.write(tmp_path / "cache")
    first, second = (grown.writer(folder, seat=Seat(rank, 2, "one")) for rank in range(2))
    assert first.unfinished() == second.unfinished() == [2]
    grown.all.write_shards(second, [2])
    assert not first.look_again()  # the manifest is still that of the old cache
    assert first.unfinished() == []
    first.finish()
    assert second.look_again()
    second.finish()
    assert files_of(folder) == files_of(grown.at_once(tmp_path / "fresh"))

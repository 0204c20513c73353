"""The dataset card: what a hub reads in it is true, it is the same for the same cache, and it spoils nothing."""

import shutil
from pathlib import Path

import datasets
import pytest
import yaml
from click.testing import CliRunner, Result

from distilllens_cache import CacheReader, verify_cache
from distilllens_inspect.card import CARD, MARK, render_card, write_card
from distilllens_inspect.commands import inspect

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ["cache_v1", "cache_v1_sketch", "packed_v1"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return shutil.copytree(GOLDEN / "cache_v1_sketch", tmp_path / "cache")


def card(*arguments: str) -> Result:
    return CliRunner().invoke(inspect, ["card", *arguments])


def header(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_names_teacher_layers_sizes_and_digests(cache: Path) -> None:
    reader = CacheReader(cache)
    text = render_card(reader)
    identity = reader.manifest.identity
    for wanted in (
        f"| teacher | `{identity.teacher}` |",
        f"| target positions | {reader.manifest.num_targets} |",
        "| layers | `2, 3, 4 of 4` |",
        f"| cache | `{reader.digest}` |",
        f"| tokenizer | `{identity.tokenizer_digest}` |",
    ):
        assert wanted in text
    assert header(text)["size_categories"] == ["n<1K"]
    assert set(header(text)["tags"]) >= {"distilllens", "knowledge-distillation"}


def test_a_license_is_named_only_where_it_was_given(cache: Path) -> None:
    without, given = card(str(cache)).output, card(str(cache), "--license", "apache-2.0").output
    assert "license" not in header(without)
    assert "No license was named." in without
    assert header(given)["license"] == "apache-2.0"
    assert "No license was named." not in given


def test_the_same_cache_has_the_same_card_wherever_it_lies(cache: Path, tmp_path: Path) -> None:
    other = shutil.copytree(cache, tmp_path / "elsewhere")
    for folder in (cache, other):
        assert write_card(folder)
    assert (cache / CARD).read_bytes() == (other / CARD).read_bytes() == card(str(other)).stdout_bytes


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_with_its_card_opens_with_datasets_and_is_as_sound_as_before(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / name, tmp_path / "cache")
    before = verify_cache(folder)
    assert write_card(folder)
    assert verify_cache(folder) == before
    rows = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "hf"), split="train")
    assert [(row["id"], row["token_ids"]) for row in rows] == [
        (e.id, e.token_ids.tolist()) for e in CacheReader(folder)
    ]


def test_only_a_card_of_ours_is_replaced(cache: Path) -> None:
    path = cache / CARD
    path.write_text("My notes.")
    assert not write_card(cache)
    assert path.read_text() == "My notes."
    path.write_text(f"{MARK}\nold")
    assert write_card(cache)
    assert path.read_text() == render_card(CacheReader(cache))


def test_a_link_is_not_followed(cache: Path, tmp_path: Path) -> None:
    target = tmp_path / "notes.md"
    target.write_text(MARK)
    (cache / CARD).symlink_to(target)
    assert not write_card(cache)
    assert target.read_text() == MARK


def test_a_teachers_name_cannot_end_its_cell_or_the_header(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "a|b`<script>`: [x]\n---\nlicense: mit"
    reader = CacheReader(cache)
    identity = reader.manifest.identity.model_copy(update={"teacher": name})
    monkeypatch.setattr(reader, "manifest", reader.manifest.model_copy(update={"identity": identity}))
    text = render_card(reader)
    assert "license" not in header(text)
    row = next(line for line in text.splitlines() if line.startswith("| teacher |"))
    assert row.replace("\\|", "").count("|") == 3
    assert row.count("`") == 2

"""`distilllens env`: facts for a bug report that survive a broken installation."""

import json
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from distilllens.cli import cli
from distilllens.env import environment, render_environment

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture(autouse=True)
def metadata_of_this_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed may be another version, or nothing."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].items()
    lines = project["dependencies"] + [f"{one}; extra == '{extra}'" for extra, needed in extras for one in needed]
    monkeypatch.setattr("distilllens.env.requires", lambda name: lines)


def test_the_facts_name_the_versions_that_matter_and_the_extras_that_are_absent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distilllens.env._version", lambda name: None if name == "s3fs" else "1.2")
    facts = environment()
    assert {"torch", "transformers", "deepspeed", "pyarrow"} <= set(facts["packages"])
    assert set(facts["extras"]) == {"bench", "demo", "large", "lora", "s3", "gcs", "track"}
    assert facts["extras"]["s3"] == {"s3fs": None}
    assert "s3fs not installed" in render_environment(facts)


def test_a_torch_that_cannot_be_imported_is_reported_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    facts = environment()
    assert facts["gpus"] == []
    assert "torch fails with ModuleNotFoundError" in render_environment(facts)


def test_json_holds_the_same_facts_as_the_text() -> None:
    runner = CliRunner()
    facts = json.loads(runner.invoke(cli, ["env", "--json"], catch_exceptions=False).stdout)
    text = runner.invoke(cli, ["env"], catch_exceptions=False).stdout
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["packages"]["torch"] in text
    assert facts["cpu"]["num_cores"] >= 1

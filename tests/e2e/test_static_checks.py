"""The linters are tests: style, types, and imports that go downwards only."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


def tool(name: str) -> str:
    """A command of the environment the tests run in, activated or not."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        pytest.fail(f"{name} is not installed: pip install -e '.[dev]' -c constraints.txt")
    return path


def test_ruff_finds_nothing_to_mend() -> None:
    run(sys.executable, "-m", "ruff", "check", "--no-cache", ".")


def test_every_file_is_formatted() -> None:
    run(sys.executable, "-m", "ruff", "format", "--no-cache", "--check", ".")


@pytest.mark.slow
def test_pyright_finds_no_type_error() -> None:
    run(sys.executable, "-m", "pyright", "--pythonpath", sys.executable)


def test_imports_go_downwards_only() -> None:
    run(tool("lint-imports"), "--no-cache")


def test_the_shell_scripts_parse() -> None:
    for script in [*ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"]:
        run("bash", "-n", str(script))


@pytest.mark.parametrize("package", ["distilllens", "distilllens_cache", "distilllens_inspect"])
def test_every_file_says_in_one_line_what_it_is_for(package: str) -> None:
    import ast

    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    for file in Path(spec.origin).parent.rglob("*.py"):
        doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
        assert doc, f"{file} has no docstring"
        assert doc.splitlines()[0].endswith("."), f"{file}: the first line is not a sentence: {doc.splitlines()[0]!r}"
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, f"{file} is longer than 400 lines"

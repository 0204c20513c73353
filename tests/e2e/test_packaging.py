"""What is shipped: an sdist a wheel can be built from, and a wheel with three packages and nothing else."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"distilllens", "distilllens_cache", "distilllens_inspect"}


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", **environment},
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist of the working tree and the wheel built from that sdist; nothing is fetched."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT), cwd=folder)
    return folder


@pytest.fixture(scope="module")
def sdist(dist: Path) -> set[str]:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        return {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}


@pytest.fixture(scope="module")
def wheel(dist: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(dist.glob("*.whl")))


@pytest.fixture(scope="module")
def installed(dist: Path) -> Path:
    """The wheel in a folder of its own."""
    target = dist / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
    ]
    run(*pip, str(next(dist.glob("*.whl"))), cwd=dist)
    return target


def source_files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder.parent))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.slow
def test_the_wheel_holds_the_three_packages_whole_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if not name.endswith("/")}
    shipped = {name for name in names if ".dist-info/" not in name}
    wanted = source_files(ROOT / "distilllens")
    wanted |= source_files(ROOT / "cache/distilllens_cache") | source_files(ROOT / "tools/distilllens_inspect")
    assert shipped == wanted
    assert {name.split("/")[0] for name in shipped} == PACKAGES
    assert {f"{package}/py.typed" for package in PACKAGES} <= shipped
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_sdist_holds_what_the_wheel_is_built_from_and_what_checks_it(sdist: set[str]) -> None:
    wanted = {
        "pyproject.toml",
        "constraints.txt",
        "LICENSE",
        "scripts/test.sh",
        "scripts/lib.sh",
        "tests/conftest.py",
    }
    assert wanted <= sdist
    assert not {name for name in sdist if name.startswith((".venv", "shared", ".git/")) or "__pycache__" in name}


@pytest.mark.slow
def test_the_installed_wheel_runs_and_says_its_version(installed: Path, tmp_path: Path) -> None:
    program = "import distilllens.cli, sys; print(distilllens.cli.__file__)"
    where = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
    assert where.startswith(str(installed))
    said = run(sys.executable, "-m", "distilllens", "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    assert said.strip() == "distilllens, version 0.1.0"


@pytest.mark.slow
def test_nothing_called_cache_or_tools_reaches_site_packages(installed: Path) -> None:
    top = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert top - {"bin"} == PACKAGES


@pytest.mark.parametrize("module", ["distilllens_cache", "distilllens_inspect.commands"])
def test_the_light_packages_import_neither_torch_nor_transformers(module: str, tmp_path: Path) -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'deepspeed', 'distilllens'}"
    program = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    path = f"{ROOT / 'cache'}:{ROOT / 'tools'}"
    assert run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=path).strip() == "[]"


def test_help_and_version_do_not_wait_for_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from distilllens.cli import cli; cli(['train', '--help'], standalone_mode=False);"
        "sys.exit(repr({'torch', 'transformers', 'datasets', 'deepspeed'} & set(sys.modules)))"
    )
    path = f"{ROOT}:{ROOT / 'cache'}:{ROOT / 'tools'}"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": path}, check=False)
    assert done.stderr.strip() == "set()"

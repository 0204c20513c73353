"""README and docs are tests: their bash and python blocks run, in order, in one folder per page."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "cache/README.md")
    if path.is_file() and path.name != "CHANGELOG.md"
]
SET_UP = "<!-- set-up: not run by the tests -->"
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```\s*$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and the line its fence is on."""

    language: str
    code: str
    line: int
    is_set_up: bool


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [
        Block(
            language=match["language"],
            code=re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE),
            line=text.count("\n", 0, match.start()) + 1,
            is_set_up=text[: match.start()].rstrip().endswith(SET_UP),
        )
        for match in _FENCE.finditer(text)
    ]


def runnable(text: str) -> list[Block]:
    return [block for block in blocks(text) if block.language in ("bash", "python") and not block.is_set_up]


def run_page(page: Path, folder: Path) -> None:
    """Run the page's blocks; the first that fails fails the page, with its line and its output."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "HF_HUB_OFFLINE": "1",
    }
    for block in runnable(page.read_text(encoding="utf-8")):
        command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*command, block.code],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{page.name}, line {block.line}:\n{block.code}\n{done.stdout[-4000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_the_page_run(page: Path, tmp_path: Path, tiny_model_folder, tiny_rows, write_jsonl) -> None:
    """In a folder with what the pages take for granted: a model in ``teacher`` and rows in two files."""
    (tmp_path / "teacher").symlink_to(tiny_model_folder("llama", num_layers=6))
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows)
    write_jsonl(tmp_path / "valid.jsonl", tiny_rows[:8])
    run_page(page, tmp_path)


def test_a_block_that_fails_fails_its_page_and_names_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```bash\necho one > made\n```\n\n```bash\ntest -f made\nfalse\ntrue\n```\n")
    with pytest.raises(AssertionError, match=r"page.md, line 7:"):
        run_page(page, tmp_path)
    assert (tmp_path / "made").is_file()


def test_set_up_blocks_and_output_are_not_run_and_everything_else_is() -> None:
    set_up = f"{SET_UP}\n\n```bash\nrm -r x\n```\n"
    text = f"{set_up}```bash\na\n```\n```\nout\n```\n```text\nout\n```\n1. b\n   ```python\n   c\n   ```\n"
    assert [(block.language, block.code) for block in runnable(text)] == [("bash", "a\n"), ("python", "c\n")]


def test_a_set_up_mark_covers_one_block_only() -> None:
    text = f"{SET_UP}\n```bash\na\n```\n\n```bash\nb\n```\n"
    assert [block.code for block in runnable(text)] == ["b\n"]


def test_the_map_in_the_readme_names_every_room() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rooms = {path.stem for path in (ROOT / "distilllens").glob("*.py") if not path.stem.startswith("__")}
    named = set(re.findall(r"`(\w+)`", text[text.index("## The folders") : text.index("## Installing")]))
    assert rooms <= named, sorted(rooms - named)

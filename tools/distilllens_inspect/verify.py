"""The check of a cache, told to people and to machines."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from distilllens_cache import CacheFolder, Problem, VerifyReport, verify_cache
from distilllens_inspect.console import bytes_text
from distilllens_inspect.text import one_line


def check(folder: Path | CacheFolder) -> VerifyReport:
    """Check every file of a cache, with progress on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        return verify_cache(folder)
    with _progress() as told:
        return verify_cache(folder, told)


def verify_json(report: VerifyReport) -> dict[str, Any]:
    """The result for machines."""
    return {
        "is_sound": report.is_sound,
        "files": report.files,
        "num_bytes": report.num_bytes,
        "problems": [asdict(problem) for problem in report.problems],
        "canary": None if report.canary is None else asdict(report.canary),
    }


def print_verify(report: VerifyReport, folder: Path | CacheFolder, console: Console) -> None:
    """A line per problem with the file it is in, then the verdict."""
    for problem in report.problems:
        console.print(_line(problem), style="red")
    checked = f"{report.files} file{'' if report.files == 1 else 's'} ({bytes_text(report.num_bytes)})"
    if report.is_sound:
        console.print(f"{folder} is sound: {checked} checked.", style="green")
    else:
        number = len(report.problems)
        others = f"; {checked} are as written" if report.files else ""
        console.print(f"{folder} failed with {number} problem{'' if number == 1 else 's'}{others}.")
    if report.canary is None:
        if report.is_sound:
            console.print("Canary: no targets to read.")
    elif report.canary.verdict != "failed":
        console.print(f"Canary {report.canary.verdict}. {report.canary.sentence}")


def _line(problem: Problem) -> str:
    what = problem.what if problem.what.startswith(problem.file) else f"{problem.file}: {problem.what}"
    return one_line(what)


@contextmanager
def _progress() -> Iterator[Any]:
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("checking", total=None)

        def tell(name: str, done: int, total: int) -> None:
            progress.update(task, description=name, completed=done, total=total)

        yield tell

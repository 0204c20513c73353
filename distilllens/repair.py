"""Repair a finished cache: check all of it, have the teacher write the damaged shards again, and check once more."""

from collections.abc import Mapping
from pathlib import Path

from distilllens.cache_teacher import run_cache_teacher
from distilllens.config import CacheTeacherConfig
from distilllens.console import counted, say
from distilllens.launch import is_distributed, join_ranks
from distilllens.run_config import RESOLVED
from distilllens_cache import CacheError, Problem, VerifyReport, open_folder, require_free, restore_plan, verify_cache
from distilllens_cache.remote_files import RemoteFiles
from distilllens_inspect.card import CARD

State = Mapping[str, object]
"""Something of each file, by name, that changes when it is written again: of a local one its inode and time."""


def run_repair(config: CacheTeacherConfig) -> str | Path:
    """Write again what is damaged in the finished cache that ``config`` describes, and nothing else; its folder.

    The cache is the one that the same config wrote: a difference is refused and named, as when a run
    continues. ValueError where there is nothing to repair from, or where something remains wrong.
    """
    join_ranks()
    if is_distributed():
        raise ValueError("--repair checks a cache in one process: run it without the launcher")
    folder = config.output_dir
    if not config.dry_run:
        require_free(config.folder)
    problems = _check(folder).problems
    if not problems:
        print(f"{folder} is sound: nothing to repair")
        return folder
    for problem in problems:
        say(f"Damaged: {_sentence(problem)}")
    if config.dry_run:
        print(f"{folder}: {counted(len(problems), 'problem')}; without --dry-run it would be repaired")
        return folder
    before = _state(folder)
    if isinstance(folder, Path):
        restore_plan(folder)
    run_cache_teacher(config.model_copy(update={"repair": False}), damaged=[problem.file for problem in problems])
    after = _state(folder)
    written = sorted(name for name, state in after.items() if before.get(name) != state and name not in UNCHECKED)
    remaining = _check(folder).problems
    print(f"{folder}: {counted(len(written), 'file')} written again: {', '.join(written) or 'none'}")
    if remaining:
        raise ValueError(
            f"{folder} is still not sound: "
            + "; ".join(map(_sentence, remaining[:5]))
            + ". Repair what is named, or write the cache anew with --overwrite."
        )
    print(f"{folder} is sound again")
    return folder


UNCHECKED = (RESOLVED, CARD)
"""Files beside the cache that a pass writes whenever it ends."""


def _check(folder: str | Path) -> VerifyReport:
    """The report of a cache that is finished, as far as can be told."""
    place = open_folder(folder)
    if not place.exists("manifest.json") and not place.exists("plan.json"):
        raise CacheError(f"--repair: {folder} holds no cache. Without --repair one is written.")
    say(f"Checking every file of {folder}")
    report = verify_cache(folder)
    if any(problem.file == "manifest.json" and " is unfinished" in problem.what for problem in report.problems):
        num_shards = sum(name.startswith("shards/") and name.endswith(".json") for name in _state(folder))
        raise CacheError(
            f"--repair: {folder} has {counted(num_shards, 'finished shard')} and no manifest.json, so it was not "
            f"finished. Run the same command without --repair: it continues, and writes damaged shards again too."
        )
    return report


def _state(folder: str | Path) -> State:
    if isinstance(folder, str):
        return RemoteFiles(folder).states()
    files = ((path, path.lstat()) for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (state.st_ino, state.st_mtime_ns) for path, state in files}


def _sentence(problem: Problem) -> str:
    return problem.what if problem.what.startswith(problem.file) else f"{problem.file}: {problem.what}"

"""Caches that somebody forged: every digest fits, the contents do not."""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp

from faultlab.material import files_of, put_files
from faultlab.outcome import Outcome
from faultlab.reading import digest_of, judge_hostile
from faultlab.seals import Files, resealed
from faultlab.watch import Watch

Forgery = Callable[[random.Random, Files], Files]
"""New contents of some files."""
Trap = Callable[[random.Random, Path], None]
"""Puts something into a cache's folder that is no ordinary file."""


@dataclass
class Forged:
    """Trials that forge a copy of one of some caches, and watch both readers as they open it."""

    caches: tuple[Path, ...]
    forge: Forgery
    seed: int
    scratch: Path
    _sound: dict[Path, str] = field(default_factory=dict)

    def __call__(self, number: int) -> Outcome:
        rng = random.Random(f"{self.seed}/{self.forge.__name__}/{number}")
        folder = self.folders[number % len(self.folders)]
        files = self.files[folder]
        changes = resealed(files, self.forge(rng, files))
        put_files(folder, changes)
        try:
            return self._read(folder)
        finally:
            for name in changes:
                if name in files:
                    (folder / name).write_bytes(files[name])
                else:
                    (folder / name).unlink()

    def _read(self, folder: Path) -> Outcome:
        with self.watch as watch:
            outcome = judge_hostile(folder, self._sound[folder])
        return Outcome("did more than read", "; ".join(watch.seen[:3])) if watch.seen else outcome

    @cached_property
    def files(self) -> dict[Path, Files]:
        return {folder: files_of(folder) for folder in self.folders}

    @cached_property
    def folders(self) -> list[Path]:
        """Copies of the caches, after both readers have read each: whatever they load lazily is loaded."""
        made = []
        for cache in self.caches:
            folder = put_files(Path(mkdtemp(dir=self.scratch)), files_of(cache))
            self._sound[folder] = digest_of(folder)
            judge_hostile(folder, self._sound[folder])
            made.append(folder)
        return made

    @cached_property
    def watch(self) -> Watch:
        return Watch(self.scratch)


@dataclass
class Trapped(Forged):
    """Trials that put links, pipes, devices and folders where files belong."""

    def __call__(self, number: int) -> Outcome:
        rng = random.Random(f"{self.seed}/traps/{number}")
        source = self.folders[number % len(self.folders)]
        folder = Path(mkdtemp(dir=self.scratch))
        try:
            put_files(folder, self.files[source])
            self._sound[folder] = self._sound[source]
            trap(rng, folder)
            outcome = self._read(folder)
            return Outcome("taken", "what is no file was taken for one") if "accepted" in outcome.what else outcome
        finally:
            del self._sound[folder]
            shutil.rmtree(folder)


def no_forgery(rng: random.Random, files: Files) -> Files:
    """Nothing: the files are as they were."""
    return {}


def trap(rng: random.Random, folder: Path) -> None:
    """A link, a pipe, a device, a folder, a huge file or a loop in the place of a file or folder of a cache."""
    names = sorted(files_of(folder))
    path = folder / rng.choice([*names, *names, "shards", "tokenizer", "sketches"])
    kind = rng.choice(["link", "loop", "far link", "null", "pipe", "folder", "sparse", "zero", "socket", "inner link"])
    kept = folder.with_name(f"{folder.name}.kept")
    if path.is_dir():
        shutil.rmtree(kept, ignore_errors=True)
        path.rename(kept)
    else:
        kept.unlink(missing_ok=True) if not kept.is_dir() else shutil.rmtree(kept)
        path.rename(kept)
    if kind == "link":  # the very content, but elsewhere
        path.symlink_to(kept)
    elif kind == "inner link":
        path.symlink_to(folder / "plan.json")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "far link":
        path.symlink_to("/etc/passwd")
    elif kind == "null":
        path.symlink_to("/dev/null")
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind in ("pipe", "socket"):
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)

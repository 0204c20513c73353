"""Writers that are disturbed, and what has to come of it: after the next run, the bytes of an undisturbed one."""

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

from distilllens_cache import CacheError, layout, verify_cache
from faultlab.child import Ended, in_child
from faultlab.material import Files, Material, files_of, put_files
from faultlab.outcome import Outcome
from faultlab.reading import digest_of
from faultlab.system_calls import counting

Start = str
STARTS: tuple[Start, ...] = ("nothing", "half", "damaged", "overwrite")
"""What a writer may find: no folder; a plan with one shard and a torn file; a finished cache with a bad shard."""


@dataclass
class Writing:
    """What trials with disturbed writers share: caches to replay, and what they have to be in the end."""

    cache: Path
    seed: int
    scratch: Path
    wanted: Files = field(init=False)
    sound: str = field(init=False)
    material: Material = field(init=False)

    def __post_init__(self) -> None:
        self.material = Material.of(self.cache)
        # A codec that is not lossless keeps targets apart from those it was given: what counts is a replay.
        folder = self.folder()
        self.material.write(folder)
        self.wanted = files_of(folder)
        self.sound = digest_of(folder)
        shutil.rmtree(folder.parent)

    def folder(self, start: Start = "nothing") -> Path:
        """A new place for a cache, and what lies there when the writer comes."""
        folder = Path(mkdtemp(dir=self.scratch)) / "cache"
        if start == "half":
            keep = ("plan", "index", "tokenizer", "sketches", "shards/00000.")
            put_files(folder, {name: data for name, data in self.wanted.items() if name.startswith(keep)})
            put_files(folder, {"shards/00001.arrow.tmp-7": b"torn"})
        elif start == "damaged":
            put_files(folder, self.wanted)
            path = folder / "shards/00000.arrow"
            path.write_bytes(path.read_bytes()[:-5])
        elif start == "overwrite":
            put_files(folder, self.wanted | {"shards/00000.arrow": b"", "shards/00009.json": b"{}"})
        return folder

    def write(self, folder: Path, start: Start = "nothing") -> None:
        self.material.write(folder, overwrite=start == "overwrite")

    def finish(self, folder: Path, what: str, start: Start = "nothing") -> Outcome:
        """Run once more, undisturbed; the bytes must be those of an undisturbed cache."""
        fault = self.between(folder)
        if not fault:
            ended = in_child(lambda: self.write(folder, start))
            fault = "" if ended.how == "done" else f"the next run {ended.how}: {ended.text}"
        fault = fault or self.difference(folder)
        shutil.rmtree(folder.parent)
        return Outcome(what, fault)

    def between(self, folder: Path) -> str:
        """What is wrong about an unfinished cache: readers must refuse it, or find all of it."""
        try:
            found = digest_of(folder)
        except CacheError:
            found = None
        if found not in (None, self.sound):
            return "a reader took other targets from it"
        if found is None and folder.is_dir() and (folder / layout.PLAN).is_file() and verify_cache(folder).is_sound:
            return "verify found it sound, the reader did not"
        return ""

    def difference(self, folder: Path) -> str:
        found = files_of(folder)
        if found == self.wanted:
            return ""
        names = sorted(name for name in found.keys() | self.wanted.keys() if found.get(name) != self.wanted.get(name))
        return f"these files differ from an undisturbed cache's: {names}"

    def count_calls(self, start: Start) -> int:
        """How many system calls an undisturbed run makes."""
        folder = self.folder(start)
        pipe = folder.parent / "count"

        def work() -> None:
            calls = counting().install()
            self.write(folder, start)
            number = calls.count
            pipe.write_text(str(number))

        ended = in_child(work)
        assert ended.how == "done", ended.text
        number = int(pipe.read_text())
        shutil.rmtree(folder.parent)
        return number


@dataclass
class Refusals(Writing):
    """Trials in which a run may fail: with a sentence, and nothing lost."""

    def outcome(self, ended: Ended, folder: Path, start: Start = "nothing") -> Outcome:
        if ended.how == "raised" or (ended.how == "refused" and len(ended.text) < 20):
            shutil.rmtree(folder.parent, ignore_errors=True)
            return Outcome("raised", ended.text)
        return self.finish(folder, ended.how, start)


def timed(work: Callable[[], None]) -> float:
    """Seconds that ``work`` takes in a child, the median of three."""
    taken = []
    for _ in range(3):
        started = time.monotonic()
        in_child(work)
        taken.append(time.monotonic() - started)
    return sorted(taken)[1]


def rng_of(seed: int, what: str, number: int) -> random.Random:
    """The dice of a trial."""
    return random.Random(f"{seed}/{what}/{number}")

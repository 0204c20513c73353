"""Files that a disk, a network or a copy command got wrong: flipped bits, bursts, cut ends, swapped files."""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp

from distilllens_cache import layout
from faultlab.material import files_of, put_files
from faultlab.outcome import Outcome
from faultlab.reading import digest_of, judge

Files = dict[str, bytes]
Changes = dict[str, bytes | None]
"""New contents of some files by name; None takes the file away."""
Harm = Callable[[random.Random, Files], Changes]

PAGE = 4096


@dataclass
class Damage:
    """Trials that harm a copy of one of some caches, and ask both readers."""

    caches: Sequence[Path]
    harm: Harm
    seed: int
    scratch: Path

    @cached_property
    def copies(self) -> "list[Copy]":
        return [Copy(cache, Path(mkdtemp(dir=self.scratch))) for cache in self.caches]

    def __call__(self, number: int) -> Outcome:
        rng = random.Random(f"{self.seed}/{self.harm.__name__}/{number}")
        copy = self.copies[number % len(self.copies)]
        return copy.judge(self.harm(rng, copy.files))


@dataclass
class Copy:
    """A cache that may be harmed and is put right again."""

    source: Path
    folder: Path
    files: Files = field(init=False)
    sound: str = field(init=False)

    def __post_init__(self) -> None:
        # What lies beside a cache for people is no part of it, and nobody who reads a cache opens it.
        beside = (layout.CARD, layout.CONFIG)
        self.files = {name: data for name, data in files_of(self.source).items() if name not in beside}
        put_files(self.folder, self.files)
        self.sound = digest_of(self.folder)

    def judge(self, changes: Changes) -> Outcome:
        changed = [name for name, data in changes.items() if data != self.files[name]]
        if not changed:
            return Outcome("unchanged", "the harm did nothing: the trial proves nothing")
        for name, data in changes.items():
            if data is None:
                os.unlink(self.folder / name)
            else:
                (self.folder / name).write_bytes(data)
        try:
            return judge(self.folder, changed, self.sound)
        finally:
            for name in changes:
                (self.folder / name).write_bytes(self.files[name])


def flip(rng: random.Random, files: Files) -> Changes:
    """One bit of one file, whichever file: each is as likely as any other."""
    name = rng.choice(sorted(name for name, data in files.items() if data))
    data = bytearray(files[name])
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return {name: bytes(data)}


def garbage(rng: random.Random, files: Files) -> Changes:
    """64 random bytes."""
    name = _any_shard_or_other(rng, files)
    return {name: _over(files[name], rng.randrange(len(files[name])), rng.randbytes(64))}


def zeroed_page(rng: random.Random, files: Files) -> Changes:
    """A page of zeros, as after a power cut."""
    return _changed(rng, files, lambda name, at: bytes(PAGE))


def stale_page(rng: random.Random, files: Files) -> Changes:
    """A page of another file, or of another place in the same."""

    def other(name: str, at: int) -> bytes:
        source = files[rng.choice(_large(files))]
        start = rng.randrange(max(1, len(source) - PAGE + 1))
        return source[start : start + PAGE]

    return _changed(rng, files, other)


def swapped(rng: random.Random, files: Files) -> Changes:
    """Two files of one kind in each other's place."""
    one, other = rng.sample(rng.choice(_kinds(files)), 2)
    return {one: files[other], other: files[one]}


def duplicated(rng: random.Random, files: Files) -> Changes:
    """A file in the place of another of its kind."""
    one, other = rng.sample(rng.choice(_kinds(files)), 2)
    return {one: files[other]}


def appended(rng: random.Random, files: Files) -> Changes:
    """Bytes after the end."""
    name = rng.choice(sorted(files))
    data = rng.choice([bytes(rng.randrange(1, PAGE)), rng.randbytes(rng.randrange(1, 100)), b"\n", files[name] or b"x"])
    return {name: files[name] + data}


def cut(rng: random.Random, files: Files) -> Changes:
    """A file that ends too early, at any length."""
    name = rng.choice(sorted(name for name, data in files.items() if data))
    return {name: files[name][: rng.randrange(len(files[name]))]}


def gone(rng: random.Random, files: Files) -> Changes:
    """A file that is missing, or empty."""
    name = rng.choice(sorted(name for name, data in files.items() if data))
    return {name: rng.choice([None, b""])}


BURSTS: tuple[Harm, ...] = (garbage, zeroed_page, stale_page, swapped, duplicated, appended)


@dataclass
class EveryLength(Damage):
    """Trial n: the file ``name`` of the only cache, cut to n bytes."""

    name: str = ""

    def __call__(self, number: int) -> Outcome:
        copy = self.copies[0]
        return copy.judge({self.name: copy.files[self.name][:number]})


@dataclass
class EveryFileGone(Damage):
    """Each file of the only cache missing, then each empty."""

    def __call__(self, number: int) -> Outcome:
        copy = self.copies[0]
        names = sorted(name for name, data in copy.files.items() if data)
        return copy.judge({names[number // 2]: None if number % 2 else b""})


def _over(data: bytes, at: int, patch: bytes) -> bytes:
    return data[:at] + patch[: len(data) - at] + data[at + len(patch) :]


def _any_shard_or_other(rng: random.Random, files: Files) -> str:
    names = sorted(name for name, data in files.items() if data)
    return rng.choice(rng.choice([[name for name in names if name.startswith("shards/")], names]))


def _large(files: Files) -> list[str]:
    return sorted(name for name, data in files.items() if len(data) >= PAGE) or sorted(files)


def _changed(rng: random.Random, files: Files, patch: Callable[[str, int], bytes]) -> Changes:
    """A page at a multiple of its size, in a file and of a content that make a difference."""
    while True:
        name = rng.choice(_large(files))
        at = PAGE * rng.randrange(max(1, -(-len(files[name]) // PAGE)))
        data = _over(files[name], at, patch(name, at))
        if data != files[name]:
            return {name: data}


def _kinds(files: Files) -> list[list[str]]:
    """Groups of files that differ and could be taken for each other."""
    shards = sorted(name for name in files if name.startswith("shards/"))
    kinds = [
        [name for name in shards if name.partition(".")[2] == kind] for kind in {n.partition(".")[2] for n in shards}
    ]
    kinds.append(sorted(name for name in files if name.startswith("sketches/") and name.endswith(".json")))
    return sorted(kind for kind in kinds if len(kind) > 1)

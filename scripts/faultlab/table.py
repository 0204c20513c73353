"""The table of fault tests: what each row does, how often, and with which caches."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from faultlab import (
    damage,
    failures,
    forged_arrow,
    forged_json,
    hostile,
    identities,
    kills,
    races,
    surroundings,
    teacher,
)
from faultlab.material import files_of, handmade
from faultlab.outcome import Tally
from faultlab.pool import Trial, run


@dataclass
class Bench:
    """Where faults are done: a scratch folder, dice, and some sound caches."""

    scratch: Path
    seed: int = 0
    workers: int = 1
    more: Sequence[Path] = ()
    """Finished caches beside the handmade ones, of which the first is what disturbed writers replay."""
    progress: Callable[[int], None] | None = None
    until: float = math.inf
    """When to start no more trials, by `time.monotonic`."""
    used: set[str] = field(default_factory=set)
    """Names of the caches that trials were about; none if each made its own."""

    @cached_property
    def tiny(self) -> tuple[Path, ...]:
        """One shard of two examples, by codec."""
        return self._made("arrow-fp32 packed".split(), "tiny")

    @cached_property
    def small(self) -> tuple[Path, ...]:
        """Two shards, all kinds of tails, by codec."""
        return self._made("arrow-fp32 packed".split(), "small")

    @cached_property
    def large(self) -> Path:
        """Three shards of some pages each."""
        return self._made(["packed"], "large")[0]

    @cached_property
    def mixed(self) -> tuple[Path, ...]:
        """The small caches, and now and then a large one."""
        self.used |= {folder.name for folder in self.more}
        return (*self.small * 4, self.large, *self.more)

    @property
    def replayed(self) -> Path:
        """What disturbed writers write."""
        if not self.more:
            return self.small[1]
        self.used.add(self.more[0].name)
        return self.more[0]

    def run(self, trial: Trial, numbers: Sequence[int], *, memory_mb: int = 768) -> Tally:
        return run(trial, numbers, workers=self.workers, memory_mb=memory_mb, until=self.until, progress=self.progress)

    def _made(self, codecs: Sequence[str], size: str) -> tuple[Path, ...]:
        self.used.add("handmade")
        made = [self.scratch / f"{size}-{codec}" for codec in codecs]
        for folder, codec in zip(made, codecs, strict=True):
            handmade(folder, codec=codec, size=size)
        return tuple(made)


class Row(NamedTuple):
    """One kind of fault."""

    name: str
    trials: int | None
    """The full count; None where there is one trial for each of something."""
    quick: int
    """How many trials CI runs; 0 where a trial takes too long."""
    run: Callable[[Bench, int | None], Tally]
    """Runs so many trials, or all that there are."""


def spread(number: int, trials: int | None) -> list[int]:
    """All of ``number`` trials, or some of them, evenly spread."""
    if trials is None or trials >= number:
        return list(range(number))
    return [place * number // trials for place in range(trials)]


def _damage(harm: damage.Harm) -> Callable[[Bench, int | None], Tally]:
    return lambda bench, trials: bench.run(
        damage.Damage(bench.mixed, harm, bench.seed, bench.scratch), range(trials or 0)
    )


def _every_length(bench: Bench, trials: int | None) -> Tally:
    name = "shards/00000.arrow"
    trial = damage.EveryLength([bench.small[1]], damage.cut, bench.seed, bench.scratch, name)
    return bench.run(trial, spread(len(files_of(bench.small[1])[name]), trials))


def _lengths_of_a_large_one(bench: Bench, trials: int | None) -> Tally:
    name = "shards/00000.arrow"
    trial = damage.EveryLength([bench.large], damage.cut, bench.seed, bench.scratch, name)
    return bench.run(trial, spread(len(files_of(bench.large)[name]), trials))


def _every_file_gone(bench: Bench, trials: int | None) -> Tally:
    trial = damage.EveryFileGone([bench.small[0]], damage.gone, bench.seed, bench.scratch)
    return bench.run(trial, spread(2 * len(files_of(bench.small[0])), trials))


def _random_kills(bench: Bench, trials: int | None) -> Tally:
    trial = kills.RandomKills(bench.replayed, bench.seed, bench.scratch)
    _ = trial.duration
    return bench.run(trial, range(trials or 0), memory_mb=4096)


def _kills_at_calls(bench: Bench, trials: int | None) -> Tally:
    trial = kills.KillsAtCalls(bench.replayed, bench.seed, bench.scratch)
    return bench.run(trial, spread(len(trial.points), trials), memory_mb=4096)


def _failing_calls(bench: Bench, trials: int | None) -> Tally:
    trial = failures.FailingCalls(bench.replayed, bench.seed, bench.scratch)
    return bench.run(trial, spread(len(trial.points), trials), memory_mb=4096)


def _small_files(bench: Bench, trials: int | None) -> Tally:
    number = trials or 20
    return bench.run(
        failures.SmallFiles(bench.replayed, bench.seed, bench.scratch, number), range(number), memory_mb=4096
    )


def _full_disks(bench: Bench, trials: int | None) -> Tally:
    number = trials or 20
    if not failures.may_mount(bench.scratch):
        return Tally()
    return bench.run(
        failures.FullDisks(bench.replayed, bench.seed, bench.scratch, number), range(number), memory_mb=4096
    )


def _killed_passes(bench: Bench, trials: int | None) -> Tally:
    return bench.run(teacher.KilledPass(bench.seed, _made(bench, "killed")), range(trials or 0), memory_mb=1 << 20)


def _surroundings(bench: Bench, trials: int | None) -> Tally:
    trial = surroundings.Surroundings(bench.replayed, bench.seed, bench.scratch)
    return bench.run(trial, range(trials or 0), memory_mb=1 << 20)


def _passes_elsewhere(bench: Bench, trials: int | None) -> Tally:
    trial = teacher.OtherSurroundings(bench.seed, _made(bench, "elsewhere"))
    return bench.run(trial, range(trials or 0), memory_mb=1 << 20)


def _teacher_gone(bench: Bench, trials: int | None) -> Tally:
    return bench.run(teacher.TeacherGone(bench.seed, _made(bench, "gone")), range(trials or 0), memory_mb=1 << 20)


def _made(bench: Bench, name: str) -> Path:
    folder = bench.scratch / name
    folder.mkdir()
    return folder


def _races(bench: Bench, trials: int | None) -> Tally:
    return bench.run(races.Races(bench.replayed, bench.seed, bench.scratch), range(trials or 0), memory_mb=4096)


def _identities(bench: Bench, trials: int | None) -> Tally:
    trial = identities.OtherIdentities(bench.small[1], bench.seed, bench.scratch)
    return bench.run(trial, spread(len(trial.neighbours), trials))


def _readers(bench: Bench, trials: int | None) -> Tally:
    return bench.run(identities.OtherReaders(bench.small[1], bench.seed, bench.scratch), spread(5, trials))


def _forged(forge: hostile.Forgery) -> Callable[[Bench, int | None], Tally]:
    return lambda bench, trials: bench.run(
        hostile.Forged(bench.tiny, forge, bench.seed, bench.scratch), range(trials or 0)
    )


def _traps(bench: Bench, trials: int | None) -> Tally:
    return bench.run(hostile.Trapped(bench.tiny, hostile.no_forgery, bench.seed, bench.scratch), range(trials or 0))


ROWS: tuple[Row, ...] = (
    Row("bit flips", 10_000, 60, _damage(damage.flip)),
    Row("bursts: 64 bytes of garbage", 2000, 12, _damage(damage.garbage)),
    Row("bursts: a zeroed page", 2000, 12, _damage(damage.zeroed_page)),
    Row("bursts: a stale page", 2000, 12, _damage(damage.stale_page)),
    Row("bursts: swapped files", 2000, 12, _damage(damage.swapped)),
    Row("bursts: duplicated files", 2000, 12, _damage(damage.duplicated)),
    Row("bursts: appended junk", 2000, 12, _damage(damage.appended)),
    Row("truncation: every length of a small shard", None, 20, _every_length),
    Row("truncation: lengths of a large shard", 1000, 6, _lengths_of_a_large_one),
    Row("truncation: lengths of any file", 1000, 20, _damage(damage.cut)),
    Row("truncation: each file missing and empty", None, 40, _every_file_gone),
    Row("kill -9 at random times, nested", 190, 12, _random_kills),
    Row("kill -9 at every system call, nested", None, 40, _kills_at_calls),
    Row("kill -9 of a whole teacher pass, twice each", 10, 0, _killed_passes),
    Row("failing system calls", None, 40, _failing_calls),
    Row("disk full: RLIMIT_FSIZE, then resumed", 20, 4, _small_files),
    Row("disk full: a small tmpfs, then enlarged", 20, 4, _full_disks),
    Row("races of 2 to 4 writers", 50, 6, _races),
    Row("wrong identity: each field by one element", None, 60, _identities),
    Row("wrong identity: fields that readers compare", None, 5, _readers),
    Row("hostile manifests, plans and commits", 100_000, 300, _forged(forged_json.forged_json)),
    Row("hostile shards and other Arrow files", 100_000, 200, _forged(forged_arrow.forged_arrow)),
    Row("hostile folders: links, pipes, devices", 1000, 60, _traps),
    Row("determinism: hash seed, locale, time zone, order, ranks, folder", 20, 3, _surroundings),
    Row("determinism: the same, of a whole teacher pass", 4, 0, _passes_elsewhere),
    Row("teacher gone, network denied, a student trained", 1, 1, _teacher_gone),
)
"""In the order in which they are reported. The audit hook watches the three rows of hostile files."""

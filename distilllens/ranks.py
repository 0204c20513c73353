"""The ranks of a run that writes one cache: who this process is among them, and how it waits for the others.

They meet in the cache's folder only, so nothing but the environment of a launcher is needed, and no process group.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from distilllens_cache import CacheError, CacheWriter, Seat

SECONDS_TO_COME = 1800.0
"""Longest wait for a rank that has not begun: it may have a large teacher to load."""
LONGEST_PAUSE = 5.0
"""Seconds between two looks, at most."""
SECONDS_IN_SILENCE = 5.0
"""A wait that takes longer is told."""
RUN_VARIABLES = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")
"""What tells one run from another."""


@dataclass(frozen=True)
class Ranks:
    """One process among ``world_size`` that write one cache."""

    rank: int = 0
    world_size: int = 1
    run: str = ""

    @property
    def is_main(self) -> bool:
        """Whether this rank calibrates, and tells the results."""
        return self.rank == 0

    @property
    def seat(self) -> Seat:
        """This process's place in the folder."""
        return Seat(self.rank, self.world_size, self.run)

    def gather(self, writer: CacheWriter, mark: str) -> None:
        """Wait until every rank has told ``mark``; CacheError if one tells something else."""
        writer.lock.mark(mark)
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        seen: dict[int, tuple[str, ...]] = {}

        def silent() -> list[int]:
            seen.update((rank, marks) for rank in others if (marks := writer.lock.marks(rank)))
            return [rank for rank in others if rank not in seen]

        self.wait(writer, "to begin", silent, seconds_to_come=SECONDS_TO_COME)
        for rank, marks in seen.items():
            if mark not in marks:
                raise CacheError(
                    f"rank {rank} finds other shards finished in {writer.folder} than rank {self.rank}: see that all "
                    f"ranks reach the same folder, and run the same command again."
                )

    def wait(
        self, writer: CacheWriter, what: str, still: Callable[[], Iterable[int]], *, seconds_to_come: float = 0.0
    ) -> None:
        """Wait until ``still``, which gives the ranks that are waited for, gives none, or the cache is finished.

        CacheError once one of them has gone, or has not come after ``seconds_to_come``.
        """
        started = time.monotonic()
        pause, is_told = 0.05, False
        came: set[int] = set()

        def waiting() -> set[int]:
            return set() if writer.look_again() else set(still())

        while ranks := waiting():
            waited = time.monotonic() - started
            lives = {rank: writer.lock.is_alive(rank) for rank in ranks}
            came |= {rank for rank in ranks if lives[rank] is not None}
            gone = {rank for rank in ranks if not lives[rank] and (rank in came or waited >= seconds_to_come)}
            if gone := gone & waiting():  # it may have done its part just before it went
                raise CacheError(self._gone(sorted(gone), what, waited, has_come=not seconds_to_come or gone <= came))
            if waited > SECONDS_IN_SILENCE and not is_told:
                print(f"Rank {self.rank} waits for {_named(ranks)} {what}", file=sys.stderr, flush=True)
                is_told = True
            time.sleep(pause)
            pause = min(LONGEST_PAUSE, 1.5 * pause)

    def _gone(self, missing: list[int], what: str, waited: float, *, has_come: bool) -> str:
        if has_come:
            return (
                f"{_named(missing)} stopped, so rank {self.rank} waits in vain for them {what}. What is finished is "
                f"kept: run the same command again, with any number of ranks."
            )
        return (
            f"{_named(missing)} of {self.world_size} did not come within {waited / 60:.0f} minutes. Start all ranks "
            f"with the same command and one launcher, so that RANK is each number from 0 to {self.world_size - 1}."
        )


def ranks_of_environment() -> Ranks:
    """This process's rank, once `launch.join_ranks` has checked and completed what the launcher says of it."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Ranks()
    run = " ".join(f"{name}={os.environ[name]}" for name in RUN_VARIABLES if name in os.environ)
    return Ranks(int(os.environ["RANK"]), world_size, f"{world_size} ranks {run}".rstrip())


def _named(numbers: Iterable[int]) -> str:
    texts = [str(number) for number in sorted(numbers)]
    names = ", ".join(texts[:5]) + (", …" if len(texts) > 5 else "")
    return f"rank {names}" if len(texts) == 1 else f"ranks {names}"

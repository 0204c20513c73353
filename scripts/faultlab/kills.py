"""kill -9, at any time and at every system call, again and again while the writer continues."""

from dataclasses import dataclass
from functools import cached_property

from faultlab.child import in_child
from faultlab.outcome import Outcome
from faultlab.system_calls import MOMENTS, Moment, killing
from faultlab.writing import STARTS, Start, Writing, rng_of, timed

MOST_NESTED = 4


@dataclass
class RandomKills(Writing):
    """A writer killed at a random time, and so is the next one, up to four times."""

    @cached_property
    def duration(self) -> float:
        return timed(lambda: self.write(self.folder()))

    def __call__(self, number: int) -> Outcome:
        rng = rng_of(self.seed, "kill", number)
        start = rng.choice(STARTS)
        folder = self.folder(start)
        killed = 0
        for _ in range(rng.randint(1, MOST_NESTED)):
            ended = in_child(lambda: self.write(folder, start), kill_after=rng.uniform(0, 1.2 * self.duration))
            if ended.how not in ("killed", "done"):
                return Outcome("raised", ended.text)
            killed += ended.how == "killed"
            if fault := self.between(folder):
                return Outcome("misread", fault)
        return self.finish(folder, f"killed {killed} times, then finished", start)


@dataclass
class KillsAtCalls(Writing):
    """A writer killed at a certain call, before, after or within; every third continues into another such kill.

    Trial n is the n-th of all points, which come in the order of `points`.
    """

    @cached_property
    def points(self) -> list[tuple[Start, int, Moment]]:
        return [
            (start, nth, moment)
            for start in STARTS
            for nth in range(1, self.count_calls(start) + 1)
            for moment in MOMENTS
        ]

    def __call__(self, number: int) -> Outcome:
        rng = rng_of(self.seed, "point", number)
        start, nth, moment = self.points[number % len(self.points)]
        folder = self.folder(start)
        num_killed = 0
        for place in (nth, *(rng.randint(1, 40) for _ in range(number % 3))):

            def work(place: int = place) -> None:
                killing(place, moment).install()
                self.write(folder, start)

            ended = in_child(work)
            if ended.how not in ("killed", "done"):
                return Outcome("raised", ended.text)
            num_killed += ended.how == "killed"
            if fault := self.between(folder):
                return Outcome("misread", fault)
        return self.finish(folder, f"killed {num_killed} times, then finished", start)

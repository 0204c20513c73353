"""Two to four writers at once, on one folder."""

import os
import re
import shutil
from dataclasses import dataclass

from faultlab.child import start, wait_for
from faultlab.outcome import Outcome
from faultlab.writing import Writing, rng_of

HOLDER = re.compile(r"process \d+ on")
"""What a writer that is kept out must say."""


@dataclass
class Races(Writing):
    """Writers set off at one moment: those that end well leave the right bytes, the others are told why."""

    def __call__(self, number: int) -> Outcome:
        rng = rng_of(self.seed, "race", number)
        beginning = rng.choice(["nothing", "half", "damaged"])
        folder = self.folder(beginning)
        gate, hold = os.pipe()

        def work() -> None:
            os.close(hold)
            os.read(gate, 1)  # ends when the parent lets go of the other end
            self.write(folder)

        writers = [start(work) for _ in range(rng.randint(2, 4))]
        os.close(gate)
        os.close(hold)
        ended = [wait_for(writer) for writer in writers]
        what = f"{sum(one.how == 'done' for one in ended)} of {len(ended)} finished"
        if wrong := next((one.text for one in ended if one.how not in ("done", "refused")), ""):
            shutil.rmtree(folder.parent)
            return Outcome("raised", wrong)
        refusals = [one.text for one in ended if one.how == "refused"]
        if len(refusals) == len(ended) or not all(map(HOLDER.search, refusals)):
            shutil.rmtree(folder.parent)
            return Outcome("not told who", f"{what}; {refusals}")
        return self.finish(folder, what)

"""The same cache written under another hash seed, locale, time zone, order of shards, number of ranks, and folder."""

import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import mkdtemp

from faultlab.outcome import Outcome
from faultlab.writing import Writing, rng_of

ROOT = Path(__file__).parents[2]
LOCALES = ("C", "C.UTF-8", "POSIX", "de_DE.UTF-8", "tr_TR.UTF-8", "ja_JP.eucJP")
ZONES = ("UTC", "Asia/Kathmandu", "America/St_Johns", "Pacific/Kiritimati", "XXX-25")
FOLDERS = ("a", "é ü", "deep/er/still", "with space", "x" * 100)
MOST_RANKS = 3
CODE = """
import pickle, random, sys
material = pickle.load(sys.stdin.buffer)
from pathlib import Path
material.write_by(int(sys.argv[3]), Path(sys.argv[1]), order=random.Random(int(sys.argv[2])))
"""


@dataclass
class Surroundings(Writing):
    """A replay in a new process each time."""

    def __call__(self, number: int) -> Outcome:
        rng = rng_of(self.seed, "surroundings", number)
        folder = Path(mkdtemp(dir=self.scratch), rng.choice(FOLDERS), rng.choice(FOLDERS))
        ended = subprocess.run(
            [sys.executable, "-c", CODE, folder, str(number), str(1 + number % MOST_RANKS)],
            input=pickle.dumps(self.material),
            env=os.environ | draw(rng) | {"PYTHONPATH": os.pathsep.join(map(str, paths()))},
            capture_output=True,
        )
        if ended.returncode:
            return Outcome("raised", ended.stderr.decode(errors="replace")[-1000:])
        return Outcome("the same bytes", self.difference(folder))


def draw(rng: Random) -> dict[str, str]:
    """Variables of a process that must make no difference."""
    locale = rng.choice(LOCALES)
    return {
        "PYTHONHASHSEED": str(rng.randrange(1, 2**32 - 1)),
        "LANG": locale,
        "LC_ALL": locale,
        "TZ": rng.choice(ZONES),
        "COLUMNS": str(rng.choice([20, 80, 500])),
    }


def paths() -> list[Path]:
    """Where a new process finds the project and this package."""
    return [ROOT, *(ROOT / part for part in ("cache", "tools", "scripts"))]

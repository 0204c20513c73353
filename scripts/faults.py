"""The full counts of the fault tests: bits flipped, writers killed, disks filled, files forged.

    python scripts/faults.py                    # all rows: hours on two cores
    python scripts/faults.py --rows "kill"      # those with "kill" in their name
    python scripts/faults.py --trials 100       # at most 100 trials of each row
    python scripts/faults.py --table            # what is there already, as Markdown

With --cache, rows that harm files harm copies of that cache too, and rows that disturb writers (kills, failing calls,
full disks, races, determinism) write its targets again in place of handmade ones; the table names each row's caches.

Results are JSON lines in faults.jsonl here, or where --results says. A row that is there with the same count, seed and
caches is not run again, so a stopped run continues. One that --minutes cut short is.
Ends with exit code 1 if a cache broke a promise.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / part) for part in ("cache", "tools", "scripts"))]

import numpy  # noqa: E402
import pyarrow  # noqa: E402
import pydantic  # noqa: E402

from distilllens_cache import CacheReader  # noqa: E402
from faultlab.table import ROWS, Bench, Row  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=Path("faults.jsonl"), help="JSON lines: one for each finished row (%(default)s)"
    )
    parser.add_argument("--rows", default="", help="only rows with this in their name; several after commas")
    parser.add_argument("--trials", type=int, help="at most so many trials a row (default: the full counts)")
    parser.add_argument("--minutes", type=float, help="start no trial of a row after so long; what was reached counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--cache", type=Path, action="append", default=[], help="harm this finished cache too; writers replay the first"
    )
    parser.add_argument("--scratch", type=Path, help="folder for the harmed copies (default: the system's)")
    parser.add_argument("--table", action="store_true", help="run nothing, print what --results has")
    arguments = parser.parse_args()
    given = "; ".join(described(folder) for folder in arguments.cache)
    chosen = [row for row in ROWS if any(part in row.name for part in arguments.rows.split(","))]
    done = {record["row"]: record for record in read(arguments.results)}
    if not arguments.table:
        for row in chosen:
            wanted = {"row": row.name, "asked": limit(row, arguments.trials), "seed": arguments.seed, "given": given}
            if wanted.items() | {("cut_short", False)} <= done.get(row.name, {}).items():
                continue
            record = wanted | measure(row, wanted["asked"], arguments)
            done[row.name] = record
            with arguments.results.open("a") as file:
                file.write(json.dumps(record) + "\n")
            for fault in record["faults"]:
                print(fault, file=sys.stderr)
    found = [done[row.name] for row in chosen if row.name in done]
    print(table(found))
    return int(any(record["num_faults"] for record in found))


def measure(row: Row, trials: int | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one row."""
    started = time.monotonic()

    def tell(number: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{row.name}: {number} of {trials or 'all'}", end="", file=sys.stderr)

    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        until = started + 60 * (arguments.minutes or math.inf)
        bench = Bench(Path(scratch), arguments.seed, arguments.workers, arguments.cache, tell, until)
        tally = row.run(bench, trials)
    print(f"{row.name}: {tally.trials} trials, {tally.num_faults} faults ({tally})", file=sys.stderr)
    return {
        "caches": sorted(bench.used),
        "trials": tally.trials,
        "cut_short": time.monotonic() > until and (trials is None or tally.trials < trials),
        "counts": dict(tally.counts),
        "num_faults": tally.num_faults,
        "faults": tally.faults,
        "slowest": round(tally.slowest, 2),
        "peak_mb": tally.peak_mb,
        "seconds": round(time.monotonic() - started),
        "versions": versions(),
    }


def described(folder: Path) -> str:
    """A cache in a few words."""
    reader = CacheReader(folder)
    found = reader.manifest
    return (
        f"{folder.name}: {found.identity.teacher}, {found.num_examples} examples, {found.num_targets} targets, "
        f"{len(found.shards)} shards, {found.total_bytes / 1e6:.1f} MB, digest {reader.digest[:12]}"
    )


def limit(row: Row, trials: int | None) -> int | None:
    """How many trials of a row: the full count, or fewer."""
    return trials if row.trials is None else min(row.trials, trials or row.trials)


def read(path: Path) -> list[dict[str, Any]]:
    """The finished rows; a line that a killed run left half-written is none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [{"given": "", "caches": ["handmade"], **json.loads(line)} for line in lines if line.endswith("}")]


def table(records: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = ["| fault | caches | trials | seed | broken promises | what came of it |", "|---|---|---|---|---|---|"]
    for record in records:
        counts = sorted(record["counts"].items(), key=lambda one: -one[1])
        what = ", ".join(f"{number} {name}" for name, number in counts) or "not possible on this machine"
        caches = ", ".join(record["caches"]) or "a pass of its own"
        row = [record["row"], caches, record["trials"], record["seed"], record["num_faults"], what]
        lines.append(f"| {' | '.join(map(str, row))} |")
    lines += ["", *sorted({record[name] for record in records for name in ("given", "versions")} - {""})]
    return "\n".join(lines)


def versions() -> str:
    """What the trials ran with."""
    parts = [f"Python {platform.python_version()}"]
    parts += [f"{module.__name__} {module.__version__}" for module in (pyarrow, numpy, pydantic)]
    return ", ".join(parts) + f", {platform.system()} {platform.machine()}"


if __name__ == "__main__":
    sys.exit(main())

"""Caches to do harm to, and all that a writer needs to write one of them again."""

import os
import random
import runpy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distilllens_cache import (
    CachedExample,
    CacheReader,
    CacheWriter,
    Identity,
    PlannedExample,
    Projection,
    Seat,
    Sketch,
    example_digest,
    layout,
)
from distilllens_cache.files import read_recorded
from distilllens_cache.sketch_store import read_projection, read_sketch
from distilllens_cache.tail_sums import decode_tails

Files = dict[str, bytes]
"""Contents by name."""

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"


@dataclass(frozen=True)
class Material:
    """The contents of a finished cache, ready to be replayed to a writer without its teacher."""

    identity: Identity
    planned: Sequence[PlannedExample]
    tokenizer_files: dict[str, bytes]
    shards: Sequence[range]
    examples: Sequence[CachedExample]
    tails: Sequence[dict[int, NDArray[np.int64]]]
    sketches: dict[int, tuple[Sketch, Projection]]

    @classmethod
    def of(cls, folder: Path) -> "Material":
        """What the cache in ``folder`` holds."""
        reader = CacheReader(folder)
        manifest, identity = reader.manifest, reader.manifest.identity
        examples = list(reader)
        stops = np.cumsum([0, *(shard.num_examples for shard in manifest.shards)]).tolist()
        tails = [
            decode_tails(
                read_recorded(folder, shard.tails, max_bytes=layout.MAX_FILE_BYTES),
                identity,
                num_targets=shard.num_targets,
                name=shard.tails.name,
            )
            if shard.tails is not None
            else {}
            for shard in manifest.shards
        ]
        return cls(
            identity=identity,
            planned=[
                PlannedExample(
                    e.id, example_digest(e.token_ids, e.target_positions), len(e.token_ids), len(e.target_positions)
                )
                for e in examples
            ],
            tokenizer_files={
                record.name.removeprefix(f"{layout.TOKENIZER}/"): (folder / record.name).read_bytes()
                for record in manifest.tokenizer_files
            },
            shards=[range(start, stop) for start, stop in pairwise(stops)],
            examples=examples,
            tails=tails,
            sketches={
                layer: (read_sketch(folder, record, identity), read_projection(folder, record))
                for layer, record in manifest.sketches.items()
            },
        )

    def writer(self, folder: Path, **changes: Any) -> CacheWriter:
        """A writer of this cache; ``changes`` replace its arguments."""
        arguments: dict[str, Any] = {
            "identity": self.identity,
            "examples": self.planned,
            "tokenizer_files": self.tokenizer_files,
            "shards": self.shards,
        }
        return CacheWriter(folder, **(arguments | changes))

    def write(self, folder: Path, *, order: random.Random | None = None, overwrite: bool = False) -> None:
        """Write what ``folder`` lacks, or all of it: shards in the order of the plan or a random one."""
        with self.writer(folder, overwrite=overwrite) as writer:
            self._finish(writer, order)

    def write_by(self, world_size: int, folder: Path, *, order: random.Random) -> None:
        """Write all of it by so many ranks, each a share of the shards, in a random order."""
        seats = [Seat(rank, world_size, "one") for rank in range(world_size)]
        with ExitStack() as stack:
            writers = [stack.enter_context(self.writer(folder, seat=seat)) for seat in seats]
            for layer in writers[0].missing_sketches():
                writers[0].write_sketch(layer, *self.sketches[layer])
            for writer in writers[1:]:
                writer.look_again()
            missing = writers[0].unfinished()
            order.shuffle(missing)
            for place, number in enumerate(missing):
                self._write_shard(writers[place % world_size], number)
            for writer in writers:
                writer.look_again()
                writer.finish()

    def _finish(self, writer: CacheWriter, order: random.Random | None) -> None:
        for layer in writer.missing_sketches():
            writer.write_sketch(layer, *self.sketches[layer])
        missing = writer.unfinished()
        if order is not None:
            order.shuffle(missing)
        for number in missing:
            self._write_shard(writer, number)
        writer.finish()

    def _write_shard(self, writer: CacheWriter, number: int) -> None:
        part = self.shards[number]
        writer.write_shard(number, self.examples[part.start : part.stop], self.tails[number] or None)


def handmade(folder: Path, *, codec: str, size: str = "small") -> Path:
    """A cache of random targets, in which layers store different things of their tails."""
    made = runpy.run_path(str(GOLDEN / "make_cache_v1.py"))
    settings = dict(made["SKETCHED"])
    if size == "tiny":
        settings |= {"num_examples": 2, "examples_per_shard": 2, "top_k": {3: 3, 4: 6}, "more": {}}
        settings |= {"store_tail": {3: "sampled:5", 4: "profile+sketch:5"}}
    if size == "large":
        settings |= {"num_examples": 160, "examples_per_shard": 60, "vocab_size": 2000}
        settings |= {"top_k": {2: 12, 3: 12, 4: 24}}
    return made["TinyCache"](codec=codec, **settings).write(folder)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by its name there; a folder without files counts as nothing."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def put_files(folder: Path, files: dict[str, bytes]) -> Path:
    """Make ``folder`` hold these files."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder

"""The writer: a plan first, then shards in any order, the manifest last."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distilllens_cache import atomic, layout
from distilllens_cache import folder as folder_state
from distilllens_cache.codec import find_codec
from distilllens_cache.errors import CacheError
from distilllens_cache.files import read_plain, read_recorded, record_of
from distilllens_cache.identity import Identity
from distilllens_cache.index import index_bytes
from distilllens_cache.lock import ALONE, Seat, lock_of
from distilllens_cache.manifest import (
    FileRecord,
    Manifest,
    Plan,
    PlannedShard,
    ShardRecord,
    Sidecar,
    from_bytes,
    to_bytes,
)
from distilllens_cache.repair import restore_commits
from distilllens_cache.resume import matching_plan, plan_digest
from distilllens_cache.shard import Expected, encode_shard
from distilllens_cache.shard_store import ShardStore
from distilllens_cache.sketch import Projection, Sketch
from distilllens_cache.sketch_store import SketchStore
from distilllens_cache.tail_rows import encode_tail_rows
from distilllens_cache.tail_sums import encode_tails
from distilllens_cache.targets import CachedExample, PlannedExample


class CacheWriter:
    """Writes one cache, and goes on with one that was stopped.

    Every file appears whole or not at all, so the process may be killed at any moment: a shard is done once
    its sidecar is there, and the cache once its manifest is. A run that continues ends with the bytes of an
    undisturbed one, as far as the teacher gives the same targets again.

    Where the identity asks for sketches, they come before all shards: `missing_sketches`, `write_sketch`.

    A writer keeps other processes out of its folder until it is finished, closed or gone; the ranks of one run share
    the folder. They need no more than its files to agree: each writes its shards, and `look_again` tells what the
    others wrote.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        identity: Identity,
        examples: Sequence[PlannedExample],
        tokenizer_files: Path | dict[str, bytes],
        shards: Sequence[range],
        overwrite: bool = False,
        append: bool = False,
        seat: Seat = ALONE,
    ) -> None:
        """Write the plan of a new cache, or find out what is left to do in the one that ``folder`` holds.

        An existing cache must have this very identity, examples, shards and tokenizer; each difference is
        named in the `CacheError`. A folder that holds something else, or in which another run is at work, is refused
        untouched. ``overwrite`` starts anew: it deletes the files of the cache in ``folder``, and only those. A damaged
        file of the cache is written again. ``append`` takes a finished cache to which ``examples`` and ``shards``
        add some at the end: it stays readable until `finish` makes it the longer one. ``seat`` is this process's
        place among the ranks of its run.
        """
        self.folder = Path(folder)
        self.identity = identity
        self.bytes_written = 0
        """Bytes that this writer has put into shards, their tail sums and their tail rows."""
        self._examples = examples
        find_codec(identity.codec)
        _check_ranges(shards, len(examples))
        tokenizer = _tokenizer_files(tokenizer_files)
        self._index = index_bytes(examples)
        self._plan = _plan(identity, self._index, tokenizer, shards)
        folder_state.check(self.folder)
        if not overwrite:
            folder_state.require_plan(self.folder, append=append)
        atomic.make_folder(self.folder)
        self.lock = lock_of(self.folder, seat)
        """Who else is at work in the folder."""
        self.finished = False
        """Whether the cache is whole: nothing to do."""
        self.lock.enter(lambda: self._prepare(tokenizer, overwrite=overwrite, append=append))
        try:
            self._open(append=append)
        except BaseException:
            self.close()
            raise
        if self._is_finished():
            self._end()

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write in the folder; what is done stays done."""
        self.lock.leave(is_done=self.finished)

    def missing_sketches(self) -> list[int]:
        """Layers whose sketch is still to be written, ascending."""
        return self._sketches.missing()

    @property
    def num_calibration_examples(self) -> int:
        """The sketches are fitted to some of the first so many examples: those that were there before any append."""
        return self._sketches.num_examples or len(self._examples)

    def sketches(self) -> dict[int, tuple[Sketch, Projection]]:
        """The sketches that are written, by layer, read and checked anew; empty if none are stored."""
        return self._sketches.read()

    def write_sketch(self, layer: int, sketch: Sketch, projection: Projection) -> None:
        """Write the sketch of a layer and what encodes its codes. Shards made with another one are undone."""
        self.lock.require_held()
        self._sketches.write(layer, sketch, projection)
        self._shards.find()

    def read_calibration(self) -> bytes | None:
        """What `write_calibration` kept last; None if there is nothing, or nothing sound."""
        return self._sketches.read_calibration()

    def write_calibration(self, data: bytes) -> None:
        """Keep the state of a calibration pass until the last sketch is written, at most 1 GiB."""
        self.lock.require_held()
        self._sketches.write_calibration(data)

    def unfinished(self) -> list[int]:
        """Numbers of the shards still to be written, ascending. Sketches come before: `missing_sketches`."""
        self._require_sketches()
        return self._shards.missing()

    def look_again(self) -> bool:
        """Take note of what the other ranks of this run have written meanwhile; whether the cache is finished now."""
        if self._sketches.missing():
            self._sketches.look_again()
            self._shards.find()
        else:
            self._shards.look_again()
        if not self.finished and self._has_right_manifest():
            self._end()
        return self.finished

    def write_shard(
        self,
        number: int,
        examples: Sequence[CachedExample],
        tail_sums: dict[int, NDArray[np.int64]] | None = None,
    ) -> None:
        """Check what the examples of a shard mean, then write it, what is stored of its tails, and last its sidecar.

        ``examples`` are the plan's, in its order, with codes and samples where the identity stores them;
        ``tail_sums`` are (V,) in units of 1 / `FIXED_POINT` by layer that stores a profile, or None if none does.
        """
        if number not in self.unfinished():
            raise CacheError(f"shard {number} is not one of the shards still to be written in {self.folder}.")
        if (tail_sums is not None) != bool(self.identity.profile_layers):
            raise CacheError(f"tail sums do not fit store_tail={self.identity.store_tail} of shard {number}.")
        self.lock.require_held()
        planned = self._plan.shards[number]
        expected = Expected(planned.first, self._examples[planned.first : planned.stop])
        encoded = encode_shard(examples, expected, self.identity, name=planned.name)
        contents = {planned.name: encoded.data}
        tails, tail_rows = layout.tails_name(number), layout.tail_rows_name(number)
        if tail_sums is not None:
            contents[tails] = encode_tails(tail_sums, self.identity, num_targets=expected.num_targets, name=tails)
        is_lossless = find_codec(self.identity.codec).is_lossless
        if self.identity.tail_row_layers:
            contents[tail_rows] = encode_tail_rows(examples, self.identity, is_lossless=is_lossless, name=tail_rows)
        records = {name: record_of(name, data) for name, data in contents.items()}
        for name in (planned.name, tail_rows):
            if name in records and records[name].size > layout.MAX_SHARD_BYTES:
                raise CacheError(
                    f"{name} would have {records[name].size} bytes; at most {layout.MAX_SHARD_BYTES} are "
                    f"allowed. Lower --examples-per-shard."
                )
        sidecar = Sidecar(
            plan_sha256=self._plan_sha256,
            number=number,
            shard=ShardRecord(
                **records[planned.name].model_dump(),
                codec=self.identity.codec,
                num_examples=len(examples),
                num_tokens=expected.num_tokens,
                num_targets=expected.num_targets,
                tails=records.get(tails),
                tail_rows=records.get(tail_rows),
            ),
            layer_stats=encoded.layer_stats,
            sketches_sha256=self._sketches.digest(),
        )
        for name, data in contents.items():
            self._write(name, data)
            self.bytes_written += records[name].size
        self._shards.commit(sidecar)

    def finish(self) -> Path:
        """Write the sum of the tail sums and then, last, the manifest, whose path is returned.

        Any rank may do that, and more than one: the second finds the manifest of the first.
        """
        path = self.folder / layout.MANIFEST
        if self.finished:
            return path
        missing = self.unfinished()
        if missing:
            raise CacheError(
                f"{self.folder} still lacks {len(missing)} of {len(self._plan.shards)} shards; write them first."
            )
        self.lock.require_held()
        with self.lock.alone():
            if not self._has_right_manifest():
                if self._base is not None:
                    self._adopt()
                tail_record = None
                if self.identity.profile_layers:
                    data = self._shards.total_tails()
                    tail_record = record_of(layout.TAIL_SUMS, data)
                    self._write(layout.TAIL_SUMS, data)
                self._write(layout.MANIFEST, to_bytes(self._manifest(tail_record)))
        self._end()
        return path

    def _prepare(self, tokenizer: dict[str, bytes], *, overwrite: bool, append: bool) -> None:
        """Make the folder ready for all ranks: the first one does, and nobody else is at work meanwhile."""
        found = self._plan
        if not overwrite and (self.folder / layout.PLAN).exists():
            found = matching_plan(self.folder, self._plan, self._examples, append=append)
            folder_state.clear(self.folder, temporary_only=True)
            restore_commits(self.folder, found)
        else:
            folder_state.clear(self.folder, temporary_only=False)
            atomic.write_file(self.folder / layout.PLAN, to_bytes(self._plan))
        for name in (layout.SHARDS, layout.TOKENIZER):
            atomic.make_folder(self.folder / name)
        is_shorter = found.num_examples < len(self._examples)
        index = index_bytes(self._examples[: found.num_examples]) if is_shorter else self._index
        self._repair(found, {layout.INDEX: index, **tokenizer})

    def _open(self, *, append: bool) -> None:
        """Find out what is done, of the plan in the folder or of one that this run makes longer."""
        found = matching_plan(self.folder, self._plan, self._examples, append=append)
        self._base = None
        if found.num_examples < len(self._examples):
            self._base = (plan_digest(found), len(found.shards))
        else:
            self._plan = found
        self._plan_sha256 = plan_digest(self._plan)
        base = None if self._base is None else (self._base[0], found.num_examples)
        self._sketches = SketchStore(self.folder, self.identity, self._plan_sha256, base=base)
        self._shards = ShardStore(self.folder, self._plan, self._plan_sha256, self._sketches, base=self._base)
        num_base = 0 if self._base is None else self._base[1]
        if num_base and (self._sketches.missing() or min(self._shards.missing(), default=num_base) < num_base):
            raise CacheError(
                f"{self.folder} is unfinished or damaged, so nothing can be added to it: run the same command without "
                f"--append first, on the rows that it was begun with."
            )

    def _adopt(self) -> None:
        """Turn the cache that examples are added to into the longer one, but for its manifest.

        Killed on the way, it has no manifest; its shards and sketches name the older plan or this one, and a writer
        that appends takes either.
        """
        atomic.remove(self.folder / layout.MANIFEST)
        self._sketches.adopt()
        self._shards.adopt()
        self._write(layout.INDEX, self._index)
        self._write(layout.PLAN, to_bytes(self._plan))
        self._base = None

    def _end(self) -> None:
        self.finished = True
        self.close()

    def _write(self, name: str, data: bytes | memoryview) -> None:
        atomic.write_file(self.folder / name, data)

    def _manifest(self, tail_sums: FileRecord | None) -> Manifest:
        return Manifest(
            identity=self._plan.identity,
            plan_sha256=self._plan_sha256,
            index=self._plan.index,
            tokenizer_files=self._plan.tokenizer_files,
            shards=tuple(sidecar.shard for sidecar in self._shards.sidecars()),
            tail_sums=tail_sums,
            layer_stats=self._shards.layer_stats(),
            sketches=self._sketches.records,
        )

    def _require_sketches(self) -> None:
        if missing := self._sketches.missing():
            raise CacheError(
                f"{self.folder} still lacks the sketches of the layers {missing}; write them before any shard."
            )

    def _repair(self, plan: Plan, contents: dict[str, bytes | memoryview]) -> None:
        """Write the index and the tokenizer's files where they are missing or damaged."""
        for record in (plan.index, *plan.tokenizer_files):
            try:
                read_recorded(self.folder, record, max_bytes=layout.MAX_FILE_BYTES)
            except CacheError:
                if record_of(record.name, contents[record.name]) != record:
                    raise
                path = self.folder / record.name
                atomic.make_folder(path.parent)
                atomic.write_file(path, contents[record.name])

    def _is_finished(self) -> bool:
        """Whether the manifest is there and says what the shards say; one that does not is taken away."""
        if self._has_right_manifest():
            return True
        path = self.folder / layout.MANIFEST
        if self._base is None and os.path.lexists(path):  # with a base, it is the one of the cache as it was
            # Readers must not take the cache for a whole one while its damaged shards are written again.
            atomic.remove(path)
        return False

    def _has_right_manifest(self) -> bool:
        path = self.folder / layout.MANIFEST
        if not os.path.lexists(path) or self._sketches.missing() or self._shards.missing():
            return False
        try:
            data = read_plain(self.folder, layout.MANIFEST, max_bytes=layout.MAX_JSON_BYTES)
            manifest = from_bytes(Manifest, data, name=layout.MANIFEST)
            if manifest != self._manifest(manifest.tail_sums):
                return False
            if manifest.tail_sums is not None:
                read_recorded(self.folder, manifest.tail_sums, max_bytes=layout.MAX_FILE_BYTES)
        except CacheError:
            return False
        return True


def plan_of(
    *,
    identity: Identity,
    examples: Sequence[PlannedExample],
    tokenizer_files: Path | dict[str, bytes],
    shards: Sequence[range],
) -> Plan:
    """The plan that a `CacheWriter` of these arguments writes."""
    return _plan(identity, index_bytes(examples), _tokenizer_files(tokenizer_files), shards)


def _plan(identity: Identity, index: bytes | memoryview, tokenizer: dict[str, bytes], shards: Sequence[range]) -> Plan:
    return Plan(
        identity=identity,
        index=record_of(layout.INDEX, index),
        tokenizer_files=tuple(record_of(name, data) for name, data in tokenizer.items()),
        shards=tuple(
            PlannedShard(name=layout.shard_name(n), first=part.start, stop=part.stop) for n, part in enumerate(shards)
        ),
    )


def _check_ranges(shards: Sequence[range], num_examples: int) -> None:
    at = 0
    for part in shards:
        if part.start != at or part.step != 1 or not len(part):
            raise CacheError(f"shards must follow one another; found {part} where {at} should start.")
        at = part.stop
    if at != num_examples or not at:
        raise CacheError(f"the shards hold {at} examples, the plan has {num_examples}; at least one is needed.")


def _tokenizer_files(source: Path | dict[str, bytes]) -> dict[str, bytes]:
    """Files by their name in the cache, in a fixed order."""
    if isinstance(source, Path):
        source = {p.relative_to(source).as_posix(): p.read_bytes() for p in source.rglob("*") if p.is_file()}
    files = {f"{layout.TOKENIZER}/{name}": source[name] for name in sorted(source)}
    for name in files:
        if not layout.is_safe_name(name):
            raise CacheError(f"the tokenizer's file {name!r} has a name that a cache cannot hold.")
    return files

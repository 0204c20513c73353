"""Everything about a cache that can be checked without the teacher."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distilllens_cache import layout
from distilllens_cache.cache_folder import CacheFolder, open_folder
from distilllens_cache.canary import CanaryResult, canary
from distilllens_cache.errors import CacheError
from distilllens_cache.manifest import (
    FileRecord,
    LayerStats,
    Plan,
    Sidecar,
    SketchCommit,
    SketchRecord,
    from_bytes,
    sketches_digest,
)
from distilllens_cache.reader import CacheReader
from distilllens_cache.sketch import decode_projection
from distilllens_cache.tail_sums import add_tails, decode_tails
from distilllens_cache.targets import CachedExample

CANARY_TARGETS = 200_000
"""The canary reads about this many targets at most, from the first shards."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with one file."""

    file: str
    """Its name in the cache."""
    what: str


@dataclass
class VerifyReport:
    """What a check of a cache found. Without problems the cache is sound."""

    problems: list[Problem] = field(default_factory=list)
    files: int = 0
    """Files checked."""
    num_bytes: int = 0
    """Bytes checked."""
    canary: CanaryResult | None = None
    """None if no example could be read."""

    @property
    def is_sound(self) -> bool:
        return not self.problems


Progress = Callable[[str, int, int], None]
"""Called with the file at hand, the bytes checked so far, and all bytes."""


def verify_cache(
    folder: Path | str | CacheFolder, progress: Progress | None = None, *, workers: int | None = None
) -> VerifyReport:
    """Check every file of a cache: digests, schema, meaning, sums, canary. A bad cache never raises.

    Shards are checked by ``workers`` threads at a time (default: one for each core); the report does not
    depend on how many. Each holds one decoded shard: up to about 0.7 GB.
    """
    return _Check(open_folder(folder).anew(), progress, workers or len(os.sched_getaffinity(0))).run()


class _Notes:
    """What was checked of some files, and what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.checked: list[tuple[str, int]] = []
        """Files that are as written, with their bytes."""

    def count(self, name: str, num_bytes: int) -> None:
        self.checked.append((name, num_bytes))

    def note(self, name: str, what: str) -> None:
        self.problems.append(Problem(name, what))


class _ShardNotes(_Notes):
    """The same of one shard, and what is added up over shards."""

    def __init__(self) -> None:
        super().__init__()
        self.examples: list[CachedExample] = []
        """What the canary reads; empty if it does not."""
        self.layer_stats: dict[int, LayerStats] = {}
        self.tails: dict[int, NDArray[np.int64]] = {}
        self.is_whole = True
        """Whether both are there."""


class _Check(_Notes):
    """The check of a whole cache; its notes go into the report."""

    def __init__(self, folder: CacheFolder, progress: Progress | None, workers: int) -> None:
        self.folder = folder
        self.progress = progress
        self.workers = workers
        self.report = VerifyReport()
        self.total = 0

    def run(self) -> VerifyReport:
        reader = None
        with _Noted(self, layout.MANIFEST):
            reader = CacheReader(self.folder, tail_rows=False)
        if reader is None:
            self._without_a_manifest()
            return self.report
        manifest = reader.manifest
        self.total = manifest.total_bytes
        self.count(layout.MANIFEST, reader.manifest_bytes)
        self.count(layout.INDEX, manifest.index.size)
        with _Noted(self, layout.PLAN):
            self._check_plan(reader)
        for record in manifest.tokenizer_files:
            with _Noted(self, record.name):
                self.folder.read_recorded(record, max_bytes=layout.MAX_FILE_BYTES)
                self.count(record.name, record.size)
        if not any(problem.file.startswith(layout.TOKENIZER) for problem in self.report.problems):
            with _Noted(self, layout.TOKENIZER):
                _ = reader.tokenizer_folder
        for layer, record in manifest.sketches.items():
            self._check_sketch(reader, layer, record)
        with _Noted(self, layout.MANIFEST):
            self.report.canary = canary(self._check_shards(reader), manifest.identity.num_layers)
        if self.report.canary is not None:
            if not self.report.canary.num:
                self.report.canary = None
            elif self.report.canary.verdict == "failed":
                self.note(layout.MANIFEST, self.report.canary.sentence)
        return self.report

    def _check_plan(self, reader: CacheReader) -> None:
        data = self.folder.read(layout.PLAN, max_bytes=layout.MAX_JSON_BYTES)
        plan = from_bytes(Plan, data, name=layout.PLAN)
        self.count(layout.PLAN, len(data))
        manifest = reader.manifest
        if hashlib.sha256(data).hexdigest() != manifest.plan_sha256:
            raise CacheError("it is not the plan that the manifest was written for")
        same = (
            plan.identity,
            plan.index,
            plan.tokenizer_files,
            [shard.stop - shard.first for shard in plan.shards],
        )
        if same != (
            manifest.identity,
            manifest.index,
            manifest.tokenizer_files,
            [shard.num_examples for shard in manifest.shards],
        ):
            raise CacheError("plan and manifest contradict each other")

    def _check_sketch(self, reader: CacheReader, layer: int, record: SketchRecord) -> None:
        manifest = reader.manifest
        with _Noted(self, record.sketch.name):
            reader.sketch(layer)
            self.count(record.sketch.name, record.sketch.size)
        with _Noted(self, record.projection.name):
            data = self.folder.read_recorded(record.projection, max_bytes=layout.MAX_FILE_BYTES)
            decode_projection(data, record)
            self.count(record.projection.name, record.projection.size)
        with _Noted(self, layout.sketch_commit_name(layer)):
            commit = self._commit(layer)
            if (commit.plan_sha256, commit.layer) != (manifest.plan_sha256, layer):
                raise CacheError("it belongs to another plan or layer")
            if commit.sketch != record:
                raise CacheError("the record of this sketch and that in the manifest contradict each other")

    def _commit(self, layer: int) -> SketchCommit:
        name = layout.sketch_commit_name(layer)
        data = self.folder.read(name, max_bytes=layout.MAX_SIDECAR_BYTES)
        commit = from_bytes(SketchCommit, data, name=name)
        self.count(name, len(data))
        return commit

    def _check_shards(self, reader: CacheReader) -> Iterator[CachedExample]:
        """Check all shards and their sums; give the examples that the canary wants on the way."""
        manifest = reader.manifest
        totals: dict[int, NDArray[np.int64]] = {}
        stats: dict[int, LayerStats] = {}
        are_whole = True
        for number, found in enumerate(self._checked_shards(reader)):
            self._merge(found)
            for layer, more in found.layer_stats.items():
                stats[layer] = stats[layer] + more if layer in stats else more
            are_whole &= found.is_whole
            tails = manifest.shards[number].tails
            if tails is not None:
                with _Noted(self, tails.name) as added:
                    add_tails(totals, found.tails, name=tails.name)
                are_whole &= not added.failed
            yield from found.examples
        if manifest.tail_sums is not None:
            with _Noted(self, layout.TAIL_SUMS):
                sums = _tails(reader, manifest.tail_sums, manifest.num_targets, self)
                if are_whole and any(not np.array_equal(sums[layer], totals[layer]) for layer in sums):
                    raise CacheError("it is not the sum of the shards' tail sums")
        if are_whole and stats != manifest.layer_stats:
            self.note(layout.MANIFEST, "its layer statistics are not the sums of those of the shards")

    def _checked_shards(self, reader: CacheReader) -> Iterator[_ShardNotes]:
        """What was found of each shard, in order; no more than ``workers`` of them are in memory.

        Threads, since most of the time goes into decompression, digests and numpy, which let go of Python's
        lock, and since what comes back is large.
        """
        shards = reader.manifest.shards
        seen = np.cumsum([0, *(shard.num_targets for shard in shards)])
        with ThreadPoolExecutor(self.workers) as pool:
            waiting: deque[Future[_ShardNotes]] = deque()
            for number in range(len(shards)):
                for_canary = bool(seen[number] < CANARY_TARGETS)
                waiting.append(pool.submit(_check_shard, reader, number, for_canary=for_canary))
                if len(waiting) >= self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _merge(self, notes: _Notes) -> None:
        for problem in notes.problems:
            self.note(problem.file, problem.what)
        for name, num_bytes in notes.checked:
            self.count(name, num_bytes)

    def _without_a_manifest(self) -> None:
        """Check what else can be: the plan, and the files of the sketches and shards that were committed."""
        if not self.folder.exists(layout.PLAN):
            return
        with _Noted(self, layout.PLAN):
            data = self.folder.read(layout.PLAN, max_bytes=layout.MAX_JSON_BYTES)
            plan, digest = from_bytes(Plan, data, name=layout.PLAN), hashlib.sha256(data).hexdigest()
            self.count(layout.PLAN, len(data))
            sketches = self._committed_sketches(plan, digest)
            records = [plan.index, *plan.tokenizer_files]
            records += [file for record in sketches.values() for file in (record.sketch, record.projection)]
            for number in range(len(plan.shards)):
                name = layout.sidecar_name(number)
                if not self.folder.exists(name):
                    continue
                with _Noted(self, name):
                    data = self.folder.read(name, max_bytes=layout.MAX_SIDECAR_BYTES)
                    sidecar = from_bytes(Sidecar, data, name=name)
                    self.count(name, len(data))
                    records += sidecar.shard.files
                    if sidecar.sketches_sha256 != sketches_digest(sketches, plan_sha256=digest):
                        raise CacheError("its codes belong to other sketches than those that are there")
            for record in records:
                with _Noted(self, record.name):
                    self.folder.read_recorded(record, max_bytes=layout.limit_of(record.name))
                    self.count(record.name, record.size)

    def _committed_sketches(self, plan: Plan, plan_sha256: str) -> dict[int, SketchRecord]:
        """The records of the sketches that are there, of layers that the plan has."""
        found: dict[int, SketchRecord] = {}
        for layer in plan.identity.sketch_layers:
            name = layout.sketch_commit_name(layer)
            if not self.folder.exists(name):
                continue
            with _Noted(self, name):
                commit = self._commit(layer)
                if (commit.plan_sha256, commit.layer) != (plan_sha256, layer):
                    raise CacheError("it belongs to another plan or layer")
                commit.sketch.check(layer, plan.identity)
                found[layer] = commit.sketch
        return found

    def count(self, name: str, num_bytes: int) -> None:
        self.report.files += 1
        self.report.num_bytes += num_bytes
        if self.progress is not None:
            self.progress(name, self.report.num_bytes, max(self.total, self.report.num_bytes))

    def note(self, name: str, what: str) -> None:
        problem = Problem(name, what)
        if problem not in self.report.problems:
            self.report.problems.append(problem)


def _check_shard(reader: CacheReader, number: int, *, for_canary: bool) -> _ShardNotes:
    """Check the files of one shard."""
    notes = _ShardNotes()
    shard = reader.manifest.shards[number]
    examples: list[CachedExample] = []
    with _Noted(notes, shard.name):
        examples = reader.read_shard(number)
        notes.count(shard.name, shard.size)
    if shard.tail_rows is not None:
        with _Noted(notes, shard.tail_rows.name):
            _check_tail_rows(reader, number, examples)
            notes.count(shard.tail_rows.name, shard.tail_rows.size)
    with _Noted(notes, layout.sidecar_name(number)) as sidecar_checked:
        notes.layer_stats = _check_sidecar(reader, number, examples, notes).layer_stats
    notes.is_whole &= not sidecar_checked.failed
    if shard.tails is not None:
        with _Noted(notes, shard.tails.name) as tails_checked:
            notes.tails = _tails(reader, shard.tails, shard.num_targets, notes)
        notes.is_whole &= not tails_checked.failed
    if for_canary:
        notes.examples = examples
    return notes


def _check_tail_rows(reader: CacheReader, number: int, examples: list[CachedExample]) -> None:
    """What they mean can only be told beside sound targets."""
    record = reader.manifest.shards[number].tail_rows
    if examples:
        reader.add_tail_rows(number, examples)
    elif record is not None:
        reader.folder.read_recorded(record, max_bytes=layout.MAX_SHARD_BYTES)


def _check_sidecar(reader: CacheReader, number: int, examples: list[CachedExample], notes: _Notes) -> Sidecar:
    name = layout.sidecar_name(number)
    data = reader.folder.read(name, max_bytes=layout.MAX_SIDECAR_BYTES)
    sidecar = from_bytes(Sidecar, data, name=name)
    notes.count(name, len(data))
    manifest = reader.manifest
    if sidecar.plan_sha256 != manifest.plan_sha256 or sidecar.number != number:
        raise CacheError("it belongs to another plan or shard")
    if sidecar.shard != manifest.shards[number]:
        raise CacheError("sidecar and manifest contradict each other")
    if sidecar.sketches_sha256 != sketches_digest(manifest.sketches, plan_sha256=manifest.plan_sha256):
        raise CacheError("its codes belong to other sketches than those of the manifest")
    if tuple(sorted(sidecar.layer_stats)) != manifest.identity.layers:
        raise CacheError(f"it has statistics of the layers {sorted(sidecar.layer_stats)}, not of the cache's")
    for layer, stats in sidecar.layer_stats.items() if examples else ():
        num_ids = sum(len(example.targets[layer].ids) for example in examples)
        if (stats.num_targets, stats.num_ids) != (sidecar.shard.num_targets, num_ids):
            raise CacheError(f"its statistics of layer {layer} are not those of the shard")
    return sidecar


def _tails(reader: CacheReader, record: FileRecord, num_targets: int, notes: _Notes) -> dict[int, NDArray[np.int64]]:
    data = reader.folder.read_recorded(record, max_bytes=layout.MAX_FILE_BYTES)
    tails = decode_tails(data, reader.manifest.identity, num_targets=num_targets, name=record.name)
    notes.count(record.name, record.size)
    return tails


class _Noted:
    """Turns what goes wrong inside the block into a problem of the file at hand."""

    def __init__(self, notes: _Notes, name: str) -> None:
        self.notes = notes
        self.name = name
        self.failed = False

    def __enter__(self) -> "_Noted":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, CacheError | OSError):
            return False
        self.failed = True
        text = str(error)
        is_index = text.startswith(layout.INDEX) and self.name == layout.MANIFEST
        self.notes.note(layout.INDEX if is_index else self.name, text)
        return True

"""The writer: a plan first, then shards in any order, the manifest last."""

import hashlib
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
from distilllens_cache.identity import Identity, compare_identity
from distilllens_cache.index import Index, index_bytes
from distilllens_cache.manifest import (
    FileRecord,
    LayerStats,
    Manifest,
    Plan,
    PlannedShard,
    ShardRecord,
    Sidecar,
    from_bytes,
    to_bytes,
)
from distilllens_cache.shard import Expected, encode_shard
from distilllens_cache.sketch import Projection, Sketch
from distilllens_cache.sketch_store import SketchStore
from distilllens_cache.tail_rows import encode_tail_rows
from distilllens_cache.tail_sums import add_tails, decode_tails, encode_tails
from distilllens_cache.targets import CachedExample, PlannedExample


class CacheWriter:
    """Writes one cache, and goes on with one that was stopped.

    Every file appears whole or not at all, so the process may be killed at any moment: a shard is done once
    its sidecar is there, and the cache once its manifest is. A run that continues ends with the bytes of an
    undisturbed one, as far as the teacher gives the same targets again.

    Where the identity asks for sketches, they come before all shards: `missing_sketches`, `write_sketch`.
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
    ) -> None:
        """Write the plan of a new cache, or find out what is left to do in the one that ``folder`` holds.

        An existing cache must have this very identity, examples, shards and tokenizer; each difference is
        named in the `CacheError`. A folder that holds something else is refused untouched. ``overwrite``
        starts anew: it deletes the files of the cache in ``folder``, and only those. A damaged file of the
        cache is written again.
        """
        self.folder = Path(folder)
        self.identity = identity
        self.bytes_written = 0
        """Bytes that this writer has put into shards, their tail sums and their tail rows."""
        self._examples = examples
        find_codec(identity.codec)
        _check_ranges(shards, len(examples))
        tokenizer = _tokenizer_files(tokenizer_files)
        index = index_bytes(examples)
        self._plan = Plan(
            identity=identity,
            index=record_of(layout.INDEX, index),
            tokenizer_files=tuple(record_of(name, data) for name, data in tokenizer.items()),
            shards=tuple(
                PlannedShard(name=layout.shard_name(n), first=part.start, stop=part.stop)
                for n, part in enumerate(shards)
            ),
        )
        folder_state.check(self.folder)
        if not overwrite:
            folder_state.require_plan(self.folder)
        if not overwrite and (self.folder / layout.PLAN).exists():
            self._plan = self._resume()
            folder_state.clear(self.folder, temporary_only=True)
        else:
            atomic.make_folder(self.folder)
            folder_state.clear(self.folder, temporary_only=False)
            atomic.write_file(self.folder / layout.PLAN, to_bytes(self._plan))
        for name in (layout.SHARDS, layout.TOKENIZER):
            atomic.make_folder(self.folder / name)
        self._plan_sha256 = hashlib.sha256(to_bytes(self._plan)).hexdigest()
        self._repair({self._plan.index.name: index, **tokenizer})
        self._sketches = SketchStore(self.folder, identity, self._plan_sha256)
        self._done: dict[int, Sidecar] = {}
        self._find_committed()
        self.finished = self._is_finished()
        """Whether the cache is whole: nothing to do."""

    def missing_sketches(self) -> list[int]:
        """Layers whose sketch is still to be written, ascending."""
        return self._sketches.missing()

    def sketches(self) -> dict[int, tuple[Sketch, Projection]]:
        """The sketches that are written, by layer, read and checked anew; empty if none are stored."""
        return self._sketches.read()

    def write_sketch(self, layer: int, sketch: Sketch, projection: Projection) -> None:
        """Write the sketch of a layer and what encodes its codes. Shards made with another one are undone."""
        self._sketches.write(layer, sketch, projection)
        self._find_committed()

    def read_calibration(self) -> bytes | None:
        """What `write_calibration` kept last; None if there is nothing, or nothing sound."""
        return self._sketches.read_calibration()

    def write_calibration(self, data: bytes) -> None:
        """Keep the state of a calibration pass until the last sketch is written, at most 1 GiB."""
        self._sketches.write_calibration(data)

    def unfinished(self) -> list[int]:
        """Numbers of the shards still to be written, ascending. Sketches come before: `missing_sketches`."""
        self._require_sketches()
        return [number for number in range(len(self._plan.shards)) if number not in self._done]

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
        self._require_sketches()
        if number in self._done or not 0 <= number < len(self._plan.shards):
            raise CacheError(f"shard {number} is not one of the shards still to be written in {self.folder}.")
        if (tail_sums is not None) != bool(self.identity.profile_layers):
            raise CacheError(f"tail sums do not fit store_tail={self.identity.store_tail} of shard {number}.")
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
        self._write(layout.sidecar_name(number), to_bytes(sidecar))
        self._done[number] = sidecar

    def finish(self) -> Path:
        """Write the sum of the tail sums and then, last, the manifest, whose path is returned."""
        path = self.folder / layout.MANIFEST
        if self.finished:
            return path
        missing = self.unfinished()
        if missing:
            raise CacheError(
                f"{self.folder} still lacks {len(missing)} of {len(self._plan.shards)} shards; write them first."
            )
        tail_record = None
        if self.identity.profile_layers:
            data = self._total_tails()
            tail_record = record_of(layout.TAIL_SUMS, data)
            self._write(layout.TAIL_SUMS, data)
        self._write(layout.MANIFEST, to_bytes(self._manifest(tail_record)))
        self.finished = True
        return path

    def _write(self, name: str, data: bytes | memoryview) -> None:
        atomic.write_file(self.folder / name, data)

    def _manifest(self, tail_sums: FileRecord | None) -> Manifest:
        sidecars = [self._done[number] for number in range(len(self._plan.shards))]
        layer_stats: dict[int, LayerStats] = {}
        for sidecar in sidecars:  # in the order of the shards, so that rounding is the same every time
            for layer, stats in sidecar.layer_stats.items():
                layer_stats[layer] = layer_stats[layer] + stats if layer in layer_stats else stats
        return Manifest(
            identity=self._plan.identity,
            plan_sha256=self._plan_sha256,
            index=self._plan.index,
            tokenizer_files=self._plan.tokenizer_files,
            shards=tuple(sidecar.shard for sidecar in sidecars),
            tail_sums=tail_sums,
            layer_stats=layer_stats,
            sketches=self._sketches.records,
        )

    def _require_sketches(self) -> None:
        if missing := self._sketches.missing():
            raise CacheError(
                f"{self.folder} still lacks the sketches of the layers {missing}; write them before any shard."
            )

    def _find_committed(self) -> None:
        """Find out which shards are done; none is before the sketches that their codes belong to."""
        if self._sketches.missing():
            return
        found = {number: self._committed(number) for number in range(len(self._plan.shards))}
        self._done = {number: sidecar for number, sidecar in found.items() if sidecar is not None}

    def _total_tails(self) -> memoryview:
        total: dict[int, NDArray[np.int64]] = {}
        num_targets = 0
        for number in range(len(self._plan.shards)):
            shard = self._done[number].shard
            assert shard.tails is not None
            data = read_recorded(self.folder, shard.tails, max_bytes=layout.MAX_FILE_BYTES)
            tails = decode_tails(data, self.identity, num_targets=shard.num_targets, name=shard.tails.name)
            add_tails(total, tails, name=layout.TAIL_SUMS)
            num_targets += shard.num_targets
        return encode_tails(total, self.identity, num_targets=num_targets, name=layout.TAIL_SUMS)

    def _resume(self) -> Plan:
        """The plan in the folder, if it is the one of this run."""
        data = read_plain(self.folder, layout.PLAN, max_bytes=layout.MAX_JSON_BYTES)
        anew = "Choose another --output-dir, or pass --overwrite to delete this cache and start anew."
        try:
            found = from_bytes(Plan, data, name=layout.PLAN)
        except CacheError as error:
            raise CacheError(f"{self.folder} cannot be continued: {error} {anew}") from None
        differences = compare_identity(found.identity, self._plan.identity)
        if differences:
            raise CacheError(
                f"{self.folder} holds a cache of something else:\n  "
                + "\n  ".join(differences)
                + f"\n{anew} To continue it, run with what it was made with."
            )
        example = self._differing_example(found)
        if example is not None:
            raise CacheError(f"{self.folder} holds a cache of other examples: {example}. {anew}")
        if found.shards != self._plan.shards:
            raise CacheError(
                f"{self.folder} has {len(found.shards)} shards, cut elsewhere than the "
                f"{len(self._plan.shards)} of this run. {anew}"
            )
        if found.tokenizer_files != self._plan.tokenizer_files:
            raise CacheError(f"{self.folder} has other tokenizer files than this run. {anew}")
        return found

    def _differing_example(self, found: Plan) -> str | None:
        if found.num_examples != len(self._examples):
            return f"it has {found.num_examples}, this run has {len(self._examples)}"
        if found.index == self._plan.index:
            return None
        try:
            data = read_recorded(self.folder, found.index, max_bytes=layout.MAX_FILE_BYTES)
            index = Index(data, num_examples=found.num_examples)
        except CacheError as error:
            return f"its index differs from that of this run, and {error}"
        for number, example in enumerate(self._examples):
            if index[number] != example:
                return f"at place {number} it has {index[number]}, this run has {example}"
        return None

    def _repair(self, contents: dict[str, bytes | memoryview]) -> None:
        """Write the index and the tokenizer's files where they are missing or damaged."""
        for record in (self._plan.index, *self._plan.tokenizer_files):
            try:
                read_recorded(self.folder, record, max_bytes=layout.MAX_FILE_BYTES)
            except CacheError:
                if record_of(record.name, contents[record.name]) != record:
                    raise
                path = self.folder / record.name
                atomic.make_folder(path.parent)
                atomic.write_file(path, contents[record.name])

    def _committed(self, number: int) -> Sidecar | None:
        """The sidecar of a shard whose files are all as it says; None if the shard has to be written."""
        planned = self._plan.shards[number]
        try:
            data = read_plain(self.folder, layout.sidecar_name(number), max_bytes=layout.MAX_SIDECAR_BYTES)
            sidecar = from_bytes(Sidecar, data, name=layout.sidecar_name(number))
            shard = sidecar.shard
            shard.check_names(number, self.identity)
            if (
                (sidecar.plan_sha256, sidecar.number) != (self._plan_sha256, number)
                or sidecar.sketches_sha256 != self._sketches.digest()
                or shard.codec != self.identity.codec
                or shard.num_examples != planned.stop - planned.first
                or tuple(sorted(sidecar.layer_stats)) != self.identity.layers
            ):
                return None
            for record in shard.files:
                read_recorded(self.folder, record, max_bytes=layout.limit_of(record.name))
        except CacheError:
            return None
        return sidecar

    def _is_finished(self) -> bool:
        """Whether the manifest is there and says what the shards say; one that does not is taken away."""
        path = self.folder / layout.MANIFEST
        if not os.path.lexists(path):
            return False
        try:
            data = read_plain(self.folder, layout.MANIFEST, max_bytes=layout.MAX_JSON_BYTES)
            manifest = from_bytes(Manifest, data, name=layout.MANIFEST)
            is_whole = not self._sketches.missing() and not self.unfinished()
            if is_whole and manifest == self._manifest(manifest.tail_sums):
                if manifest.tail_sums is not None:
                    read_recorded(self.folder, manifest.tail_sums, max_bytes=layout.MAX_FILE_BYTES)
                return True
        except CacheError:
            pass
        # Readers must not take the cache for a whole one while its damaged shards are written again.
        atomic.remove(path)
        return False


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

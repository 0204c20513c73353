"""The sketches in a cache's folder: written one by one before the shards, and found again."""

import hashlib
import os
from pathlib import Path

from distilllens_cache import atomic, layout
from distilllens_cache.errors import CacheError
from distilllens_cache.files import read_plain, read_recorded, record_of
from distilllens_cache.identity import Identity
from distilllens_cache.manifest import SketchCommit, SketchRecord, from_bytes, sketches_digest, to_bytes
from distilllens_cache.sketch import (
    Projection,
    Sketch,
    decode_projection,
    decode_sketch,
    encode_projection,
    encode_sketch,
)

_SHA256_BYTES = 32


class SketchStore:
    """What a writer knows of the sketches of its plan, and the scratch file of the pass that makes them."""

    def __init__(
        self, folder: Path, identity: Identity, plan_sha256: str, *, base: tuple[str, int] | None = None
    ) -> None:
        """``base`` is the plan of a cache that this one is made from by adding examples, and how many that one has."""
        self._folder = folder
        self._identity = identity
        self._plan_sha256 = plan_sha256
        self._base_sha256, self._num_base = base or (None, 0)
        self.records: dict[int, SketchRecord] = {}
        """By layer, ascending: sketches that are written and whose files are as they were."""
        known = (self._record(layer) for layer in identity.sketch_layers)
        self.num_examples = next((record.num_examples for record in known if record is not None), 0)
        """The first so many examples were there when the sketches were fitted; 0 if all were."""
        self.look_again()
        self._clean_up()

    def look_again(self) -> None:
        """Find the sketches that others have written meanwhile."""
        found = {layer: self._committed(layer) for layer in self.missing()}
        new = {layer: record for layer, record in found.items() if record is not None}
        self.records = dict(sorted((self.records | new).items()))

    def missing(self) -> list[int]:
        """Layers whose sketch is still to be written."""
        return [layer for layer in self._identity.sketch_layers if layer not in self.records]

    def digest(self, plan_sha256: str | None = None) -> str | None:
        """What a sidecar of a plan (default: this one) says about the sketches its codes belong to."""
        records = self.records
        if plan_sha256 is not None and plan_sha256 == self._base_sha256:
            records = {layer: _of_all(record, self._num_base) for layer, record in records.items()}
        return sketches_digest(records, plan_sha256=plan_sha256 or self._plan_sha256)

    def adopt(self) -> None:
        """Write the commits of all sketches anew, for this plan in place of the one that it is made from."""
        for layer, record in self.records.items():
            self._commit(layer, record)

    def read(self) -> dict[int, tuple[Sketch, Projection]]:
        """The sketches that are written, checked anew."""
        return {
            layer: (read_sketch(self._folder, record, self._identity), read_projection(self._folder, record))
            for layer, record in self.records.items()
        }

    def write(self, layer: int, sketch: Sketch, projection: Projection) -> None:
        """Check a missing sketch, then write its files and, last, its commit."""
        spec = self._identity.tail_specs[layer].sketch if layer in self.missing() else None
        if spec is None:
            raise CacheError(f"layer {layer} is not one whose sketch is still to be written in {self._folder}.")
        sketch_name, projection_name = layout.sketch_name(layer), layout.projection_name(layer)
        if sketch.softcap is not None and not 0 < sketch.softcap < float("inf"):
            raise CacheError(f"{sketch_name}: the soft-cap is {sketch.softcap}; expected is a positive number or None.")
        sketch_data = encode_sketch(sketch, spec=spec, vocab_size=self._identity.vocab_size, name=sketch_name)
        projection_data = encode_projection(projection, spec=spec, name=projection_name)
        record = SketchRecord(
            rank=spec.rank,
            bits=spec.bits,
            hidden_size=len(projection.mean),
            softcap=sketch.softcap,
            sketch=record_of(sketch_name, sketch_data),
            projection=record_of(projection_name, projection_data),
            num_examples=self.num_examples,
        )
        for file in (record.sketch, record.projection):
            if file.size > layout.MAX_FILE_BYTES:
                raise CacheError(f"{file.name} would have {file.size} bytes; lower the rank in --store-tail.")
        atomic.make_folder(self._folder / layout.SKETCHES)
        atomic.write_file(self._folder / sketch_name, sketch_data)
        atomic.write_file(self._folder / projection_name, projection_data)
        self._commit(layer, record)
        self.records = dict(sorted([*self.records.items(), (layer, record)]))
        self._clean_up()

    def _commit(self, layer: int, record: SketchRecord) -> None:
        commit = SketchCommit(plan_sha256=self._plan_sha256, layer=layer, sketch=record)
        atomic.write_file(self._folder / layout.sketch_commit_name(layer), to_bytes(commit))

    def read_calibration(self) -> bytes | None:
        """The content of the scratch file if it is there, whole, and of this plan."""
        try:
            data = read_plain(self._folder, layout.CALIBRATION, max_bytes=_SHA256_BYTES + layout.MAX_CALIBRATION_BYTES)
        except CacheError:
            return None
        content = memoryview(data)[_SHA256_BYTES:]
        return bytes(content) if data[:_SHA256_BYTES] == self._seal(content) else None

    def write_calibration(self, data: bytes) -> None:
        """Replace the scratch file."""
        if not self.missing():
            raise CacheError(f"{self._folder} lacks no sketch, so there is nothing left to calibrate.")
        if len(data) > layout.MAX_CALIBRATION_BYTES:
            raise CacheError(
                f"the state of the calibration has {len(data)} bytes; "
                f"at most {layout.MAX_CALIBRATION_BYTES} can be kept."
            )
        atomic.write_file(self._folder / layout.CALIBRATION, self._seal(data) + data)

    def _seal(self, data: bytes | memoryview) -> bytes:
        """Digest of the plan and of ``data``: what another plan left behind is not believed."""
        digest = hashlib.sha256(self._plan_sha256.encode())
        digest.update(data)
        return digest.digest()

    def _clean_up(self) -> None:
        path = self._folder / layout.CALIBRATION
        if not self.missing() and os.path.lexists(path):
            atomic.remove(path)

    def _committed(self, layer: int) -> SketchRecord | None:
        """The record of a sketch whose files are all as it says; None if it has to be written."""
        record = self._record(layer)
        try:
            for file in () if record is None else (record.sketch, record.projection):
                read_recorded(self._folder, file, max_bytes=layout.MAX_FILE_BYTES)
        except CacheError:
            return None
        return record

    def _record(self, layer: int) -> SketchRecord | None:
        """What the commit of a sketch says, in the words of this plan; None without a sound one of this or the base."""
        try:
            commit = read_commit(self._folder, layer)
            commit.sketch.check(layer, self._identity)
        except CacheError:
            return None
        if commit.plan_sha256 not in (self._plan_sha256, self._base_sha256) or commit.layer != layer:
            return None
        if commit.plan_sha256 == self._plan_sha256 or commit.sketch.num_examples:
            return commit.sketch
        return commit.sketch.model_copy(update={"num_examples": self._num_base})


def _of_all(record: SketchRecord, num_examples: int) -> SketchRecord:
    """A record as it was when there were only ``num_examples``: fitted to all of them, if not to fewer."""
    return record.model_copy(update={"num_examples": 0}) if record.num_examples == num_examples else record


def read_commit(folder: Path, layer: int) -> SketchCommit:
    """The record that commits the sketch of ``layer``."""
    name = layout.sketch_commit_name(layer)
    data = read_plain(folder, name, max_bytes=layout.MAX_SIDECAR_BYTES)
    return from_bytes(SketchCommit, data, name=name)


def read_sketch(folder: Path, record: SketchRecord, identity: Identity) -> Sketch:
    """A sketch from its file, checked."""
    data = read_recorded(folder, record.sketch, max_bytes=layout.MAX_FILE_BYTES)
    return decode_sketch(data, record, vocab_size=identity.vocab_size)


def read_projection(folder: Path, record: SketchRecord) -> Projection:
    """A projection from its file, checked."""
    data = read_recorded(folder, record.projection, max_bytes=layout.MAX_FILE_BYTES)
    return decode_projection(data, record)

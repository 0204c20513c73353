"""The shards in a cache's folder: which are committed, and what they add up to."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distilllens_cache import atomic, layout
from distilllens_cache.errors import CacheError
from distilllens_cache.files import read_plain, read_recorded
from distilllens_cache.manifest import LayerStats, Plan, Sidecar, from_bytes, to_bytes
from distilllens_cache.sketch_store import SketchStore
from distilllens_cache.tail_sums import add_tails, decode_tails, encode_tails


class ShardStore:
    """What a writer knows of the shards of its plan.

    Where the plan adds examples to an older one, its first shards may still be committed for that one.
    """

    def __init__(
        self, folder: Path, plan: Plan, plan_sha256: str, sketches: SketchStore, *, base: tuple[str, int] | None = None
    ) -> None:
        """``base``: the plan that this one is made from by adding examples, and how many shards it has."""
        self._folder = folder
        self._plan = plan
        self._plan_sha256 = plan_sha256
        self._sketches = sketches
        self._base_sha256, self._num_base = base or (plan_sha256, 0)
        self._done: dict[int, Sidecar] = {}
        self.find()

    def find(self) -> None:
        """Find out which shards are done, from all bytes; none is before the sketches that their codes belong to."""
        if not self._sketches.missing():
            self._done = {}
            self._look_for(range(len(self._plan.shards)), read_files=True)

    def look_again(self) -> None:
        """Find what others have committed meanwhile, believing their sidecars."""
        if not self._sketches.missing():
            self._look_for(self.missing(), read_files=False)

    def missing(self) -> list[int]:
        """Numbers of the shards still to be written, ascending."""
        return [number for number in range(len(self._plan.shards)) if number not in self._done]

    def commit(self, sidecar: Sidecar) -> None:
        """Write the sidecar of a shard whose files are there."""
        atomic.write_file(self._folder / layout.sidecar_name(sidecar.number), to_bytes(sidecar))
        self._done[sidecar.number] = sidecar

    def adopt(self) -> None:
        """Write the sidecars of the older plan's shards anew, for this one."""
        for number in range(self._num_base):
            self.commit(self._done[number])

    def sidecars(self) -> list[Sidecar]:
        """Those of all shards, which must be done, in order."""
        return [self._done[number] for number in range(len(self._plan.shards))]

    def layer_stats(self) -> dict[int, LayerStats]:
        """Sums over all shards, in their order, so that rounding is the same every time."""
        sums: dict[int, LayerStats] = {}
        for sidecar in self.sidecars():
            for layer, stats in sidecar.layer_stats.items():
                sums[layer] = sums[layer] + stats if layer in sums else stats
        return sums

    def total_tails(self) -> memoryview:
        """The file with the sum of all shards' tail sums."""
        identity = self._plan.identity
        total: dict[int, NDArray[np.int64]] = {}
        num_targets = 0
        for sidecar in self.sidecars():
            shard = sidecar.shard
            assert shard.tails is not None
            data = read_recorded(self._folder, shard.tails, max_bytes=layout.MAX_FILE_BYTES)
            tails = decode_tails(data, identity, num_targets=shard.num_targets, name=shard.tails.name)
            add_tails(total, tails, name=layout.TAIL_SUMS)
            num_targets += shard.num_targets
        return encode_tails(total, identity, num_targets=num_targets, name=layout.TAIL_SUMS)

    def _look_for(self, numbers: list[int] | range, *, read_files: bool) -> None:
        for number in numbers:
            path = self._folder / layout.sidecar_name(number)
            was_there = read_files and number >= self._num_base and os.path.lexists(path)
            sidecar = self._committed(number, read_files=read_files)
            if sidecar is not None:
                self._done[number] = sidecar
            elif was_there and self._committed(number, read_files=False) is not None:
                # Whoever looks again believes a sidecar, so none may stay whose shard is damaged. Those of an older
                # plan stay: adding to a cache that lacks a shard is refused, and then changes nothing.
                atomic.remove(path)

    def _committed(self, number: int, *, read_files: bool) -> Sidecar | None:
        """The sidecar of a shard whose files are all as it says; None if the shard has to be written."""
        planned, identity = self._plan.shards[number], self._plan.identity
        try:
            data = read_plain(self._folder, layout.sidecar_name(number), max_bytes=layout.MAX_SIDECAR_BYTES)
            sidecar = from_bytes(Sidecar, data, name=layout.sidecar_name(number))
            if number < self._num_base:
                sidecar = self._adopted(sidecar)
            shard = sidecar.shard
            shard.check_names(number, identity)
            if (
                (sidecar.plan_sha256, sidecar.number) != (self._plan_sha256, number)
                or sidecar.sketches_sha256 != self._sketches.digest()
                or shard.codec != identity.codec
                or shard.num_examples != planned.stop - planned.first
                or tuple(sorted(sidecar.layer_stats)) != identity.layers
            ):
                return None
            for record in shard.files if read_files else ():
                read_recorded(self._folder, record, max_bytes=layout.limit_of(record.name))
        except CacheError:
            return None
        return sidecar

    def _adopted(self, sidecar: Sidecar) -> Sidecar:
        """A sidecar of the older plan as it will be in this one; any other as it is."""
        of_base = (self._base_sha256, self._sketches.digest(self._base_sha256))
        if (sidecar.plan_sha256, sidecar.sketches_sha256) != of_base:
            return sidecar
        ours = {"plan_sha256": self._plan_sha256, "sketches_sha256": self._sketches.digest()}
        return sidecar.model_copy(update=ours)

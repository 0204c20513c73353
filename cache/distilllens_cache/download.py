"""From a remote folder to the staging folder: what a run needs to go on with the cache that lies there."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from distilllens_cache import atomic, layout
from distilllens_cache import folder as folder_state
from distilllens_cache.errors import CacheError
from distilllens_cache.files import check_recorded, read_recorded, record_of
from distilllens_cache.identity import compare_identity
from distilllens_cache.index import Index
from distilllens_cache.manifest import FileRecord, Plan, from_bytes
from distilllens_cache.remote_cache import RemoteCache
from distilllens_cache.repair import restore_plan
from distilllens_cache.resume import matching_plan, plan_digest, read_plan
from distilllens_cache.writer import plan_of


class Download:
    """Brings down what the staging folder lacks, and never changes what it has; each file is digested.

    In this order: `bring_plan` before the run's examples are known, `is_finished` and `bring` once they are.
    """

    def __init__(self, remote: RemoteCache, staging: Path) -> None:
        self.remote = remote
        self.staging = staging

    def bring_plan(self, *, append: bool = False) -> None:
        """Bring down plan and manifest. `CacheError` where the plans differ, or there is no cache to ``append`` to."""
        folder_state.check(self.staging)
        if (data := self.remote.commit(layout.PLAN)) and not (self.staging / layout.PLAN).exists():
            try:
                from_bytes(Plan, data, name=layout.PLAN)
            except CacheError as error:
                raise CacheError(
                    f"{self.remote.files} cannot be continued: {error} Choose another --output-dir, or pass "
                    f"--overwrite to delete this cache and start anew."
                ) from None
            self._keep(layout.PLAN, data)
        if self.remote.manifest() is not None and not (self.staging / layout.MANIFEST).exists():
            self._keep(layout.MANIFEST, self.remote.commit(layout.MANIFEST))
        if self.remote.is_damaged and (self.staging / layout.MANIFEST).exists():
            restore_plan(self.staging)
        folder_state.require_plan(self.staging, append=append, where=self.remote.files)
        self._require_one_plan()

    def bring_beside(self, places: Mapping[str, Path]) -> None:
        """Bring down files that are no part of the cache, by their name there, each to its place unless it has one."""
        for name, path in places.items():
            if name in self.remote.sizes and not path.exists():
                atomic.make_folder(path.parent)
                atomic.write_file(path, self.remote.files.read(name, max_bytes=layout.MAX_FILE_BYTES))

    def is_finished(self, *, append: bool = False, **contents: Any) -> bool:
        """Whether the remote cache is whole, as far as its plan, its manifest and the sizes of its files tell.

        ``contents`` are the arguments of the `CacheWriter`. `CacheError` if there is another cache than they describe.
        """
        plan = self.remote.plan()
        for record in () if plan is None else (plan.index, *plan.tokenizer_files):
            self._bring_file(record, max_bytes=layout.MAX_FILE_BYTES)
        if not (self.staging / layout.PLAN).exists():
            return False
        wanted = plan_of(**contents)
        found = matching_plan(self.staging, wanted, contents["examples"], append=append, where=self.remote.files)
        return found == wanted and not self.remote.is_damaged and self.remote.is_whole(plan_digest(wanted))

    def bring(self) -> None:
        """Bring down the rest of what is committed there; what is damaged or missing is not believed from now on."""
        for commit, records in self.remote.groups():
            is_sound = [self._bring_file(record, max_bytes=layout.limit_of(record.name)) for record in records]
            if all(is_sound) and not (self.staging / commit).exists():
                self._keep(commit, self.remote.commit(commit))
        manifest = self.remote.manifest()
        if manifest is not None and manifest.tail_sums is not None:
            self._bring_file(manifest.tail_sums, max_bytes=layout.MAX_FILE_BYTES)

    def _require_one_plan(self) -> None:
        """`CacheError` unless the staging folder holds the cache that the remote one does, or one made longer."""
        theirs = self.remote.plan()
        if theirs is None or not (self.staging / layout.PLAN).exists():
            return
        ours = read_plan(self.staging)
        if ours == theirs:
            return
        # What the dataset holds is what an append changes; that the examples go on is looked up.
        fields = [name for name in type(ours.identity).model_fields if name != "dataset_digest"]
        differences = compare_identity(ours.identity, theirs.identity, fields)
        if not differences and not self._is_continued(theirs, ours):
            differences = ["other examples, or other shards"]
        if differences:
            lines = "\n  ".join(differences)
            raise CacheError(
                f"the staging folder {self.staging} holds another cache than {self.remote.files} does:\n  {lines}\n"
                f"Delete the staging folder, or give another --staging-dir or --output-dir."
            )

    def _is_continued(self, shorter: Plan, longer: Plan) -> bool:
        """Whether the staging folder's plan begins with the remote one's."""
        count = shorter.num_examples
        if longer.num_examples <= count or longer.shards[: len(shorter.shards)] != shorter.shards:
            return False
        data = self.remote.files.read(layout.INDEX, max_bytes=layout.MAX_FILE_BYTES)
        if record_of(layout.INDEX, data) == longer.index:  # it goes up before the plan
            return True
        check_recorded(data, shorter.index, where=self.remote.files)
        theirs = Index(data, num_examples=count)
        ours = Index(
            read_recorded(self.staging, longer.index, max_bytes=layout.MAX_FILE_BYTES),
            num_examples=longer.num_examples,
        )
        return all(theirs[place] == ours[place] for place in range(count))

    def _bring_file(self, record: FileRecord, *, max_bytes: int) -> bool:
        """Bring a file down unless the staging folder has one of its name; whether it has one now."""
        if (self.staging / record.name).exists():
            return True
        if self.remote.sizes.get(record.name) == record.size <= max_bytes:
            for _ in range(2):  # it may be damaged on the way
                data = self.remote.files.read(record.name, max_bytes=record.size)
                with suppress(CacheError):
                    check_recorded(data, record, where=self.remote.files)
                    self._keep(record.name, data)
                    return True
        self.remote.distrust(record.name)
        return False

    def _keep(self, name: str, data: bytes) -> None:
        path = self.staging / name
        atomic.make_folder(path.parent)
        atomic.write_file(path, data)

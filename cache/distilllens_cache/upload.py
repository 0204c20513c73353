"""A cache that goes to a remote folder: written to a staging folder of this machine, put up in the order of commitment.

The staging folder is a cache's folder like any other, so all promises of a writer hold in it. The remote one follows:
a commit (the sidecar of a shard, that of a sketch, the manifest) is there only while all files that it names are there
as it says. Whatever changes is preceded by taking away its commit, and the manifest goes first of all.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from distilllens_cache import atomic, layout
from distilllens_cache import folder as folder_state
from distilllens_cache.errors import CacheError
from distilllens_cache.files import check_recorded, read_plain, read_recorded, record_of
from distilllens_cache.identity import compare_identity
from distilllens_cache.index import Index
from distilllens_cache.manifest import FileRecord, Manifest, Plan, Sidecar, SketchCommit, from_bytes
from distilllens_cache.remote_files import RemoteFiles
from distilllens_cache.remote_lock import RemoteLock
from distilllens_cache.repair import restore_plan
from distilllens_cache.resume import matching_plan, plan_digest, read_plan
from distilllens_cache.writer import plan_of

Stamp = tuple[int, int, int]
"""Inode, time and size of a file: one that is written again gets another."""
Group = tuple[str, tuple[str, ...]]
"""A commit, and the files that it commits."""


class Upload:
    """The remote folder of one cache and its staging folder, from one process.

    In this order: `lock`, `look`, `bring_plan`, `is_finished`, `bring`; a `CacheWriter` in the staging folder; `push`
    as often as one likes, `push_all` once it is finished.
    """

    def __init__(self, url: str, staging: Path, *, beside: Sequence[str] = (), damaged: Sequence[str] = ()) -> None:
        """``beside`` are files that are no part of the cache and go up after it.

        ``damaged`` are files of the remote folder that are known to be, and are not believed.
        """
        self.files = RemoteFiles(url)
        self.lock = RemoteLock(self.files)
        self.staging = staging
        self.written: list[str] = []
        """Files that were put up, in that order."""
        self._beside = tuple(beside)
        self._damaged = tuple(damaged)
        self._names: set[str] = set()
        """What the remote folder holds."""
        self._sizes: dict[str, int] = {}
        """Bytes of that of it which is believed."""
        self._commits: dict[str, bytes] = {}
        """Commits in the remote folder that were read."""
        self._same: dict[str, Stamp] | None = None
        """Files of the staging folder, as they were when the remote folder had their bytes. None before `push`."""

    def look(self) -> None:
        """See what the remote folder holds. `CacheError` if that is something else than a cache."""
        self._sizes = self.files.sizes()
        self._sizes.pop(layout.REMOTE_LOCK, None)
        self._names = set(self._sizes)
        records = (layout.PLAN, layout.MANIFEST)
        foreign = [name for name in self._sizes if not _is_own(name) and name not in self._beside]
        is_cache = any(b'"distilllens-' in self._commit(name) for name in records)
        if (foreign and not is_cache) or (self._commit(layout.PLAN) and not is_cache):
            some = ", ".join(sorted(self._sizes)[:3])
            raise CacheError(
                f"{self.files} holds something that is not a cache ({some}); nothing was changed. Choose an empty or "
                f"new --output-dir."
            )
        for name in self._damaged:
            self._distrust(name)

    def bring_plan(self, *, is_main: bool = True) -> None:
        """Bring down plan and manifest where the staging folder lacks them. `CacheError` where the plans differ.

        Of the ranks of a run, all bring the plan and the main one the manifest too.
        """
        folder_state.check(self.staging)
        if (data := self._commit(layout.PLAN)) and not (self.staging / layout.PLAN).exists():
            try:
                from_bytes(Plan, data, name=layout.PLAN)
            except CacheError as error:
                raise CacheError(
                    f"{self.files} cannot be continued: {error} Choose another --output-dir, or pass --overwrite to "
                    f"delete this cache and start anew."
                ) from None
            self._keep(layout.PLAN, data)
        if is_main and self._manifest() is not None and not (self.staging / layout.MANIFEST).exists():
            self._keep(layout.MANIFEST, self._commit(layout.MANIFEST))
        if is_main and self._damaged and (self.staging / layout.MANIFEST).exists():
            restore_plan(self.staging)
        if is_main:
            self._require_one_plan()

    def is_finished(self, *, append: bool = False, **contents: Any) -> bool:
        """Whether the remote cache is whole, as far as its plan, its manifest and the sizes of its files tell.

        ``contents`` are the arguments of the `CacheWriter`. `CacheError` if there is another cache than they describe.
        """
        plan = self._remote_plan()
        if plan is not None:
            for record in (plan.index, *plan.tokenizer_files):
                self._bring_file(record, max_bytes=layout.MAX_FILE_BYTES)
        if (self.staging / layout.PLAN).exists():
            wanted = plan_of(**contents)
            found = matching_plan(self.staging, wanted, contents["examples"], append=append)
            return found == wanted and not self._damaged and self._is_whole(plan_digest(wanted))
        return False

    def bring(self) -> None:
        """Bring down the rest of what is committed there and the staging folder lacks, each file digested."""
        self._read_commits()
        for commit, records in self._remote_groups():
            is_sound = [self._bring_file(record, max_bytes=layout.limit_of(record.name)) for record in records]
            if all(is_sound) and not (self.staging / commit).exists():
                self._keep(commit, self._commits[commit])
        manifest = self._manifest()
        if manifest is not None and manifest.tail_sums is not None:
            self._bring_file(manifest.tail_sums, max_bytes=layout.MAX_FILE_BYTES)
        for name in self._beside:
            if name in self._sizes and not (self.staging / name).exists():
                self._keep(name, self.files.read(name, max_bytes=layout.MAX_SIDECAR_BYTES))

    def push(self, *, anew: bool = False) -> None:
        """Put up what is committed in the staging folder and not yet in the remote one; take away what is no more.

        ``anew`` believes nothing that lies there: whatever a writer of caches made is deleted, the manifest first.
        """
        staged = self._staged()
        if self._same is None or anew:
            self._read_commits()
            self._same = {} if anew else self._compare(staged)
        if not self._is_same(layout.MANIFEST, staged):
            self._remove(layout.MANIFEST)
        self._remove_others(staged, anew=anew)
        for commit, names in self._groups(staged):
            if all(self._is_same(name, staged) for name in (*names, commit)):
                continue
            is_other = any(not self._is_same(name, staged) for name in names)
            if is_other and commit != layout.PLAN:  # which tells what the folder is until it is replaced
                self._remove(commit)
            for name in (*names, commit):
                if not self._is_same(name, staged) and not self._put(name, staged):
                    break  # another rank took it away meanwhile: the next time

    def push_all(self) -> None:
        """Put up the rest of a finished cache and what lies beside, see that all files are there, then the manifest."""
        self.push()
        for name in self._beside:
            if (self.staging / name).is_file():
                self.lock.require_held()
                self.files.put(name, (self.staging / name).read_bytes())
        staged = self._staged()
        data = read_plain(self.staging, layout.MANIFEST, max_bytes=layout.MAX_JSON_BYTES)
        self._require_there(from_bytes(Manifest, data, name=layout.MANIFEST))
        if not self._is_same(layout.MANIFEST, staged):
            self._put(layout.MANIFEST, staged)

    def _require_there(self, manifest: Manifest) -> None:
        """`CacheError` unless every file that the manifest names is there with its size, and every commit."""
        sizes = self.files.sizes()
        wanted = {record.name: record.size for record in manifest.files}
        for name in (layout.PLAN, *_commits_of(manifest)):
            wanted[name] = (self.staging / name).stat().st_size
        for name, size in wanted.items():
            if sizes.get(name) != size:
                found = "is missing" if name not in sizes else f"has {sizes[name]} bytes, not {size}"
                raise CacheError(
                    f"{name} in {self.files} {found}, though it was put there: something else changes that folder. "
                    f"Stop that and run the same command again; the cache is whole in {self.staging}."
                )

    def _is_whole(self, plan_sha256: str) -> bool:
        """Whether the remote manifest is of this plan and all that it names is there with its size."""
        manifest = self._manifest()
        return (
            manifest is not None
            and manifest.plan_sha256 == plan_sha256 == hashlib.sha256(self._commit(layout.PLAN)).hexdigest()
            and all(self._sizes.get(record.name) == record.size for record in manifest.files)
            and all(name in self._sizes for name in _commits_of(manifest))
        )

    def _remote_plan(self) -> Plan | None:
        try:
            return from_bytes(Plan, self._commit(layout.PLAN), name=layout.PLAN)
        except CacheError:
            return None

    def _manifest(self) -> Manifest | None:
        """The sound manifest in the remote folder."""
        try:
            return from_bytes(Manifest, self._commit(layout.MANIFEST), name=layout.MANIFEST)
        except CacheError:
            return None

    def _require_one_plan(self) -> None:
        """`CacheError` unless the staging folder holds the cache that the remote one does, or one made longer."""
        theirs = self._remote_plan()
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
                f"the staging folder {self.staging} holds another cache than {self.files} does:\n  {lines}\nDelete the "
                f"staging folder, or give another --staging-dir or --output-dir."
            )

    def _is_continued(self, shorter: Plan, longer: Plan) -> bool:
        """Whether the staging folder's plan begins with the remote one's."""
        count = shorter.num_examples
        if longer.num_examples <= count or longer.shards[: len(shorter.shards)] != shorter.shards:
            return False
        data = self.files.read(layout.INDEX, max_bytes=layout.MAX_FILE_BYTES)
        if record_of(layout.INDEX, data) == longer.index:  # it goes up before the plan
            return True
        check_recorded(data, shorter.index, where=self.files)
        theirs = Index(data, num_examples=count)
        ours = Index(
            read_recorded(self.staging, longer.index, max_bytes=layout.MAX_FILE_BYTES),
            num_examples=longer.num_examples,
        )
        return all(theirs[place] == ours[place] for place in range(count))

    def _remote_groups(self) -> Iterator[tuple[str, list[FileRecord]]]:
        """Commits of the remote folder that make sense, each with the records of its files."""
        for commit in sorted(filter(_committed_by, self._commits)):
            records = _records_of(commit, self._commits[commit])
            if records is None:
                self._distrust(commit)
            else:
                yield commit, records

    def _bring_file(self, record: FileRecord, *, max_bytes: int) -> bool:
        """Bring a file down unless the staging folder has one of its name; whether it has one now.

        What is damaged or missing there is not believed from now on.
        """
        if (self.staging / record.name).exists():
            return True
        if self._sizes.get(record.name) == record.size <= max_bytes:
            for _ in range(2):  # it may be damaged on the way
                data = self.files.read(record.name, max_bytes=record.size)
                with suppress(CacheError):
                    check_recorded(data, record, where=self.files)
                    self._keep(record.name, data)
                    return True
        self._distrust(record.name)
        return False

    def _keep(self, name: str, data: bytes) -> None:
        path = self.staging / name
        atomic.make_folder(path.parent)
        atomic.write_file(path, data)

    def _distrust(self, name: str) -> None:
        self._sizes.pop(name, None)
        self._commits.pop(name, None)

    def _commit(self, name: str) -> bytes:
        """The bytes of a commit in the remote folder; none if it is not there, or is too large to be one."""
        if name not in self._commits and 0 < self._sizes.get(name, 0) <= layout.MAX_JSON_BYTES:
            self._commits[name] = self.files.read(name, max_bytes=layout.MAX_JSON_BYTES)
        return self._commits.get(name, b"")

    def _read_commits(self) -> None:
        """Read all small commits of the remote folder that were not read yet."""
        sizes = {
            name: size
            for name, size in self._sizes.items()
            if _committed_by(name) and name not in self._commits and size <= layout.MAX_SIDECAR_BYTES
        }
        self._commits |= self.files.read_many(sizes)
        self._commit(layout.PLAN)
        self._commit(layout.MANIFEST)

    def _staged(self) -> dict[str, Stamp]:
        """Files of the cache in the staging folder. The manifest is looked for first: what it names is older."""
        found: dict[str, Stamp] = {}
        places = (layout.MANIFEST, layout.PLAN, layout.INDEX, layout.TAIL_SUMS)
        paths = [self.staging / name for name in places]
        walked = (p for part in (layout.SHARDS, layout.SKETCHES) for p in sorted((self.staging / part).glob("*")))
        with suppress(CacheError):
            paths += [self.staging / record.name for record in read_plan(self.staging).tokenizer_files]
        for path in (*paths, *walked):
            name = path.relative_to(self.staging).as_posix()
            if _is_own(name):
                with suppress(FileNotFoundError):
                    state = os.stat(path, follow_symlinks=False)
                    found[name] = (state.st_ino, state.st_mtime_ns, state.st_size)
        return found

    def _groups(self, staged: dict[str, Stamp]) -> list[Group]:
        """What is committed in the staging folder, in the order in which it goes up; the manifest is not among it.

        A new plan goes first. A longer one goes after the shards, as in a local folder: whoever finds the shorter one
        takes the commits of either.
        """
        base = tuple(name for name in staged if name == layout.INDEX or name.startswith(f"{layout.TOKENIZER}/"))
        plan: list[Group] = [(layout.PLAN, ())] if layout.PLAN not in self._names else []
        commits = [name for name in staged if _committed_by(name)]
        commits.sort(key=lambda name: (name.startswith(f"{layout.SHARDS}/"), name))
        parts = [(name, tuple(one for one in _committed_by(name) if one in staged)) for name in commits]
        sums = [name for name in (layout.TAIL_SUMS,) if name in staged and layout.MANIFEST in staged]
        return [*plan, *parts, (layout.PLAN, base), *((name, ()) for name in sums)]

    def _compare(self, staged: dict[str, Stamp]) -> dict[str, Stamp]:
        """Files that both folders have alike: those whose commits say the same of them, and that have their sizes."""
        same: dict[str, Stamp] = {}
        groups = [group for group in self._groups(staged) if group[0] in staged and group[0] != layout.TAIL_SUMS]
        if layout.MANIFEST in staged:
            groups.append((layout.MANIFEST, (layout.TAIL_SUMS,)))
        for commit, names in groups:
            theirs, ours = self._commits.get(commit), _read(self.staging, commit)
            if theirs is None or ours is None:
                continue
            if theirs == ours:
                same[commit] = staged[commit]
            # The commits of a cache made longer differ in the plan that they name.
            if theirs == ours or ((records := _records_of(commit, ours)) and records == _records_of(commit, theirs)):
                alike = (name for name in names if name in staged and self._sizes.get(name) == staged[name][2])
                same |= {name: staged[name] for name in alike}
        return same

    def _is_same(self, name: str, staged: dict[str, Stamp]) -> bool:
        assert self._same is not None
        return name in staged and self._same.get(name) == staged[name]

    def _put(self, name: str, staged: dict[str, Stamp]) -> bool:
        """Put a file up; whether it was still there."""
        assert self._same is not None
        data = _read(self.staging, name)
        if data is None:
            return False
        self.lock.require_held()
        self._same.pop(name, None)
        self._names.add(name)
        self.files.put(name, data)
        self._same[name] = staged[name]
        self.written.append(name)
        return True

    def _remove(self, *names: str) -> None:
        """Take away those of the files that are there."""
        assert self._same is not None
        for name in names:
            if name in self._names:
                self.lock.require_held()
                self.files.remove([name])
                self._names.remove(name)
                self._same.pop(name, None)

    def _remove_others(self, staged: dict[str, Stamp], *, anew: bool) -> None:
        """Take away what a writer made there and the staging folder has no more: commits before what they commit."""

        def is_other(name: str) -> bool:
            is_tokenizer = name.startswith(f"{layout.TOKENIZER}/")
            return _is_own(name) and name != layout.PLAN and (anew or (name not in staged and not is_tokenizer))

        self._remove(*sorted(filter(is_other, self._names), key=lambda name: (not _committed_by(name), name)))


def _is_own(name: str) -> bool:
    """Whether a writer of caches makes files of this name that are part of a cache."""
    if name.startswith(f"{layout.TOKENIZER}/"):
        return layout.is_safe_name(name)
    is_own = layout.OWN_FILE.fullmatch(name) is not None and name != layout.CALIBRATION
    return is_own and layout.TEMPORARY.fullmatch(name) is None


def _commits_of(manifest: Manifest) -> list[str]:
    """The sidecars and the commits of sketches of a finished cache."""
    sidecars = [layout.sidecar_name(number) for number in range(len(manifest.shards))]
    return [*sidecars, *(layout.sketch_commit_name(layer) for layer in manifest.sketches)]


def _committed_by(name: str) -> tuple[str, ...]:
    """The files that the sidecar of a shard or the commit of a sketch called ``name`` may name; none otherwise."""
    folder, _, file = name.partition("/")
    if not _is_own(name) or not file.endswith(".json") or folder not in (layout.SHARDS, layout.SKETCHES):
        return ()
    stem = name.removesuffix(".json")
    others = (".tails.arrow", ".tail_rows.arrow") if folder == layout.SHARDS else (".projection.arrow",)
    return tuple(f"{stem}{end}" for end in (".arrow", *others))


def _records_of(commit: str, data: bytes) -> list[FileRecord] | None:
    """The records of the files that a sidecar, or the commit of a sketch, commits; None if it makes no sense."""
    try:
        if commit.startswith(f"{layout.SHARDS}/"):
            records: list[FileRecord] = from_bytes(Sidecar, data, name=commit).shard.files
        else:
            sketch = from_bytes(SketchCommit, data, name=commit).sketch
            records = [sketch.sketch, sketch.projection]
    except CacheError:
        return None
    return records if {record.name for record in records} <= set(_committed_by(commit)) else None


def _read(folder: Path, name: str) -> bytes | None:
    """The bytes of a file of the staging folder; None if it is gone."""
    if not os.path.lexists(folder / name):
        return None
    return read_plain(folder, name, max_bytes=layout.MAX_FILE_BYTES)

"""From the staging folder of this machine to a remote folder: a cache goes up in the order of commitment.

The staging folder is a cache's folder like any other, so all promises of a writer hold in it. The remote one follows:
a commit (the sidecar of a shard, that of a sketch, the manifest) is there only while all files that it names are there
as it says. Whatever changes is preceded by taking away its commit, and the manifest goes first of all.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from distilllens_cache import layout
from distilllens_cache.commits import commits_of, committed_by, is_own, records_of
from distilllens_cache.errors import CacheError
from distilllens_cache.files import read_plain
from distilllens_cache.manifest import Manifest, from_bytes
from distilllens_cache.remote_cache import RemoteCache
from distilllens_cache.remote_lock import RemoteLock
from distilllens_cache.resume import read_plan

Stamp = tuple[int, int, int]
"""Inode, time and size of a file: one that is written again gets another."""
Group = tuple[str, tuple[str, ...]]
"""A commit, and the files that it commits."""


class Upload:
    """Makes a remote folder follow a staging folder in which a `CacheWriter` is at work: `push`, and last `push_all`.

    Of one process at a time, which holds ``lock``.
    """

    def __init__(
        self,
        remote: RemoteCache,
        lock: RemoteLock,
        staging: Path,
        *,
        beside: Mapping[str, Path] | None = None,
        anew: bool = False,
    ) -> None:
        """Compare both folders: files that their commits describe alike, and that have their sizes, stay.

        ``anew`` believes nothing that lies there: whatever a writer of caches made is deleted, the manifest first.
        ``beside`` are files that are no part of the cache, by their name there.
        """
        self.staging = staging
        self.written: list[str] = []
        """Files that were put up, in that order."""
        self._files = remote.files
        self._lock = lock
        self._beside = beside or {}
        self._names = set(remote.names)
        """What the remote folder holds."""
        self._same: dict[str, Stamp] = {}
        """Files of the staging folder, as they were when the remote folder had their bytes."""
        if anew:
            self._remove({name for name in self._names if is_own(name) and name != layout.PLAN})
        else:
            self._compare(remote)

    def push(self) -> None:
        """Put up what is committed in the staging folder and not yet in the remote one; take away what is no more."""
        staged = self._staged()
        is_other = {layout.MANIFEST} if not self._is_same(layout.MANIFEST, staged) else set()
        for name in self._names - staged.keys():
            if is_own(name) and name != layout.PLAN and not name.startswith(f"{layout.TOKENIZER}/"):
                is_other.add(name)
        self._remove(is_other)
        for commit, names in self._groups(staged):
            changed = [name for name in names if not self._is_same(name, staged)]
            if changed and commit != layout.PLAN:  # which tells what the folder is until it is replaced
                self._remove({commit})
            for name in (*changed, commit):
                if not self._is_same(name, staged) and not self._put(name, staged):
                    break  # another rank took it away meanwhile: the next time
        self._push_beside()

    def push_all(self) -> None:
        """Put up the rest of a finished cache, see that all files are there, and last put up the manifest."""
        self.push()
        staged = self._staged()
        data = read_plain(self.staging, layout.MANIFEST, max_bytes=layout.MAX_JSON_BYTES)
        self._require_there(from_bytes(Manifest, data, name=layout.MANIFEST))
        if not self._is_same(layout.MANIFEST, staged):
            self._put(layout.MANIFEST, staged)

    def _push_beside(self) -> None:
        stamps = {name: stamp for name, path in self._beside.items() if (stamp := _stamp(path)) is not None}
        for name in stamps:
            if not self._is_same(name, stamps):
                self._put(name, stamps)

    def _require_there(self, manifest: Manifest) -> None:
        """`CacheError` unless every file that the manifest names is there with its size, and every commit."""
        sizes = self._files.sizes()
        wanted = {record.name: record.size for record in manifest.files}
        for name in (layout.PLAN, *commits_of(manifest)):
            wanted[name] = (self.staging / name).stat().st_size
        for name, size in wanted.items():
            if sizes.get(name) != size:
                found = "is missing" if name not in sizes else f"has {sizes[name]} bytes, not {size}"
                raise CacheError(
                    f"{name} in {self._files} {found}, though it was put there: something else changes that folder. "
                    f"Stop that and run the same command again; the cache is whole in {self.staging}."
                )

    def _staged(self) -> dict[str, Stamp]:
        """Files of the cache in the staging folder. The manifest is looked for first: what it names is older."""
        places = (layout.MANIFEST, layout.PLAN, layout.INDEX, layout.TAIL_SUMS)
        paths = [self.staging / name for name in places]
        walked = (p for part in (layout.SHARDS, layout.SKETCHES) for p in sorted((self.staging / part).glob("*")))
        with suppress(CacheError):
            paths += [self.staging / record.name for record in read_plan(self.staging).tokenizer_files]
        found = ((path.relative_to(self.staging).as_posix(), _stamp(path)) for path in (*paths, *walked))
        return {name: stamp for name, stamp in found if stamp is not None and is_own(name)}

    def _groups(self, staged: dict[str, Stamp]) -> list[Group]:
        """What is committed in the staging folder, in the order in which it goes up; the manifest is not among it.

        A new plan goes first. A longer one goes after the shards, as in a local folder: whoever finds the shorter one
        takes the commits of either.
        """
        base = tuple(name for name in staged if name == layout.INDEX or name.startswith(f"{layout.TOKENIZER}/"))
        plan: list[Group] = [(layout.PLAN, ())] if layout.PLAN not in self._names else []
        commits = [name for name in staged if committed_by(name)]
        commits.sort(key=lambda name: (name.startswith(f"{layout.SHARDS}/"), name))
        parts = [(name, tuple(one for one in committed_by(name) if one in staged)) for name in commits]
        sums = [name for name in (layout.TAIL_SUMS,) if name in staged and layout.MANIFEST in staged]
        return [*plan, *parts, (layout.PLAN, base), *((name, ()) for name in sums)]

    def _compare(self, remote: RemoteCache) -> None:
        """Note which files both folders have alike."""
        remote.read_commits()
        staged = self._staged()
        groups = [group for group in self._groups(staged) if group[0] in staged and group[0] != layout.TAIL_SUMS]
        if layout.MANIFEST in staged:
            groups.append((layout.MANIFEST, (layout.TAIL_SUMS,)))
        for commit, names in groups:
            theirs, ours = remote.commit(commit), self._read(commit)
            if not theirs or ours is None:
                continue
            if theirs == ours:
                self._same[commit] = staged[commit]
            # The commits of a cache made longer differ in the plan that they name.
            if theirs == ours or ((records := records_of(commit, ours)) and records == records_of(commit, theirs)):
                alike = (name for name in names if name in staged and remote.sizes.get(name) == staged[name][2])
                self._same |= {name: staged[name] for name in alike}

    def _is_same(self, name: str, staged: dict[str, Stamp]) -> bool:
        return name in staged and self._same.get(name) == staged[name]

    def _put(self, name: str, staged: dict[str, Stamp]) -> bool:
        """Put a file up; whether it was still there."""
        data = self._read(name)
        if data is None:
            return False
        self._same.pop(name, None)
        self._names.add(name)
        self._files.put(name, data, check=self._lock.require_held)
        self._same[name] = staged[name]
        self.written.append(name)
        return True

    def _read(self, name: str) -> bytes | None:
        """The bytes of what goes up under ``name``; None if it is gone."""
        place = self._beside.get(name)
        if not os.path.lexists(place or self.staging / name):
            return None
        return place.read_bytes() if place else read_plain(self.staging, name, max_bytes=layout.MAX_FILE_BYTES)

    def _remove(self, names: set[str]) -> None:
        """Take away those of the files that are there: the manifest, then commits, then what they commit."""
        order = sorted(names & self._names, key=lambda one: (one != layout.MANIFEST, not committed_by(one), one))
        for name in order:
            self._files.remove(name, check=self._lock.require_held)
            self._names.remove(name)
            self._same.pop(name, None)


def _stamp(path: Path) -> Stamp | None:
    """That of a file; None if it is gone."""
    try:
        state = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return (state.st_ino, state.st_mtime_ns, state.st_size)

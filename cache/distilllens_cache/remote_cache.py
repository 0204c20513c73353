"""What a remote folder holds of a cache, as it was when one looked."""

import hashlib
from collections.abc import Iterator, Sequence

from distilllens_cache import layout
from distilllens_cache.commits import commits_of, committed_by, is_own, records_of
from distilllens_cache.errors import CacheError
from distilllens_cache.manifest import FileRecord, Manifest, Plan, from_bytes
from distilllens_cache.remote_files import RemoteFiles


class RemoteCache:
    """The files behind a URL at one moment; plan, manifest and commits are read when asked for.

    What is found to be damaged is forgotten by `distrust`, as if it were not there.
    """

    def __init__(self, files: RemoteFiles, *, damaged: Sequence[str] = ()) -> None:
        """`CacheError` if the folder holds something else than a cache. ``damaged`` are files known to be."""
        self.files = files
        self.is_damaged = bool(damaged)
        self.sizes = files.sizes()
        """Bytes of the files that are believed, by name."""
        self.sizes.pop(layout.REMOTE_LOCK, None)
        self.names = frozenset(self.sizes)
        """All that is there, believed or not."""
        self._commits: dict[str, bytes] = {}
        is_cache = any(b'"distilllens-' in self.commit(name) for name in (layout.PLAN, layout.MANIFEST))
        if not is_cache and (self.commit(layout.PLAN) or not all(map(is_own, self.names))):
            some = ", ".join(sorted(self.names)[:3])
            raise CacheError(
                f"{files} holds something that is not a cache ({some}); nothing was changed. Choose an empty or new "
                f"--output-dir."
            )
        for name in damaged:
            self.distrust(name)

    def distrust(self, name: str) -> None:
        """Take a file for missing."""
        self.sizes.pop(name, None)
        self._commits.pop(name, None)

    def commit(self, name: str) -> bytes:
        """The bytes of plan, manifest or a commit; none if it is not there, or is too large to be one."""
        if name not in self._commits and 0 < self.sizes.get(name, 0) <= layout.MAX_JSON_BYTES:
            self._commits[name] = self.files.read(name, max_bytes=layout.MAX_JSON_BYTES)
        return self._commits.get(name, b"")

    def plan(self) -> Plan | None:
        """The sound plan."""
        try:
            return from_bytes(Plan, self.commit(layout.PLAN), name=layout.PLAN)
        except CacheError:
            return None

    def manifest(self) -> Manifest | None:
        """The sound manifest."""
        try:
            return from_bytes(Manifest, self.commit(layout.MANIFEST), name=layout.MANIFEST)
        except CacheError:
            return None

    def groups(self) -> Iterator[tuple[str, list[FileRecord]]]:
        """Commits of shards and sketches that make sense, each with the records of its files."""
        self.read_commits()
        for commit in sorted(filter(committed_by, self._commits)):
            records = records_of(commit, self._commits[commit])
            if records is None:
                self.distrust(commit)
            else:
                yield commit, records

    def read_commits(self) -> None:
        """Read all commits of shards and sketches that were not read yet, many at once."""
        sizes = {
            name: size
            for name, size in self.sizes.items()
            if committed_by(name) and name not in self._commits and size <= layout.MAX_SIDECAR_BYTES
        }
        self._commits |= self.files.read_many(sizes)

    def is_whole(self, plan_sha256: str) -> bool:
        """Whether the manifest is of this plan and all that it names is there with its size."""
        manifest = self.manifest()
        return (
            manifest is not None
            and manifest.plan_sha256 == plan_sha256 == hashlib.sha256(self.commit(layout.PLAN)).hexdigest()
            and all(self.sizes.get(record.name) == record.size for record in manifest.files)
            and all(name in self.sizes for name in commits_of(manifest))
        )

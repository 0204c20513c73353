"""The files behind a URL as a writer needs them: listed, fetched, put there whole, taken away."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from distilllens_cache.errors import CacheError
from distilllens_cache.remote_folder import RemoteFolder
from distilllens_cache.spool import Spool

WITHOUT_FOLDERS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "memory"})
"""Stores in which a file needs no folder. Making one there could make a bucket."""
FILES_AT_ONCE = 256
"""Small files that are fetched together."""


class RemoteFiles:
    """Files by their names below ``url``. Every failure is a `CacheError` of one sentence, after some tries."""

    def __init__(self, url: str) -> None:
        if url.startswith("hf://"):
            raise CacheError(
                f"{url} makes a commit of every file, so a cache is not written to it directly: write it to a local "
                f"folder, and then `hf upload` that."
            )
        self.url = url.rstrip("/")
        self._folder = RemoteFolder(self.url, Spool(), is_spooled=False)

    def __str__(self) -> str:
        return self.url

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, by name, as they are now."""
        return {name: info["size"] for name, info in self._infos().items()}

    def states(self) -> dict[str, str]:
        """What tells of every file, by name, whether it was written again, as far as the store tells."""
        return {name: repr(sorted(info.items(), key=str)) for name, info in self._infos().items()}

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """The bytes of a file that is there; `CacheError` if it has more than ``max_bytes``."""
        return self._folder.read(name, max_bytes=max_bytes)

    def read_if_there(self, name: str, *, max_bytes: int) -> bytes | None:
        """The bytes of a small file, or None."""

        def fetch() -> bytes | None:
            file_system, path = self._folder.connect()
            try:
                return file_system.cat_file(f"{path}/{name}", start=0, end=max_bytes)
            except FileNotFoundError:
                return None

        return self._folder.tried(name, fetch)

    def read_many(self, sizes: dict[str, int]) -> dict[str, bytes]:
        """The bytes of several small files, whose sizes are known, by name."""
        names = [name for name, size in sizes.items() if size]
        found = {name: b"" for name, size in sizes.items() if not size}
        for start in range(0, len(names), FILES_AT_ONCE):
            found |= self._read_some({name: sizes[name] for name in names[start : start + FILES_AT_ONCE]})
        return found

    def put(self, name: str, data: bytes, *, check: Callable[[], None] | None = None) -> None:
        """Put a whole file there, in place of an older one; what arrived has the size of what was sent.

        ``check`` is called before each try, and its `CacheError` ends them.
        """

        def put() -> None:
            if check is not None:
                check()
            file_system, path = self._folder.connect()
            self._make_folder(file_system, f"{path}/{name}")
            file_system.pipe_file(f"{path}/{name}", data)
            if (arrived := file_system.size(f"{path}/{name}")) != len(data):
                raise OSError(f"{arrived} of {len(data)} bytes arrived")

        self._folder.tried(name, put, doing="written")

    def create(self, name: str, data: bytes) -> bool:
        """Put a file there unless there is one; whether this did.

        Stores that cannot do that in one step look first: of two who come at one moment, the later one prevails.
        """

        def create() -> bool:
            file_system, path = self._folder.connect()
            self._make_folder(file_system, f"{path}/{name}")
            try:
                file_system.pipe_file(f"{path}/{name}", data, mode="create")
            except FileExistsError:
                return False
            return True

        return self._folder.tried(name, create, doing="written")

    def remove(self, name: str, *, check: Callable[[], None] | None = None) -> None:
        """Take a file away; one that is gone already is fine. ``check`` as in `put`."""

        def remove() -> None:
            if check is not None:
                check()
            file_system, path = self._folder.connect()
            with suppress(FileNotFoundError):
                file_system.rm_file(f"{path}/{name}")

        self._folder.tried(name, remove, doing="deleted")

    def _infos(self) -> dict[str, dict[str, Any]]:
        def look() -> dict[str, dict[str, Any]]:
            file_system, path = self._folder.connect()
            file_system.invalidate_cache()
            # The folder itself may be among them, where no file is, or none was a moment ago.
            found = {name: info for name, info in file_system.find(path, detail=True).items() if info["type"] == "file"}
            if path in found:
                raise ValueError("it is a file, and a cache is a folder")
            return {name.removeprefix(f"{path}/"): info for name, info in found.items()}

        return self._folder.tried("what", look, doing="listed")

    def _read_some(self, sizes: dict[str, int]) -> dict[str, bytes]:
        def fetch() -> dict[str, bytes]:
            file_system, path = self._folder.connect()
            paths = [f"{path}/{name}" for name in sizes]
            found = file_system.cat_ranges(paths, [0] * len(paths), list(sizes.values()), on_error="return")
            if failed := [one for one in found if isinstance(one, BaseException)]:
                raise failed[0]
            return {name: bytes(data) for name, data in zip(sizes, found, strict=True)}

        return self._folder.tried(next(iter(sizes)), fetch)

    def _make_folder(self, file_system: Any, path: str) -> None:
        protocols = {file_system.protocol} if isinstance(file_system.protocol, str) else set(file_system.protocol)
        if not protocols & WITHOUT_FOLDERS:
            file_system.makedirs(path.rpartition("/")[0], exist_ok=True)

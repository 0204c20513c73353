"""A cache's folder behind a URL of fsspec, such as s3://bucket/cache: read through a spool."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from distilllens_cache import layout
from distilllens_cache.errors import CacheError
from distilllens_cache.files import check_recorded
from distilllens_cache.manifest import FileRecord
from distilllens_cache.spool import Spool

PAUSES = (0.5, 2.0, 8.0)
"""Seconds to wait before each further try where the network failed."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteFolder:
    """A folder behind a URL. Whatever the network or its library raises is a `CacheError` of one sentence.

    It holds no connection, so it may be sent to other processes; fsspec keeps one for each process and thread.
    """

    url: str
    spool: Spool
    is_spooled: bool = True
    """Whether files are taken from the spool, and kept there."""

    def __str__(self) -> str:
        return self.url

    def anew(self) -> "RemoteFolder":
        return replace(self, is_spooled=False)

    def exists(self, name: str) -> bool:
        def look() -> bool:
            file_system, path = self.connect()
            try:
                return file_system.info(f"{path}/{name}")["type"] == "file"
            except FileNotFoundError:
                return False

        return self.tried(name, look)

    def require(self) -> None:
        """An object store has no empty folders: what is not there shows when the manifest is read."""

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """The bytes of a file that no record describes, fetched anew."""
        if not layout.is_safe_name(name):
            raise CacheError(f"{name[:80]!r} is no name of a file in a cache.")
        data = self._fetch(name, max_bytes)
        if len(data) > max_bytes:
            raise CacheError(f"{name} in {self} has more than the {max_bytes} bytes that are expected at most.")
        return data

    def read_recorded(self, record: FileRecord, *, max_bytes: int) -> bytes:
        if record.size > max_bytes:
            raise CacheError(
                f"{record.name} in {self} is said to have {record.size} bytes; at most {max_bytes} are read. "
                f"This is no cache of ours."
            )
        if not self.is_spooled:
            return self._fetch_recorded(record)
        return self.spool.read(record, lambda: self._fetch_recorded(record))

    def tokenizer(self, records: Sequence[FileRecord]) -> Path:
        def read(record: FileRecord) -> bytes:
            return self.read_recorded(record, max_bytes=layout.MAX_FILE_BYTES)

        return self.spool.unpack(list(records), read, below=layout.TOKENIZER)

    def _fetch_recorded(self, record: FileRecord) -> bytes:
        """A damaged or half download is fetched once more: it may have been damaged on the way."""
        data = self._fetch(record.name, record.size)
        try:
            check_recorded(data, record, where=self)
        except CacheError:
            data = self._fetch(record.name, record.size)
            check_recorded(data, record, where=self)
        return data

    def _fetch(self, name: str, max_bytes: int) -> bytes:
        """At most one byte more than ``max_bytes``, which tells a file that is too large."""

        def fetch() -> bytes:
            file_system, path = self.connect()
            with file_system.open(f"{path}/{name}", "rb", cache_type="none") as file:
                return file.read(max_bytes + 1)

        return self.tried(name, fetch)

    def connect(self) -> tuple[Any, str]:
        """The file system of the URL, and the folder's path in it."""
        import fsspec

        file_system, path = fsspec.core.url_to_fs(self.url)
        return file_system, path.rstrip("/")

    def tried(self, name: str, action: Callable[[], Result], *, doing: str = "read") -> Result:
        """What ``action`` gives, after some tries where the network fails. ``doing`` is what the error says of it."""
        for pause in (*PAUSES, None):
            try:
                return action()
            except CacheError:
                raise
            except FileNotFoundError as error:
                if doing != "read":
                    raise self._explain(name, error, doing) from None
                raise CacheError(f"{name} is missing in {self}. Copy the cache there again.") from None
            except (PermissionError, ImportError, ValueError) as error:
                raise self._explain(name, error, doing) from None
            except Exception as error:  # each library behind fsspec raises its own
                if pause is None:
                    raise self._explain(name, error, doing) from None
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _explain(self, name: str, error: Exception, doing: str) -> CacheError:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200].rstrip(".")
        return CacheError(
            f"{name} in {self} could not be {doing}: {reason}. Check the address, the network and your credentials."
        )

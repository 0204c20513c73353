"""Who may write to a remote folder: one run at a time, told by an object in it that lives as long as it changes."""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from distilllens_cache import layout
from distilllens_cache.errors import CacheError
from distilllens_cache.remote_files import RemoteFiles

SECONDS_BETWEEN_BEATS = 20.0
SECONDS_OF_SILENCE = 120.0
"""A run on another host whose object has not changed for so long is taken for dead."""
SECONDS_BETWEEN_LOOKS = 2.0
SECONDS_TO_SETTLE = 2.0
"""Between taking the folder and using it. Who had it a moment ago may be in the middle of one change, and finds out
before the next."""
MAX_BYTES = 4 << 10


class TakenError(CacheError):
    """The folder is another run's."""


@dataclass(frozen=True)
class RemoteHolder:
    """What the object says."""

    host: str
    pid: int
    since: str
    token: str
    """Of this taking alone."""
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid or '?'} on {self.host}, at work since {self.since}"


class RemoteLock:
    """Keeps other runs out of a remote folder from `enter` to `leave`. A run that is gone is found out by its silence.

    The object is created exclusively where the store can do that. Two runs may still come to believe that they hold it:
    where the store cannot, or where both take over a dead one and the slower deletes that of the faster. `require_held`
    reads it again before every change, so one stops; the other begins only after a time in which that comes out.
    """

    def __init__(self, files: RemoteFiles) -> None:
        self._files = files
        self._me = RemoteHolder(
            socket.gethostname(),
            os.getpid(),
            datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            secrets.token_hex(16),
        )
        self._stop = threading.Event()
        self._beats: threading.Thread | None = None
        self._is_entered = False

    def enter(self, tell: Callable[[str], None] = lambda text: None) -> None:
        """Take the object. `CacheError` that names who holds it; ``tell`` is called before a wait."""
        first, seen = None, 0.0
        while not self._files.create(layout.REMOTE_LOCK, _to_bytes(self._me)):
            data = self._read()
            if data is None:
                continue  # gone meanwhile
            holder = _from_bytes(data)
            if holder.token == self._me.token:  # the answer to the first try was lost
                break
            now = time.monotonic()
            if first is None:
                first, seen = data, now
                if not _is_gone(holder):
                    tell(f"{self._files} is held by {holder}; waiting {SECONDS_OF_SILENCE:.0f} s for a sign of life")
            elif data != first:
                raise self._held(holder)
            if _is_gone(holder) or now - seen > SECONDS_OF_SILENCE:
                if self._read() == data:
                    self._files.remove(layout.REMOTE_LOCK)
                continue
            time.sleep(SECONDS_BETWEEN_LOOKS)
        self._is_entered = True
        time.sleep(SECONDS_TO_SETTLE)
        self.require_held()
        self._beats = threading.Thread(target=self._beat, daemon=True, name="remote lock")
        self._beats.start()

    def require_held(self) -> None:
        """`CacheError` if the object is no longer this run's, so that it must not go on."""
        data = self._read()
        if data is None:
            raise TakenError(
                f"{layout.REMOTE_LOCK} in {self._files} was deleted, so this run stops; what it finished is kept, and "
                f"the same command continues."
            )
        if (holder := _from_bytes(data)).token != self._me.token:
            raise self._held(holder)

    def leave(self) -> None:
        """Give the folder free. What cannot be deleted now is taken over after a time of silence."""
        self._stop.set()
        if self._beats is not None:
            self._beats.join()
        if self._is_entered:
            with suppress(CacheError):
                self.require_held()
                self._files.remove(layout.REMOTE_LOCK)
        self._is_entered = False

    def _beat(self) -> None:
        me = self._me
        while not self._stop.wait(SECONDS_BETWEEN_BEATS):
            with suppress(CacheError):  # a store that is away for a moment; others judge by the next beat
                data = self._read()
                if data is None or _from_bytes(data).token != me.token:
                    return
                me = replace(me, beat=me.beat + 1)
                self._files.put(layout.REMOTE_LOCK, _to_bytes(me))

    def _read(self) -> bytes | None:
        return self._files.read_if_there(layout.REMOTE_LOCK, max_bytes=MAX_BYTES)

    def _held(self, holder: RemoteHolder) -> TakenError:
        return TakenError(
            f"{self._files} is being written by another run: {holder}. Wait until it is done, stop it, or choose "
            f"another --output-dir. If you know that it is gone, delete {self._files}/{layout.REMOTE_LOCK}."
        )


def _is_gone(holder: RemoteHolder) -> bool:
    """Whether a run of this host surely ended: nobody has its number, or this process has."""
    if holder.host != socket.gethostname():
        return False
    if holder.pid == os.getpid():
        return True
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _to_bytes(holder: RemoteHolder) -> bytes:
    return f"{json.dumps(asdict(holder))}\n".encode()


def _from_bytes(data: bytes) -> RemoteHolder:
    """Who holds an object of these bytes; somebody unknown if they make no sense."""
    try:
        content = json.loads(data)
        return RemoteHolder(
            str(content["host"])[:255],
            max(0, int(content["pid"])),
            str(content["since"])[:64],
            str(content["token"])[:64],
            int(content["beat"]),
        )
    except (ValueError, KeyError, TypeError):
        return RemoteHolder("an unknown host", 0, "an unknown time", "")

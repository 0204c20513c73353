"""A teacher cache that goes to a URL: one rank puts up what all write to a staging folder, while they go on."""

import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distilllens.config import CacheTeacherConfig
from distilllens.console import counted, say
from distilllens.generated_rows import responses_file
from distilllens.launch import local_world_size
from distilllens.ranks import Ranks
from distilllens.run_config import RESOLVED
from distilllens_cache import CacheError
from distilllens_cache.download import Download
from distilllens_cache.lock import lock_of, seats
from distilllens_cache.remote_cache import RemoteCache
from distilllens_cache.remote_files import RemoteFiles
from distilllens_cache.remote_lock import RemoteLock, TakenError
from distilllens_cache.upload import Upload
from distilllens_inspect.card import CARD

RESPONSES = "generated.jsonl"
"""What the teacher wrote with ``--generate``, which lies beside a local cache and within a remote one."""
SECONDS_BETWEEN_PUSHES = 5.0
SECONDS_BETWEEN_LOOKS = 2.0
SECONDS_TO_BRING = 7200.0
"""Longest wait of the other ranks for the main one, which may have most of a large cache to fetch."""
SECONDS_TO_LEAVE = 60.0
"""Longest wait for the other ranks before the staging folder is deleted."""


class RemoteOutput:
    """What goes to the URL of a run, from the view of one of its ranks. The main one fetches and puts up."""

    def __init__(self, config: CacheTeacherConfig, ranks: Ranks, lock: RemoteLock, download: Download) -> None:
        self._config = config
        self._ranks = ranks
        self._lock = lock
        self._download = download
        self._upload: Upload | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._taken: TakenError | None = None

    def is_finished(self, **contents: Any) -> bool:
        """Whether there is nothing to do; else the staging folder has afterwards what the remote one has."""
        if not self._ranks.is_main:
            return self._is_finished_meanwhile(contents)
        if self._config.overwrite:
            return False
        if self._download.is_finished(**contents):
            self._clear_staging()
            return True
        self._download.bring()
        return False

    def _is_finished_meanwhile(self, contents: dict[str, Any]) -> bool:
        """Wait until the main rank is at work in the staging folder, or finds nothing to do."""
        lock, until = lock_of(self._config.folder, self._ranks.seat), time.monotonic() + SECONDS_TO_BRING
        while not lock.is_alive(0):
            remote = RemoteCache(self._download.remote.files)
            if not self._config.overwrite and Download(remote, self._download.staging).is_finished(**contents):
                return True
            if time.monotonic() > until:
                raise CacheError(
                    f"rank 0 did not begin to write in {self._config.folder}: see that all ranks run on one host, with "
                    f"the same --staging-dir, and run the same command again."
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return False

    def begin(self) -> None:
        """Make the remote folder follow the staging folder, from now on until `end`."""
        if self._ranks.is_main:
            self._upload = Upload(
                self._download.remote,
                self._lock,
                self._config.folder,
                beside=_beside(self._config),
                anew=self._config.overwrite,
            )
            self._upload.push()
            self._thread = threading.Thread(target=self._follow, args=(self._upload,), daemon=True, name="upload")
            self._thread.start()

    def check(self) -> None:
        """`CacheError` if another run took the remote folder over."""
        if self._taken is not None:
            raise self._taken

    def end(self) -> None:
        """Put up the rest, and the manifest last; then the staging folder goes, unless the user named it."""
        self.stop()
        self.check()
        assert self._upload is not None
        self._upload.push_all()
        say(f"{counted(len(self._upload.written), 'file')} went up to {self._config.output_dir}")
        self._clear_staging()

    def stop(self) -> None:
        """Put nothing more up."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _follow(self, upload: Upload) -> None:
        is_told = False
        while not self._stop.wait(SECONDS_BETWEEN_PUSHES):
            try:
                upload.push()
                is_told = False
            except TakenError as error:
                self._taken = error
                return
            except CacheError as error:
                if not is_told:
                    say(f"Nothing goes up at the moment, and the teacher goes on: {error}")
                is_told = True

    def _clear_staging(self) -> None:
        folder = self._config.folder
        if self._config.staging_dir is not None:
            return
        until = time.monotonic() + SECONDS_TO_LEAVE
        while seats(folder) and time.monotonic() < until:
            time.sleep(0.1)
        if seats(folder):
            say(f"The staging folder {folder} is still in use, and stays")
            return
        shutil.rmtree(folder, ignore_errors=True)
        if self._upload is not None or RESPONSES in self._download.remote.names:
            responses_file(folder).unlink(missing_ok=True)


@contextmanager
def remote_output(
    config: CacheTeacherConfig, ranks: Ranks, scratch: Path, damaged: Sequence[str] = ()
) -> Iterator[tuple[CacheTeacherConfig, RemoteOutput | None]]:
    """The URL that the cache of ``config`` goes to, held for this run, and the config by which to open its plan.

    The main rank fetches into the staging folder, which the run may clear at any time. The other ranks, and dry runs,
    have a staging folder of their own below ``scratch`` for what a plan needs of the cache that is there.

    No output where the cache goes to a local folder, or nowhere. CacheError, before a teacher is loaded, where the URL
    cannot be written, holds another thing or is held by another run. ``damaged`` are files there that are known to be.
    """
    if isinstance(config.output_dir, Path):
        yield config, None
        return
    if local_world_size() != ranks.world_size:
        raise ValueError(
            "an --output-dir that is a URL takes the ranks of one host, which share a staging folder: give a folder "
            "that all hosts share, or run on one host"
        )
    files = RemoteFiles(config.output_dir)
    lock = RemoteLock(files)
    is_apart = config.dry_run or not ranks.is_main
    seen = config.model_copy(update={"staging_dir": scratch / "staging"}) if is_apart else config
    try:
        if not is_apart:
            lock.enter(say)
        download = Download(RemoteCache(files, damaged=damaged), seen.folder)
        if not config.overwrite:
            download.bring_plan(append=config.append is not None)
            here, there = responses_file(config.folder), responses_file(seen.folder)
            if config.generate and RESPONSES in download.remote.names:  # all of them; one here may be of another cache
                there.unlink(missing_ok=True)
            elif is_apart and here.exists():  # they go up once the pass begins
                shutil.copyfile(here, there)
            download.bring_beside(_beside(seen))
        output = RemoteOutput(config, ranks, lock, download)
        try:
            yield seen, None if config.dry_run else output
        finally:
            output.stop()
    finally:
        lock.leave()


def _beside(config: CacheTeacherConfig) -> dict[str, Path]:
    """Files that go up with the cache and are no part of it, by their names there."""
    places = {name: config.folder / name for name in (CARD, RESOLVED)}
    return places | ({RESPONSES: responses_file(config.folder)} if config.generate else {})

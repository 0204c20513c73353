"""A teacher cache that goes to a URL: one rank puts up what all write to a staging folder, while they go on."""

import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distilllens.config import CacheTeacherConfig
from distilllens.console import counted, say
from distilllens.ranks import Ranks
from distilllens_cache import CacheError
from distilllens_cache.lock import lock_of, seats
from distilllens_cache.remote_lock import TakenError
from distilllens_cache.upload import Upload
from distilllens_inspect.card import CARD

RESOLVED = "config.resolved.yaml"
"""The run's settings, beside the cache."""
SECONDS_BETWEEN_PUSHES = 5.0
SECONDS_BETWEEN_LOOKS = 2.0
SECONDS_TO_BRING = 7200.0
"""Longest wait of the other ranks for the main one, which may have most of a large cache to fetch."""
SECONDS_TO_LEAVE = 60.0
"""Longest wait for the other ranks before the staging folder is deleted."""


class RemoteOutput:
    """What goes to the URL of a run, from the view of one of its ranks. The main one fetches and puts up."""

    def __init__(self, config: CacheTeacherConfig, ranks: Ranks, upload: Upload) -> None:
        self._config = config
        self._ranks = ranks
        self._upload = upload
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._taken: TakenError | None = None

    def is_finished(self, **contents: Any) -> bool:
        """Whether there is nothing to do; else the staging folder has afterwards what the remote one has."""
        if self._ranks.is_main:
            if self._config.overwrite:
                return False
            if self._upload.is_finished(**contents):
                self._clear_staging()
                return True
            self._upload.bring()
            return False
        lock, until = lock_of(self._config.folder, self._ranks.seat), time.monotonic() + SECONDS_TO_BRING
        while not lock.is_alive(0):
            if not self._config.overwrite:
                self._upload.look()
                if self._upload.is_finished(**contents):
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
            self._upload.push(anew=self._config.overwrite)
            self._thread = threading.Thread(target=self._follow, daemon=True, name="upload")
            self._thread.start()

    def check(self) -> None:
        """`CacheError` if another run took the remote folder over."""
        if self._taken is not None:
            raise self._taken

    def end(self) -> None:
        """Put up the rest, and the manifest last; then the staging folder goes, unless the user named it."""
        self.stop()
        self.check()
        self._upload.push_all()
        say(f"{counted(len(self._upload.written), 'file')} went up to {self._config.output_dir}")
        self._clear_staging()

    def stop(self) -> None:
        """Put nothing more up."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _follow(self) -> None:
        is_told = False
        while not self._stop.wait(SECONDS_BETWEEN_PUSHES):
            try:
                self._upload.push()
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
        if self._config.staging_dir is not None or not folder.exists():
            return
        until = time.monotonic() + SECONDS_TO_LEAVE
        while seats(folder) and time.monotonic() < until:
            time.sleep(0.1)
        if seats(folder):
            say(f"The staging folder {folder} is still in use, and stays")
        else:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def remote_output(
    config: CacheTeacherConfig, ranks: Ranks, damaged: Sequence[str] = ()
) -> Iterator[RemoteOutput | None]:
    """The URL that the cache of ``config`` goes to, held for this run; None where it goes to a local folder.

    CacheError, before a teacher is loaded, where the URL cannot be written, holds another thing or is held by another
    run. ``damaged`` are files there that are known to be.
    """
    if isinstance(config.output_dir, Path) or config.dry_run:
        yield None
        return
    _require_one_host(ranks)
    upload = Upload(config.output_dir, config.folder, beside=(CARD, RESOLVED), damaged=damaged)
    output = RemoteOutput(config, ranks, upload)
    try:
        if ranks.is_main:
            upload.lock.enter(say)
        upload.look()
        if not config.overwrite:
            upload.bring_plan(is_main=ranks.is_main)
        yield output
    finally:
        output.stop()
        upload.lock.leave()


def _require_one_host(ranks: Ranks) -> None:
    hosts = os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES", "1"))
    here = os.environ.get("LOCAL_WORLD_SIZE", str(ranks.world_size))
    if ranks.world_size > 1 and (hosts != "1" or here != str(ranks.world_size)):
        raise ValueError(
            "an --output-dir that is a URL takes the ranks of one host, which share a staging folder: give a folder "
            "that all hosts share, or run on one host"
        )

"""A text file is the old one or the new one, whatever happens while it is written."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from distilllens.config import DemoConfig, load_config, save_config
from distilllens.text_file import write_text


def in_a_child(work: Callable[[], None]) -> int:
    """How a forked process ends that calls ``work``: its exit status, or minus the signal."""
    child = os.fork()
    if not child:
        try:
            work()
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    for text in ("old", "naïve\n"):
        write_text(tmp_path / "file", text)
        assert (tmp_path / "file").read_bytes() == text.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_old_config_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "config.resolved.yaml"
    save_config(DemoConfig(max_steps=1), file)

    def write() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))
        save_config(DemoConfig(max_steps=2), file)

    assert in_a_child(write) == 1
    assert load_config(DemoConfig, file=file, flags={}).max_steps == 1
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_kill_leaves_the_old_config(tmp_path: Path, call: str) -> None:
    file = tmp_path / "config.resolved.yaml"
    save_config(DemoConfig(max_steps=1), file)

    def write() -> None:
        setattr(os, call, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        save_config(DemoConfig(max_steps=2), file)

    assert in_a_child(write) == -signal.SIGKILL
    assert load_config(DemoConfig, file=file, flags={}).max_steps == 1

"""Keeps what libraries say while they load or save something out of our output."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator

import torch
from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No notes of transformers, progress bars only on a terminal, nothing on stdout. Errors still raise."""
    if not torch.cuda.is_available():
        # transformers imports DeepSpeed when it saves, which then warns that there is no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    shown = sys.stderr
    try:
        # DeepSpeed, which save_pretrained imports, logs to the stdout of that moment ever after.
        with (
            contextlib.redirect_stdout(shown),
            contextlib.redirect_stderr(shown if shown.isatty() else io.StringIO()),
        ):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)

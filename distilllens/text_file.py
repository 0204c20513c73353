"""Text files that appear whole or not at all."""

import os
from pathlib import Path


def write_text(file: Path, text: str) -> None:
    """Put ``text`` at ``file``, in UTF-8.

    A process killed at any moment leaves what was there, or ``text``; at worst a file `NAME.tmp-NUMBER` beside it.
    """
    temporary = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

"""Where a run's caches are read from, and where its outputs may go, as parts of its config."""

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

if TYPE_CHECKING:
    from distilllens_cache import CacheFolder

Location = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
"""A folder of this machine, or a URL of fsspec."""


def _one_or_more(value: Any) -> Any:
    """A file may name one, or list several."""
    return (value,) if isinstance(value, str | Path) else () if value is None else value


Locations = Annotated[tuple[Location, ...], BeforeValidator(_one_or_more)]
"""Some of them."""


# A path has lost one of the slashes of a URL; a drive of Windows has one letter.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:/")


def _local(value: Any) -> Any:
    if _ADDRESS.match(str(value)):
        raise ValueError(f"{value} is a remote address, and outputs are written to a local folder: copy it there after")
    return value


LocalOutput = Annotated[Path, BeforeValidator(_local)]
"""A folder of this machine that a run writes to."""


def _local_or_remote(value: Any) -> Any:
    text = str(value)
    if "://" not in text and _ADDRESS.match(text):
        raise ValueError(f"{text} has lost a slash of its address: give a text such as s3://bucket/cache")
    return text if "://" in text else Path(value)


Output = Annotated[str | Path, BeforeValidator(_local_or_remote)]
"""A folder of this machine that a run writes to, or a URL that it writes to through such a folder."""


def staging_folder(url: str) -> Path:
    """The folder of this machine, in the user's cache directory, in which what goes to ``url`` is made."""
    from distilllens_cache.spool import default_folder  # not needed for --help

    name = re.sub(r"[^A-Za-z0-9]+", "-", url.partition("://")[2]).strip("-")[-60:]
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:12]
    return default_folder().parent / "staging" / f"{name}-{digest}"


class SpoolConfig(BaseModel):
    """How remote caches are kept on this machine while they are read."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    spool_dir: Path | None = None
    """Folder for local copies of a remote cache's files; one in the user's cache directory when not given."""
    spool_bytes: Annotated[int, Field(ge=1)] | None = None
    """Most bytes of such copies, 64 GiB when not given; those used longest ago are dropped first."""

    def cache_folder(self, location: str) -> "CacheFolder":
        """The folder of the cache at ``location``."""
        from distilllens_cache import open_folder  # not needed for --help
        from distilllens_cache.spool import choose_spool

        return open_folder(location, spool=choose_spool(self.spool_dir, self.spool_bytes))

"""Where a run's caches are read from, and where its outputs may go, as parts of its config."""

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


def _local(value: Any) -> Any:
    # A path has lost one of the slashes of a URL; a drive of Windows has one letter.
    if re.match(r"[A-Za-z][A-Za-z0-9+.\-]+:/", str(value)):
        raise ValueError(f"{value} is a remote address, and outputs are written to a local folder: copy it there after")
    return value


LocalOutput = Annotated[Path, BeforeValidator(_local)]
"""A folder of this machine that a run writes to."""


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

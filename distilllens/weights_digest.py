"""The digest of a model's weights: which bytes a teacher was made of."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from distilllens.model_source import local_path, source_kind


def weights_digest(source: str | Path, revision: str | None = None) -> str:
    """sha256 (hex) over every byte of the weight files of ``source``, with their names and nothing else.

    The folder's own name doesn't count, so a moved copy and a hub download agree. An adapter counts with its
    settings and with the digest of its base. Weights saved again in other shards or another dtype are other
    bytes, so they have another digest. Reads every file once: about a second per gigabyte.

    Raises ValueError where there are no weights.
    """
    path = local_path(source, revision=revision)
    lines = sorted(_parts(path))
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def _parts(path: Path) -> Iterator[str]:
    kind = source_kind(path)
    if kind == "gguf":
        yield f"gguf {_file_digest(path)}"
        return
    patterns = ("adapter_model*.safetensors", "adapter_model*.bin")
    if kind == "folder":
        patterns = (
            "*.safetensors",
            "pytorch_model*.bin",
        )  # not *.bin: checkpoints keep training_args.bin there
    files = next((found for pattern in patterns if (found := sorted(path.glob(pattern)))), [])
    if not files:
        raise ValueError(f"{path} has no weights: expected {' or '.join(patterns)}")
    for file in files:
        yield f"file {file.name} {_file_digest(file)}"
    if kind == "adapter":
        settings = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        base, base_revision = settings.pop("base_model_name_or_path"), settings.pop("revision", None)
        canonical = json.dumps(settings, sort_keys=True).encode()  # rank and alpha scale the weights
        yield f"settings {hashlib.sha256(canonical).hexdigest()}"
        yield f"base {weights_digest(base, base_revision)}"


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""Seals made to fit: what somebody can forge who knows the format, which needs no secret."""

import hashlib
import json
from typing import Any

from distilllens_cache import layout
from distilllens_cache.sealed_json import seal

Files = dict[str, bytes]


def sealed(body: bytes) -> bytes:
    """Any bytes with a correct digest behind them."""
    return body + b',\n"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def unsealed(data: bytes) -> dict[str, Any]:
    """The object in a sealed file, without its digest."""
    content = json.loads(data)
    del content["sha256"]
    return content


def resealed(files: Files, changes: Files) -> Files:
    """``changes``, and every record of ``files`` that has to follow so that all digests fit again."""
    changed = dict(changes)

    def edit(name: str, **links: str | None) -> None:
        if name not in changes:
            content = unsealed(files[name])
            _follow(content, changed)
            for key, value in links.items():
                if key in content:
                    content[key] = value
            data = seal(content)
            if data != files[name]:
                changed[name] = data

    def digest(*names: str) -> str:
        return hashlib.sha256(b"".join(changed.get(name, files[name]) for name in names)).hexdigest()

    edit(layout.PLAN)
    plan = digest(layout.PLAN)
    records = sorted(name for name in files if name.endswith(".json") and "/" in name and name[:9] != "tokenizer")
    commits = [name for name in records if name.startswith(f"{layout.SKETCHES}/")]
    for name in commits:
        edit(name, plan_sha256=plan)
    for name in records:
        if name.startswith(f"{layout.SHARDS}/"):
            edit(name, plan_sha256=plan, sketches_sha256=digest(*commits))
    edit(layout.MANIFEST, plan_sha256=plan)
    return changed


def _follow(value: Any, changed: Files) -> None:
    """Give every file record the size and digest of its changed file."""
    if isinstance(value, dict):
        if (data := changed.get(value.get("name", ""))) is not None and "size" in value:
            value |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            _follow(part, changed)

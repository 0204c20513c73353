"""Sealed JSON: an object that carries the digest of its own bytes."""

import hashlib
import json
import math
import re
from typing import Any

from distilllens_cache.errors import REPAIR, CacheError

_TRAILER = re.compile(rb',\n"sha256":"([0-9a-f]{64})"\}\n')
_TRAILER_BYTES = 79


def seal(content: dict[str, Any]) -> bytes:
    """``content`` as sealed JSON: keys sorted, a line for each, at the end the digest of all bytes before."""
    assert "sha256" not in content
    lines = []
    for key in sorted(content):
        value = json.dumps(content[key], sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        lines.append(f"{json.dumps(key, ensure_ascii=False)}:{value}")
    try:
        body = ("{\n" + ",\n".join(lines)).encode()
    except UnicodeEncodeError as error:
        raise CacheError(f"this text cannot be written as UTF-8: {error.object[:80]!r}") from None
    return body + b',\n"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def unseal(data: bytes, *, name: str) -> bytes:
    """The JSON object inside ``data``, without its digest, as UTF-8 bytes safe to parse.

    The digest is compared before anything is parsed. Refused are also duplicate keys, NaN and infinities,
    numbers of absurd length and nesting too deep for a parser. ``name`` is the file named in the error.
    """
    trailer = _TRAILER.fullmatch(data[-_TRAILER_BYTES:])
    if trailer is None:
        raise CacheError(f"{name} does not end with its digest: it is cut off, damaged or no file of a cache. {REPAIR}")
    body = data[:-_TRAILER_BYTES]
    found = hashlib.sha256(body).hexdigest()
    if found != trailer[1].decode():
        raise CacheError(
            f"{name} is damaged: its bytes have the sha256 {found[:12]}…, its own record says "
            f"{trailer[1].decode()[:12]}…. {REPAIR}"
        )
    content = body + b"}"
    try:
        parsed = json.loads(content.decode(), object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise CacheError(f"{name} is nested too deeply to be a file of a cache.") from None
    except ValueError as error:
        raise CacheError(f"{name} is no proper JSON: {error}.") from None
    if not isinstance(parsed, dict) or "sha256" in parsed:
        raise CacheError(f"{name} is no sealed JSON object.")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value

"""Token ids as text: the exact piece of each token, and forms of it that are safe to show."""

import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from distilllens_cache import CacheError

SPACE = "·"
"""Stands for a space inside a token. A token that really holds this character shows it as \\u00b7."""

_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\", " ": SPACE, SPACE: "\\u00b7"}
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "▁"
_BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _byte_of_character() -> dict[str, int]:
    """The table of byte-level BPE (GPT-2): which byte a character of a piece stands for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


class TokenText:
    """Gives each token id its own text, with the spaces and broken characters that decoding a row would hide.

    Decoding one id with the tokenizer loses a leading space (SentencePiece) or gives U+FFFD for a part of a
    character (byte-level BPE), so pieces are read from the vocabulary and undone here.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        description = json.loads(tokenizer.to_str())
        steps = json.dumps([description.get("decoder"), description.get("pre_tokenizer")], ensure_ascii=False)
        model = description.get("model") or {}
        self._tokenizer = tokenizer
        self._is_byte_level = '"ByteLevel"' in steps
        self._is_metaspace = _METASPACE in steps or _METASPACE in json.dumps(
            description.get("normalizer"), ensure_ascii=False
        )
        self._has_byte_pieces = '"ByteFallback"' in steps or bool(model.get("byte_fallback"))
        self._added = {token["id"]: token["content"] for token in description.get("added_tokens", [])}
        self._byte_of = _byte_of_character()

    @classmethod
    def of_folder(cls, folder: Path) -> "TokenText":
        """The tokenizer kept inside a cache. CacheError when the folder has none that can be read."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise CacheError(
                f"{folder} has no tokenizer.json, so the token ids of this cache cannot be shown as text. "
                f"Write the cache again with a teacher whose tokenizer is of the fast kind."
            )
        try:
            return cls(Tokenizer.from_file(str(file)))
        except Exception as error:  # the library raises bare Exception for a file it cannot read
            raise CacheError(f"{file} cannot be read by the tokenizers library: {error}") from error

    def raw(self, token_id: int) -> bytes | None:
        """The bytes that a token adds to a text, or None where the tokenizer does not know the id."""
        if token_id in self._added:
            return self._added[token_id].encode("utf-8", "surrogatepass")
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return None
        if self._is_byte_level and all(character in self._byte_of for character in piece):
            return bytes(self._byte_of[character] for character in piece)
        if self._has_byte_pieces and (found := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(found[1], 16)])
        if self._is_metaspace:
            piece = piece.replace(_METASPACE, " ")
        return piece.encode("utf-8", "surrogatepass")

    def plain(self, token_id: int) -> str:
        """The text of one token as it is; bytes that are no whole character as \\xNN."""
        raw = self.raw(token_id)
        return f"[id {token_id}]" if raw is None else raw.decode("utf-8", "backslashreplace")

    def shown(self, token_id: int) -> str:
        """One token on one line: spaces visible, line breaks and everything that has no picture escaped."""
        raw = self.raw(token_id)
        if raw is None:
            return f"[id {token_id}]"
        return escape_token(raw)

    def join(self, token_ids: Iterable[int]) -> str:
        """The running text of neighbouring tokens, line breaks kept, without control characters."""
        parts = ((token_id, self.raw(token_id)) for token_id in token_ids)
        return escape_text(b"".join(f"[id {n}]".encode() if raw is None else raw for n, raw in parts))


def escape_token(raw: bytes) -> str:
    """A token's bytes as visible characters on one line. Empty tokens are shown as \"\"."""
    text = "".join(_visible(character) if is_whole else _byte(character) for character, is_whole in _characters(raw))
    if text and unicodedata.combining(text[0]):
        text = "◌" + text  # an accent of its own would otherwise sit on whatever stands before it
    return text or '""'


def escape_text(raw: bytes) -> str:
    """Bytes as running text: spaces, tabs and line breaks stay, other control characters are escaped."""
    return "".join(
        _safe(character, keep="\n\t") if is_whole else _byte(character) for character, is_whole in _characters(raw)
    )


def one_line(text: str) -> str:
    """A name from a cache as it may go to a terminal: nothing in it can move the cursor or turn the text."""
    return "".join(_safe(character) for character in text)


def _characters(raw: bytes) -> Iterable[tuple[str, bool]]:
    """Each character with True, or each byte that belongs to no whole character (as chr) with False."""
    for character in raw.decode("utf-8", "surrogateescape"):
        code = ord(character)
        if 0xDC80 <= code <= 0xDCFF:
            yield chr(code - 0xDC00), False
        else:
            yield character, True


def _visible(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    is_new = unicodedata.category(character) == "Cn"  # perhaps an emoji younger than this Python
    return character if is_new or character.isprintable() else _code(character)


def _safe(character: str, keep: str = "") -> str:
    is_control = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _BIDI_CONTROLS
    return _code(character) if is_control and character not in keep else character


def _byte(character: str) -> str:
    return f"\\x{ord(character):02x}"


def _code(character: str) -> str:
    code = ord(character)
    if code < 0x80:
        return _byte(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

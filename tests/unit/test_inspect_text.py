"""Tokens as text: exact pieces, and forms of them that are safe to show."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from distilllens_cache import CacheError
from distilllens_inspect.text import TokenText, escape_text, escape_token, one_line


def byte_level() -> Tokenizer:
    """One token per byte, written in the alphabet of GPT-2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end of text|>", special=True)])
    return tokenizer


BYTE_LEVEL = byte_level()
BYTE_LEVEL_TEXT = TokenText(BYTE_LEVEL)


def sentence_piece() -> Tokenizer:
    """A few pieces with ▁ for a space, and byte pieces for the rest, as in Llama."""
    pieces = ["<unk>", "▁the", "▁", "t", "h", "e", "cat", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(
        models.BPE({piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@settings(deadline=None)  # other work on the machine must not fail a law
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_the_pieces_of_byte_level_tokens_are_the_bytes_of_the_text(text: str) -> None:
    pieces = [BYTE_LEVEL_TEXT.raw(token_id) for token_id in ids_of(BYTE_LEVEL, text)]
    assert b"".join(piece or b"?" for piece in pieces) == text.encode()


def test_a_leading_space_is_kept_though_decoding_one_token_loses_it() -> None:
    text = TokenText(sentence_piece())
    assert text.shown(1) == "·the"
    assert text.plain(1) == " the"
    assert text.join([1, 6]) == " thecat"


def test_a_part_of_a_character_is_shown_as_its_byte_and_joined_with_its_neighbours() -> None:
    for tokenizer in (byte_level(), sentence_piece()):
        text, ids = TokenText(tokenizer), ids_of(tokenizer, "é")
        assert [text.shown(token_id) for token_id in ids] == ["\\xc3", "\\xa9"]
        assert [text.plain(token_id) for token_id in ids] == ["\\xc3", "\\xa9"]
        assert text.join(ids) == "é"


def test_an_added_token_is_its_own_text_and_not_bytes() -> None:
    text = TokenText(byte_level())
    assert text.shown(256) == "<|end·of·text|>"
    assert text.join([256]) == "<|end of text|>"


def test_an_id_beyond_the_tokenizer_is_shown_by_its_number() -> None:
    text = TokenText(byte_level())
    assert text.shown(9999) == text.plain(9999) == text.join([9999]) == "[id 9999]"


@settings(deadline=None)
@given(st.binary(max_size=12) | st.text(max_size=12).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_a_shown_token_is_one_line_without_blanks_or_control_characters(raw: bytes) -> None:
    shown = escape_token(raw)
    assert shown
    assert all(c.isprintable() or unicodedata.category(c) == "Cn" for c in shown)
    assert " " not in shown


TRICKY = st.text("\\nx ·\u0085", min_size=1).map(str.encode)


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=4) | TRICKY, unique=True))
@example([b"\x85", "\u0085".encode(), b"\\x85", b" ", "·".encode()])
def test_different_tokens_are_shown_differently(tokens: list[bytes]) -> None:
    shown = [escape_token(token) for token in tokens]
    shown = [text for text in shown if not text.startswith("◌")]  # set before a leading accent
    assert len(set(shown)) == len(shown)


def test_line_breaks_tabs_and_spaces_have_their_usual_signs() -> None:
    assert escape_token(b"\n\t\r \\n") == "\\n\\t\\r·\\\\n"


def test_a_lone_accent_stands_on_a_dotted_circle() -> None:
    assert escape_token("\u0301".encode()) == "◌\u0301"


def test_running_text_keeps_line_breaks_but_cannot_turn_or_clear_what_stands_around_it() -> None:
    assert escape_text("a\n\tb \u202ec\x1b[2Jd\x00".encode()) == "a\n\tb \\u202ec\\x1b[2Jd\\x00"
    assert one_line("row\n1\x1b[2J") == "row\\x0a1\\x1b[2J"


def test_a_cache_without_a_tokenizer_file_is_refused_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"has no tokenizer\.json"):
        TokenText.of_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CacheError, match="cannot be read by the tokenizers library"):
        TokenText.of_folder(tmp_path)

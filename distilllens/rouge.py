"""ROUGE-L as distilllens reports it: rouge-score's F-measure, for text of any language.

rouge-score's own tokenizer drops every character but a-z and 0-9, so that a Chinese answer scores 0
whatever it says. The tokenizer here keeps the words of all scripts and equals that one on ASCII text.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

ROUGE_SETTINGS: dict[str, str | bool | int] = {
    "metric": "rougeL",
    "measure": "F",
    "scale": 100,
    "stemmer": "porter",
    "references": "max",
    "tokenizer": "unicode-words-1",
}
"""What a score depends on besides the texts; written into every result."""

SHORTEST_STEMMED = 4
"""Letters a word needs to be stemmed: rouge-score leaves those of up to 3 alone."""

_UNSPACED_BLOCKS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x2FDF),  # CJK and Kangxi radicals
    (0x3005, 0x3007),  # iteration mark, closing mark, zero
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3100, 0x312F),  # Bopomofo
    (0x31A0, 0x31BF),  # Bopomofo, extended
    (0x31F0, 0x31FF),  # Katakana, extended
    (0x3400, 0x4DBF),  # CJK, extension A
    (0x4E00, 0x9FFF),  # CJK
    (0xF900, 0xFAFF),  # CJK, compatibility
    (0x20000, 0x323AF),  # CJK, extensions B to H
)
"""Scripts written without spaces between words: each character, with its marks, is a token."""

_ASCII_WORD = re.compile(r"[a-z0-9]+")


class UnicodeWords(Tokenizer):
    """Splits text into lower-case words, English ones stemmed, and unspaced scripts into characters.

    On ASCII text it gives exactly what ``RougeScorer(use_stemmer=True)`` uses. RougeScorer ignores
    ``use_stemmer`` when it is handed a tokenizer, so the stemming is done here. Only words of a-z and 0-9 are
    stemmed: Porter's rules are for English.
    """

    def __init__(self) -> None:
        # Stemming dominates and text repeats its words.
        self._stem = lru_cache(maxsize=65536)(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        """The tokens of ``text``, in order."""
        if text.isascii():
            words = _ASCII_WORD.findall(text.lower())
        else:
            words = _words(unicodedata.normalize("NFKC", text).lower())
        return [token for word in words if (token := self._stemmed(word))]

    def _stemmed(self, word: str) -> str:
        return self._stem(word) if len(word) >= SHORTEST_STEMMED and word.isascii() else word


def _words(text: str) -> list[str]:
    """Runs of letters, marks and digits, cut before and after each character of an unspaced script."""
    words: list[str] = []
    word = ""
    for character in text:
        category = unicodedata.category(character)
        if category == "Cf":  # soft hyphens and joiners are inside words
            continue
        kind = category[0]
        if kind == "M" and word:  # an accent or vowel sign belongs to the letter before it
            word += character
            continue
        unspaced = _is_unspaced(character)
        if word and (unspaced or kind not in "LN" or _is_unspaced(word[0])):
            words.append(word)
            word = ""
        if kind in "LN":
            word += character
    return [*words, word] if word else words


def _is_unspaced(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _UNSPACED_BLOCKS)


class RougeL:
    """Scores one prediction against its references."""

    def __init__(self) -> None:
        self._scorer = RougeScorer(["rougeL"], tokenizer=UnicodeWords())

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """ROUGE-L F-measure x 100 against the best-matching of ``references``; 0 for an empty prediction."""
        assert references, "a row without references was let through"
        return 100.0 * self._scorer.score_multi(list(references), prediction)["rougeL"].fmeasure

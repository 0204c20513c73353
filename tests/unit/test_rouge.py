"""ROUGE-L scores: numbers that can be worked out by hand."""

import pytest

from distilllens.rouge import ROUGE_SETTINGS, RougeL, UnicodeWords


@pytest.fixture(scope="module")
def rouge() -> RougeL:
    return RougeL()


def test_a_longest_common_subsequence_of_three_of_four_and_five_words_scores_its_f_measure(rouge: RougeL):
    # LCS "the cat mat": precision 3/4, recall 3/5, F = 2 * .75 * .6 / 1.35.
    assert rouge.score("the cat mat here", ["the cat on a mat"]) == pytest.approx(100 * 2 * 0.75 * 0.6 / 1.35)


def test_an_equal_answer_scores_100_and_an_empty_or_disjoint_one_0(rouge: RougeL):
    assert rouge.score("Paris is the capital.", ["paris IS the capital"]) == 100.0
    assert rouge.score("", ["Paris"]) == 0.0
    assert rouge.score(" ...\n", ["Paris"]) == 0.0
    assert rouge.score("London", ["Paris"]) == 0.0
    assert rouge.score("Paris", ["..."]) == 0.0


def test_the_best_of_several_references_counts_wherever_it_stands(rouge: RougeL):
    references = ["something else", "the cat sat", "the dog"]
    assert rouge.score("the cat sat", references) == 100.0
    assert rouge.score("the cat sat", references[::-1]) == 100.0


def test_words_are_compared_by_their_stem(rouge: RougeL):
    assert rouge.score("cats running", ["cat runs"]) == 100.0


def test_a_chinese_answer_is_scored_by_its_characters(rouge: RougeL):
    # "今天天气很好" and "今天天气不好": 5 of 6 characters in order.
    assert rouge.score("今天天气很好", ["今天天气不好。"]) == pytest.approx(100 * 5 / 6)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("你好 World_running", ["你", "好", "world", "run"]),
        ("naïve café", ["naïve", "café"]),
        ("cafe\u0301", ["café"]),  # one way of writing it
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),  # vowel signs do not cut a word
        ("ดี", ["ดี"]),
        ("เดือน", ["เ", "ดื", "อ", "น"]),
        ("안녕하세요 세계", ["안녕하세요", "세계"]),
        ("Да, МОСКВА!", ["да", "москва"]),
        ("Shakespeare’s plays", ["shakespear", "s", "play"]),  # as with an ASCII apostrophe
        ("１２ ｃａｔｓ", ["12", "cat"]),  # full-width forms
        ("co\u00adoperate", ["cooper"]),  # a soft hyphen is not a space
        ("🙂 — …", []),
        ("", []),
    ],
)
def test_words_of_every_script_are_kept(text: str, tokens: list[str]):
    assert UnicodeWords().tokenize(text) == tokens


def test_the_settings_name_all_that_a_score_depends_on():
    assert ROUGE_SETTINGS == {
        "metric": "rougeL",
        "measure": "F",
        "scale": 100,
        "stemmer": "porter",
        "references": "max",
        "tokenizer": "unicode-words-1",
    }

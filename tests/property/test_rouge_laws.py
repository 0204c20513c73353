"""Laws of ROUGE-L: equal to rouge-score on ASCII text, bounded, and indifferent to what it should not see."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from distilllens.rouge import RougeL, UnicodeWords

# Words whose stem is shorter or other than they look, next to arbitrary text.
words = st.sampled_from(
    "a cat CATS ran run running flies dies die ties singly a_b snake_case x1y2 1990s don't U.S.A. sses ing "
    "eed agreed happily sky skies news rational".split()
)
ascii_text = st.one_of(
    st.text(st.characters(max_codepoint=127), max_size=60),
    st.lists(st.one_of(words, st.text("abceghilnorstuy_09'", max_size=9)), max_size=12).map(" ".join),
)
ours, theirs = UnicodeWords(), DefaultTokenizer(use_stemmer=True)
rouge, rouge_of_library = RougeL(), RougeScorer(["rougeL"], use_stemmer=True)


@given(ascii_text)
def test_ascii_text_has_exactly_the_tokens_of_rouge_score(text: str):
    assert ours.tokenize(text) == theirs.tokenize(text)


@given(ascii_text, st.sampled_from(["é", "中", " ’ "]))
def test_one_foreign_character_leaves_the_ascii_words_before_it_alone(text: str, foreign: str):
    assert ours.tokenize(f"{text} {foreign}")[: len(theirs.tokenize(text))] == theirs.tokenize(text)


@given(ascii_text, st.lists(ascii_text, min_size=1, max_size=3))
def test_ascii_scores_are_those_of_rouge_score(prediction: str, references: list[str]):
    expected = max(rouge_of_library.score(reference, prediction)["rougeL"].fmeasure for reference in references)
    assert rouge.score(prediction, references) == pytest.approx(100 * expected, abs=1e-9)


@given(st.text(max_size=40), st.lists(st.text(max_size=40), min_size=1, max_size=3))
def test_a_score_is_between_0_and_100_and_further_references_never_lower_it(prediction: str, references: list[str]):
    score = rouge.score(prediction, references)
    assert 0 <= score <= 100 + 1e-9
    assert rouge.score(prediction, [*references, "another one"]) >= score


@given(st.text(max_size=40))
def test_a_text_with_any_token_at_all_scores_100_against_itself(text: str):
    assert rouge.score(text, [text]) == pytest.approx(100.0 if ours.tokenize(text) else 0.0)


@given(st.text(max_size=40))
def test_no_letter_or_digit_of_any_script_is_dropped(text: str):
    normal = unicodedata.normalize("NFKC", text).lower()
    letters = [character for character in normal if unicodedata.category(character)[0] in "LN"]
    # Stemming changes ASCII words only.
    kept = "".join(ours.tokenize(text))
    assert [c for c in letters if not c.isascii()] == [
        c for c in kept if not c.isascii() and unicodedata.category(c)[0] in "LN"
    ]

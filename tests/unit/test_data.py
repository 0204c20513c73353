"""Rows become examples whose targets are the response and its end, exactly; others are counted."""

import json
from pathlib import Path

import pytest

from distilllens.data import (
    Example,
    Examples,
    load_examples,
    make_example,
    prompt_and_references,
    shifted_mask,
)
from distilllens.template import ColumnNames
from distilllens_cache import example_digest

BOS, EOS = "<|begin|>", "<|endoftext|>"
SENTENCES = [
    "the capital of france is paris",
    "one two three four five",
    "Below is an instruction",
    "café 日本語 🙂",
]


def build_tokenizer(*, adds_bos: bool = False, eos: str | None = EOS):
    """Byte-level BPE whose pad is its eos; with ``adds_bos`` it puts a token in front, like Llama's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [BOS, EOS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*SENTENCES * 4, *["a\n\n"] * 99], trainer)
    names = {"eos_token": eos, "pad_token": eos} if eos else {}
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
        )
        names["bos_token"] = BOS
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture(scope="module")
def plain():
    return build_tokenizer()


@pytest.fixture(scope="module")
def begins():
    return build_tokenizer(adds_bos=True)


@pytest.fixture
def load(tmp_path: Path):
    """``load(rows, tokenizer, ...)``: the rows through a JSONL file."""

    def load_rows(rows: list[dict], tokenizer, *, use=load_examples, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return use(str(path), tokenizer, **options)

    return load_rows


def learnt(example: Example, tokenizer) -> str:
    """The text of the tokens that the targets predict."""
    return tokenizer.decode([example.token_ids[position + 1] for position in example.target_positions])


def given(example: Example, tokenizer) -> str:
    """The text up to the first target's token."""
    return tokenizer.decode(example.token_ids[: example.target_positions[0] + 1])


ROW = {"instruction": "the capital of france", "input": "", "output": "is paris\n"}
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\nthe capital of france\n\n### Response:\n"
)


# The mask


def test_a_position_is_a_target_when_the_next_token_is_supervised() -> None:
    assert shifted_mask([False, False, True, True]) == (False, True, True, False)
    assert shifted_mask([True, False, True]) == (False, True, False)
    assert shifted_mask([True]) == (False,)
    assert shifted_mask([]) == ()


def test_an_example_knows_its_targets_and_its_digest() -> None:
    example = make_example("7", [5, 6, 7, 8], [False, False, True, True])
    assert example == Example("7", (5, 6, 7, 8), (False, True, True, False), example_digest([5, 6, 7, 8], [1, 2]))
    assert (example.num_tokens, example.num_targets, example.target_positions) == (4, 2, (1, 2))
    assert hash(example) == hash(make_example("7", (5, 6, 7, 8), (False, False, True, True)))


# Alpaca, prompts and text


def test_the_targets_of_an_instruction_are_its_response_and_the_end(load, plain) -> None:
    [example] = load([ROW], plain).examples
    assert plain.decode(example.token_ids) == ALPACA + "is paris\n" + EOS
    assert given(example, plain) == ALPACA
    assert learnt(example, plain) == "is paris\n" + EOS


def test_the_real_end_is_a_target_although_padding_is_the_same_token(load, plain) -> None:
    assert plain.pad_token_id == plain.eos_token_id
    row = ROW | {"output": f"one{EOS}two"}
    [example] = load([row], plain).examples
    assert learnt(example, plain) == f"one{EOS}two{EOS}"
    [text] = load([{"text": f"one{EOS}two"}], plain).examples
    assert learnt(text, plain) == f"one{EOS}two{EOS}".removeprefix(plain.decode(text.token_ids[:1]))


@pytest.mark.parametrize(
    "row", [ROW, {"prompt": "the capital", "completion": " of france"}, {"text": "the capital of"}]
)
def test_the_beginning_is_there_once_where_the_tokenizer_adds_it_and_never_otherwise(row, load, plain, begins) -> None:
    [without] = load([row], plain).examples
    [with_one] = load([row], begins).examples
    assert without.token_ids.count(0) == 0
    assert with_one.token_ids == (0, *without.token_ids)
    if "text" not in row:
        assert with_one.is_target == (False, *without.is_target)
    else:
        assert with_one.is_target == (True, *without.is_target), "the beginning predicts the first token of a text"


def test_a_text_that_already_has_its_beginning_and_end_gets_no_second(load, begins) -> None:
    [bare] = load([{"text": "the capital of"}], begins).examples
    [rendered] = load([{"text": f"{BOS}the capital of{EOS}"}], begins).examples
    assert rendered.token_ids == bare.token_ids
    assert rendered.digest == bare.digest
    assert bare.token_ids.count(0) == 1


def test_every_token_of_a_text_after_the_first_is_a_target(load, plain) -> None:
    [example] = load([{"text": "one two three"}], plain).examples
    assert example.is_target == (True,) * (example.num_tokens - 1) + (False,)
    assert plain.decode(example.token_ids) == "one two three" + EOS


def test_a_prompt_and_its_completion_are_tokenized_as_one_text(load, plain) -> None:
    [example] = load([{"prompt": "the capital", "completion": " of france"}], plain, template="none").examples
    assert list(example.token_ids[:-1]) == plain.encode("the capital of france")
    assert learnt(example, plain) == " of france" + EOS


def test_a_response_keeps_the_tokens_it_has_behind_its_prompt(load) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # alone, "is" is " is"
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", EOS]
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=["\n", ":"], show_progress=False)
    backend.train_from_iterator(["the capital is paris"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    row = {"prompt": "the capital:\n", "completion": "is paris"}
    [example] = load([row], tokenizer, template="none").examples
    assert list(example.token_ids[:-1]) == tokenizer.encode("the capital:\nis paris")
    assert learnt(example, tokenizer) == "is paris" + EOS


def test_a_token_across_the_border_is_cut_so_that_prompt_and_response_keep_their_own(load, plain) -> None:
    row = {"prompt": "the capital\n", "completion": "\n\nof france"}
    assert plain.encode("the capital\n\n\nof")[: len(plain.encode("the capital\n"))] != plain.encode("the capital\n")
    [example] = load([row], plain, template="none").examples
    assert learnt(example, plain) == "\n\nof france" + EOS
    assert given(example, plain) == "the capital\n"
    [prompt] = load([row], plain, template="none", use=prompt_and_references)
    assert list(prompt.token_ids) == plain.encode("the capital\n")
    assert prompt.token_ids == example.token_ids[: len(prompt.token_ids)]


def test_the_first_of_several_references_is_learnt_and_all_are_compared(load, plain) -> None:
    row = ROW | {"output": ["is paris", "paris", "Paris."]}
    assert learnt(load([row], plain).examples[0], plain) == "is paris" + EOS
    [(id, token_ids, references)] = load([row], plain, use=prompt_and_references)
    assert (id, references) == ("0", ["is paris", "paris", "Paris."])
    assert plain.decode(token_ids) == ALPACA


def test_a_tokenizer_without_an_end_is_a_sentence(load) -> None:
    with pytest.raises(ValueError, match="no end-of-text token"):
        load([ROW], build_tokenizer(eos=None))


# Limits, refusals, digests


def test_a_long_example_keeps_the_targets_of_its_beginning(load, plain) -> None:
    [whole] = load([ROW], plain).examples
    loaded = load([ROW], plain, max_length=whole.num_tokens - 2)
    [cut] = loaded.examples
    assert cut.token_ids == whole.token_ids[:-2]
    assert cut.is_target == (*whole.is_target[:-3], False)
    assert loaded.num_truncated == 1
    assert not loaded.refused
    assert "1 of 1 rows are cut off" in loaded.report()
    assert load([ROW], plain, max_length=whole.num_tokens).num_truncated == 0


def test_a_prompt_is_within_the_limit_up_to_its_last_token(load, begins) -> None:
    [example] = load([ROW], begins).examples
    num_prompt = example.target_positions[0] + 1
    for use in (load_examples, prompt_and_references):
        assert not load([ROW], begins, use=use, max_prompt_length=num_prompt).refused
        with pytest.raises(ValueError, match=f"prompt over the limit .*{num_prompt} tokens, at most {num_prompt - 1}"):
            load([ROW], begins, use=use, max_prompt_length=num_prompt - 1)
    assert load([ROW], begins, max_length=num_prompt + 1).examples[0].num_targets == 1
    with pytest.raises(ValueError, match=f"{num_prompt} tokens leave no room in {num_prompt} tokens"):
        load([ROW], begins, max_length=num_prompt)


def test_a_text_has_no_prompt_that_could_be_too_long(load, plain) -> None:
    assert not load([{"text": "one two three four five"}], plain, max_prompt_length=1).refused


def test_refusals_are_counted_by_reason_and_reported_in_sentences(load, plain) -> None:
    rows = [
        ROW,
        ROW | {"output": ""},
        ROW | {"output": 3},
        ROW | {"output": " "},
        ROW | {"instruction": "x " * 200},
    ]
    loaded = load(rows, plain, max_prompt_length=200)
    assert loaded.refused == {
        "empty response": 2,
        "cells that are not strings": 1,
        "prompt over the limit": 1,
    }
    assert [example.id for example in loaded.examples] == ["0"]
    assert loaded.num_rows == 5
    lines = loaded.report().splitlines()
    assert lines[0] == "2 of 5 rows are not used: empty response (first: row 1)."
    assert "1 of 5 rows are not used: cells that are not strings (first: row 2, column output holds a int)." in lines
    assert load([ROW], plain).report() == ""


@pytest.mark.parametrize(
    ("rows", "reason"),
    [([{"text": "a"}], "text of one token"), ([{"text": f"a{EOS}"}], None), ([{"text": "ab 日"}], None)],
)
def test_a_text_of_one_token_teaches_nothing(rows, reason, load, plain) -> None:
    if reason is None:
        assert load(rows, plain).examples
    else:
        with pytest.raises(ValueError, match=reason):
            load(rows, plain)


def test_a_text_of_which_one_token_fits_leaves_nothing_to_predict(load, plain) -> None:
    with pytest.raises(ValueError, match="nothing to predict"):
        load([{"text": "one two three"}], plain, max_length=1)


def test_a_dataset_with_nothing_usable_is_an_error_with_all_its_reasons(load, plain) -> None:
    rows = [ROW | {"output": ""}] * 3 + [ROW | {"output": None}]
    for use in (load_examples, prompt_and_references):
        with pytest.raises(ValueError, match="no row can be used") as caught:
            load(rows, plain, use=use)
        message = str(caught.value)
        assert "no row can be used (columns instruction, output, input; template alpaca)" in message
        assert "3 of 4 rows are not used: empty response" in message
        assert "1 of 4 rows are not used: cells that are not strings" in message


def test_plain_text_takes_no_template_of_prompts_and_has_none(load, plain) -> None:
    with pytest.raises(ValueError, match=r"plain text \(column body\).*--template none"):
        load([{"body": "one two"}], plain, template="alpaca", columns=ColumnNames(text="body"))
    with pytest.raises(ValueError, match="without prompts and references"):
        load([{"text": "one two"}], plain, use=prompt_and_references)


def test_an_empty_prompt_cannot_be_continued(load, plain) -> None:
    row = {"prompt": "", "completion": "one two"}
    with pytest.raises(ValueError, match="empty prompt"):
        load([row], plain, template="none", use=prompt_and_references)
    assert load([row], plain, template="none").examples[0].num_targets >= 2


def test_the_digest_of_a_dataset_follows_every_token_mask_and_place(load, plain) -> None:
    rows = [ROW, ROW | {"output": "one"}, {"instruction": "a", "input": "b", "output": "c"}]
    digest = load(rows, plain).digest
    assert load(rows, plain).digest == digest
    assert load([row | {"id": f"x{n}", "more": 1} for n, row in enumerate(rows)], plain).digest == digest
    others = [rows[:2], rows[::-1], [ROW | {"output": "is paris"}, *rows[1:]]]
    assert len({digest, *(load(other, plain).digest for other in others)}) == 4
    assert load(rows, plain, template="none").digest != digest


def test_loading_more_rows_leaves_the_first_examples_as_they_were(load, plain, tiny_rows) -> None:
    rows = tiny_rows * 30
    first = load(rows, plain, limit=5)
    everything = load(rows, plain)
    assert len(everything.examples) > 512, "more than one chunk of rows"
    assert everything.examples[:5] == first.examples
    assert everything.num_targets == sum(example.num_targets for example in everything.examples)
    assert everything.largest_token_id < len(plain)


def test_a_tokenizer_that_truncates_or_pads_by_itself_changes_nothing(load) -> None:
    tokenizer = build_tokenizer()
    expected = load([ROW, {"instruction": "a", "output": "b"}], tokenizer).examples
    tokenizer.backend_tokenizer.enable_truncation(max_length=4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.model_max_length = 4
    assert load([ROW, {"instruction": "a", "output": "b"}], tokenizer).examples == expected


# Real data


def check_real(loaded: Examples, tokenizer, path: Path) -> None:
    outputs = [json.loads(line)["output"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(loaded.examples) + sum(loaded.refused.values()) == loaded.num_rows
    for example in loaded.examples:
        if example.token_ids[-1] == tokenizer.eos_token_id:
            assert learnt(example, tokenizer) == outputs[int(example.id)] + tokenizer.eos_token
        else:
            # the cut may be inside a character
            assert outputs[int(example.id)].startswith(learnt(example, tokenizer).rstrip("\ufffd"))


@pytest.mark.parametrize("chat", [False, True])
def test_the_targets_of_real_rows_are_their_responses(chat, dolly_rows, tiny_tokenizer, tiny_chat_tokenizer) -> None:
    tokenizer = tiny_chat_tokenizer if chat else tiny_tokenizer
    loaded = load_examples(str(dolly_rows), tokenizer, max_length=512, max_prompt_length=256, limit=300)
    assert set(loaded.refused) <= {"prompt over the limit", "template does not keep prefixes"}
    assert len(loaded.examples) > 150
    check_real(loaded, tokenizer, dolly_rows)


def test_a_real_tokenizer_with_a_beginning_of_its_own_gets_it_once(dolly_rows, stories260k) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(stories260k)
    loaded = load_examples(str(dolly_rows), tokenizer, max_length=512, max_prompt_length=256, limit=100)
    assert all(example.token_ids.count(tokenizer.bos_token_id) == 1 for example in loaded.examples)
    assert all(example.token_ids[0] == tokenizer.bos_token_id for example in loaded.examples)
    check_real(loaded, tokenizer, dolly_rows)

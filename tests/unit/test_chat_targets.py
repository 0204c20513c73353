"""Every assistant turn of a chat is a target with its end; a template that breaks this is refused, by row."""

import json
from collections import Counter
from pathlib import Path

import pytest

from distilllens.data import Example, load_examples, prompt_and_references

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face' }}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRIPS_THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and not loop.last %}"
    "{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_END = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
TRIMS = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

BOS = "<|begin|>"
SENTENCES = [
    "the capital of france is paris",
    "one two three four five",
    "Below is an instruction",
    "café 日本語 🙂",
]


def build_tokenizer(template: str | None = None, *, adds_bos: bool = False):
    """Byte-level BPE that merges newlines; with ``adds_bos`` it puts a token in front, like Llama's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [BOS, "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*SENTENCES * 4, *["a\n\n"] * 99], trainer)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
        )
        names["bos_token"] = BOS
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def load(tmp_path: Path):
    """``load(rows, tokenizer, ...)``: the rows through a JSONL file."""

    def load_rows(rows: list[dict], tokenizer, *, use=load_examples, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return use(str(path), tokenizer, **options)

    return load_rows


def given(example: Example, tokenizer) -> str:
    """The text up to the first target's token."""
    return tokenizer.decode(example.token_ids[: example.target_positions[0] + 1])


CHAT = [
    {"role": "user", "content": "the capital?"},
    {"role": "assistant", "content": "paris 🙂"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two\n\nthree"},
]


def spans(example: Example, tokenizer) -> list[str]:
    """The texts of the runs of supervised tokens."""
    runs, run = [], []
    for position, target in enumerate(example.is_target):
        if target:
            run.append(example.token_ids[position + 1])
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("template", [SMOLLM2, TRIMS, STRIPS_THINKING])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_every_assistant_turn_is_a_target_with_its_end_and_nothing_else_is(template, adds_bos, load) -> None:
    tokenizer = build_tokenizer(template, adds_bos=adds_bos)
    [example] = load([{"messages": CHAT}], tokenizer).examples
    assert spans(example, tokenizer) == ["paris 🙂<|im_end|>", "two\n\nthree<|im_end|>"]
    assert tokenizer.decode(example.token_ids[-1:]) == "<|im_end|>", "nothing follows the last target"
    whole = str(tokenizer.apply_chat_template(CHAT, tokenize=False))
    assert whole.startswith(str(tokenizer.decode(example.token_ids)))
    assert example.token_ids.count(0) == (1 if adds_bos and template is TRIMS else 0), "the template's own beginning"


def test_system_and_tool_turns_and_an_injected_system_prompt_are_prompt(load) -> None:
    tokenizer = build_tokenizer(SMOLLM2)
    [injected] = load([{"messages": CHAT[:2]}], tokenizer).examples
    assert "named SmolLM" in given(injected, tokenizer)
    chat = [
        {"role": "system", "content": "Be short."},
        CHAT[0],
        {"role": "assistant", "content": "lookup(france)"},
        {"role": "tool", "content": "paris"},
        {"role": "assistant", "content": "paris"},
    ]
    [example] = load([{"messages": chat}], tokenizer).examples
    assert spans(example, tokenizer) == ["lookup(france)<|im_end|>", "paris<|im_end|>"]
    assert "named SmolLM" not in tokenizer.decode(example.token_ids)


def test_only_the_completion_of_a_conversational_prompt_is_a_target(load) -> None:
    tokenizer = build_tokenizer(SMOLLM2)
    [example] = load([{"prompt": CHAT[:3], "completion": CHAT[3:]}], tokenizer).examples
    assert spans(example, tokenizer) == ["two\n\nthree<|im_end|>"]


def test_an_instruction_under_a_chat_template_is_a_question_and_an_answer(load) -> None:
    tokenizer = build_tokenizer(SMOLLM2)
    row = {"instruction": "the capital", "input": "of france", "output": "paris"}
    as_chat = [
        {"role": "user", "content": "the capital\n\nof france"},
        {"role": "assistant", "content": "paris"},
    ]
    [example] = load([row], tokenizer).examples
    [chat] = load([{"messages": as_chat}], tokenizer).examples
    assert example == chat


def test_a_template_that_rewrites_earlier_turns_is_refused_only_where_it_does(load) -> None:
    tokenizer = build_tokenizer(STRIPS_THINKING)
    thinks = {"role": "assistant", "content": "<think>hm</think>paris"}
    rows = [{"messages": [CHAT[0], thinks]}, {"messages": [CHAT[0], thinks, *CHAT[2:]]}]
    loaded = load(rows, tokenizer)
    assert loaded.refused == Counter({"template does not keep prefixes": 1})
    assert spans(loaded.examples[0], tokenizer) == ["<think>hm</think>paris<|im_end|>"]
    prompts = load(rows, tokenizer, use=prompt_and_references)
    assert prompts.refused == loaded.refused, "what is not learnt is not measured either"


def test_a_response_that_merges_with_the_template_is_refused(load) -> None:
    tokenizer = build_tokenizer(SMOLLM2)
    row = {"messages": [CHAT[0], {"role": "assistant", "content": "\n\nparis"}]}
    loaded = load([row, {"messages": CHAT}], tokenizer)
    assert loaded.refused == Counter({"template does not keep prefixes": 1})


def test_a_template_without_an_end_of_turn_keeps_the_whole_turn_and_says_so(load, tmp_path: Path) -> None:
    plain = build_tokenizer()
    (tmp_path / "plain.jinja").write_text(NO_END)
    loaded = load([{"messages": CHAT[:2]}], plain, template=str(tmp_path / "plain.jinja"))
    assert spans(loaded.examples[0], plain) == ["assistant: paris 🙂\n"]
    assert loaded.num_endless == 1
    assert "a student will not learn to stop" in loaded.report()


def test_the_prompts_of_a_chat_are_all_before_its_last_response(load) -> None:
    tokenizer = build_tokenizer(SMOLLM2)
    [prompt] = load([{"messages": CHAT}], tokenizer, use=prompt_and_references)
    [example] = load([{"messages": CHAT}], tokenizer).examples
    assert prompt.references == ["two\n\nthree"]
    assert example.token_ids[: len(prompt.token_ids)] == prompt.token_ids
    assert tokenizer.decode(example.token_ids[len(prompt.token_ids) :]) == "two\n\nthree<|im_end|>"

"""Laws of examples: whatever the rows say, targets are the responses with their ends, and nothing else is."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilllens.data import Examples, load_examples, make_example, prompt_and_references, shifted_mask

# Any text, and often the white space and the end tokens that merge, repeat and get trimmed.
texts = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(["\n", "\n\n", " ", "<|endoftext|>", "the cat", "é", "🙂", "日本"]),
    ),
    max_size=6,
).map("".join)
usable = texts.filter(lambda text: text.strip() and not text.endswith("<|endoftext|>"))


def load(rows: list[dict], tokenizer, *, use=load_examples, **options):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return use(str(path), tokenizer, max_prompt_length=None, **options)


def target_tokens(example) -> list[int]:
    return [example.token_ids[position + 1] for position in example.target_positions]


@given(st.lists(st.booleans(), max_size=20))
def test_the_shift_moves_every_flag_one_to_the_left_and_drops_the_first(is_supervised: list[bool]) -> None:
    is_target = shifted_mask(is_supervised)
    assert len(is_target) == len(is_supervised)
    assert all(is_target[t] == is_supervised[t + 1] for t in range(len(is_target) - 1))
    assert not any(is_target[-1:])


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.booleans()), min_size=1, max_size=20), st.data())
def test_a_digest_changes_with_any_token_or_flag(tokens: list[tuple[int, bool]], data) -> None:
    ids, flags = map(list, zip(*tokens, strict=True))
    digest = make_example("a", ids, flags).digest
    assert make_example("b", ids, flags).digest == digest
    place = data.draw(st.integers(0, len(ids) - 1))
    other = [*ids[:place], (ids[place] + 1) % 2**32, *ids[place + 1 :]]
    assert make_example("a", other, flags).digest != digest
    if place > 0:
        flipped = [*flags[:place], not flags[place], *flags[place + 1 :]]
        assert make_example("a", ids, flipped).digest != digest


@pytest.mark.parametrize("template", ["alpaca", "none"])
@settings(deadline=None, max_examples=60)
@given(prompt=texts, context=texts, response=usable)
def test_targets_decode_to_the_response_and_its_end(
    template: str, prompt: str, context: str, response: str, tiny_tokenizer
) -> None:
    row = {"instruction": prompt, "input": context, "output": response}
    loaded = load([row], tiny_tokenizer, template=template, max_length=10_000)
    [example] = loaded.examples
    assert tiny_tokenizer.decode(target_tokens(example)) == response + tiny_tokenizer.eos_token
    [only] = load([row], tiny_tokenizer, template=template, use=prompt_and_references)
    assert only.token_ids == example.token_ids[: example.target_positions[0] + 1]
    assert only.references == [response]


@settings(deadline=None, max_examples=60)
@given(text=usable)
def test_a_text_decodes_to_itself_and_its_end_with_one_target_less_than_tokens(text: str, tiny_tokenizer) -> None:
    if len(tiny_tokenizer.encode(text)) < 2:
        return
    [example] = load([{"text": text}], tiny_tokenizer, max_length=10_000).examples
    assert tiny_tokenizer.decode(example.token_ids) == text + tiny_tokenizer.eos_token
    assert example.num_targets == example.num_tokens - 1


turns = st.lists(st.tuples(texts, usable), min_size=1, max_size=3)


@settings(deadline=None, max_examples=60)
@given(turns=turns, system=st.none() | texts)
def test_the_targets_of_a_chat_are_its_responses_or_the_row_is_refused(turns, system, tiny_chat_tokenizer) -> None:
    tokenizer = tiny_chat_tokenizer
    messages = [{"role": "system", "content": system}] if system is not None else []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    safe = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    loaded = load([{"messages": messages}, safe], tokenizer, max_length=10_000)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if loaded.refused:
        starts = [text for _, text in turns if text[0].isspace()]
        assert loaded.refused == {"template does not keep prefixes": 1}
        assert starts, "only white space merges with the newline before a response"
        return
    example = loaded.examples[0]
    expected = "".join(answered + "<|im_end|>" for _, answered in turns)
    assert tokenizer.decode(target_tokens(example)) == expected
    assert tokenizer.decode(example.token_ids) + "\n" == whole
    assert list(example.token_ids) == tokenizer.encode(whole)[: example.num_tokens]


@settings(deadline=None, max_examples=60)
@given(response=usable, max_length=st.integers(2, 60), instruction=st.sampled_from(["", "the cat", "é" * 9]))
def test_cutting_keeps_the_beginning_of_tokens_and_targets(
    response: str, max_length: int, instruction: str, tiny_tokenizer
) -> None:
    row = {"prompt": instruction, "completion": response}
    [whole] = load([row], tiny_tokenizer, template="none", max_length=10_000).examples
    if whole.target_positions[0] + 1 >= max_length:
        with pytest.raises(ValueError, match="prompt over the limit"):
            load([row], tiny_tokenizer, template="none", max_length=max_length)
        return
    loaded = load([row], tiny_tokenizer, template="none", max_length=max_length)
    [cut] = loaded.examples
    assert cut.token_ids == whole.token_ids[:max_length]
    assert cut.target_positions == tuple(t for t in whole.target_positions if t < max_length - 1)
    assert loaded.num_truncated == (whole.num_tokens > max_length)


rows = st.lists(
    st.fixed_dictionaries({"instruction": texts, "output": st.one_of(texts, st.none(), st.integers())}),
    min_size=1,
    max_size=8,
)


@settings(deadline=None, max_examples=40)
@given(rows=rows, data=st.data())
def test_a_row_gives_one_example_wherever_it_stands(rows: list[dict], data, tiny_tokenizer) -> None:
    anchor = {"id": "anchor", "instruction": "the cat", "output": "sat"}
    rows = [anchor, *({"id": f"row {n}", **row} for n, row in enumerate(rows))]
    loaded = load(rows, tiny_tokenizer)
    moved = load(data.draw(st.permutations(rows)), tiny_tokenizer)
    first = load(rows, tiny_tokenizer, limit=data.draw(st.integers(1, len(rows))))

    def by_id(examples: Examples) -> dict:
        return {example.id: example for example in examples.examples}

    assert by_id(moved) == by_id(loaded)
    assert by_id(first).items() <= by_id(loaded).items()
    assert moved.refused == loaded.refused
    assert len(loaded.examples) + loaded.refused.total() == len(rows)

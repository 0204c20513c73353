"""Generation: what a row gets depends on nothing but the model, the row, the seed and the settings."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from distilllens.data import Prompt
from distilllens.generate import Generation, Sampling, end_tokens, generate

TEXTS = [
    "the cat",
    "a much longer prompt than the others, the dog ran to the house",
    "mat",
    # The id of the padding as text: at the beginning, as GPT-2 begins, and between two turns.
    "<|endoftext|>to the<|endoftext|> rug",
]
SAMPLED = Sampling(max_new_tokens=12)
GREEDY = Sampling(max_new_tokens=12, do_sample=False)


@pytest.fixture
def prompts(tiny_tokenizer):
    return [Prompt(f"row {number}", tuple(tiny_tokenizer(text)["input_ids"]), []) for number, text in enumerate(TEXTS)]


@pytest.fixture
def write(tiny_tokenizer):
    """Generate with the tiny tokenizer; no end token unless given."""

    def write(model, prompts, sampling, *, seed=10, ends=frozenset(), vocab_size=None, tokenizer=tiny_tokenizer):
        vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        return generate(model, tokenizer, prompts, sampling, seed=seed, vocab_size=vocab_size, ends=ends)

    return write


def sharpened(model):
    """A random model is nearly uniform; this one has opinions, so that a wrong context shows."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)
    return model


def echo_model(model, successor: dict[int, int]):
    """``model`` changed to say ``successor[token]`` after each token, whatever came before (Llama only)."""
    size = model.config.hidden_size
    assert len(successor) <= size
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for axis, (token, following) in enumerate(successor.items()):
            model.model.embed_tokens.weight[token, axis] = 1.0
            model.lm_head.weight[following, axis] = 10.0
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, replace(SAMPLED, top_k=20, top_p=0.9, temperature=0.7)])
def test_a_row_gets_the_same_text_alone_as_in_a_batch_of_other_lengths(
    architecture, sampling, tiny_model, write, prompts
):
    model = sharpened(tiny_model(architecture))
    together = write(model, prompts, sampling)
    assert together == [write(model, [prompt], sampling)[0] for prompt in prompts]
    assert together[::-1] == write(model, prompts[::-1], sampling)
    assert len({generation.text for generation in together}) == len(prompts)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_greedy_text_is_the_argmax_of_a_forward_pass_without_any_padding(architecture, tiny_model, write, prompts):
    model = sharpened(tiny_model(architecture))
    for prompt, written in zip(prompts, write(model, prompts, GREEDY), strict=True):
        ids = list(prompt.token_ids)
        for _ in range(GREEDY.max_new_tokens):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert written.token_ids == tuple(ids[len(prompt.token_ids) :])


def test_equal_seeds_write_equal_texts_and_other_seeds_or_rows_other_ones(tiny_model, write, prompts):
    model = tiny_model()
    first = write(model, prompts, SAMPLED, seed=10)
    torch.rand(7)  # the global generator is nobody's seed
    assert write(model, prompts, SAMPLED, seed=10) == first
    assert all(one != other for one, other in zip(first, write(model, prompts, SAMPLED, seed=20), strict=True))
    twins = [Prompt("one", prompts[0].token_ids, []), Prompt("two", prompts[0].token_ids, [])]
    one, two = write(model, twins, SAMPLED)
    assert one != two


def test_samples_follow_the_models_probabilities(tiny_model, write, prompts):
    model = tiny_model()
    probabilities = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.03, 0.02])
    model.lm_head = torch.nn.Linear(32, model.config.vocab_size)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.fill_(-1e4)
        model.lm_head.bias[7:15] = probabilities.log() + 3
    count = 4000
    rows = [Prompt(str(number), prompts[0].token_ids, []) for number in range(count)]
    written = write(model, rows, replace(SAMPLED, max_new_tokens=2))
    for position in range(2):
        found = Counter(one.token_ids[position] for one in written)
        assert set(found) <= set(range(7, 15))
        # Pearson's chi-square of 7 degrees of freedom exceeds 24.3 once in a thousand.
        expected = (count * probabilities).tolist()
        assert sum((found[7 + cell] - mean) ** 2 / mean for cell, mean in enumerate(expected)) < 24.3
    # Tokens of one row are independent of each other.
    again = sum(one.token_ids[0] == one.token_ids[1] for one in written) / count
    assert again == pytest.approx(float((probabilities**2).sum()), abs=0.03)


def test_text_stops_before_the_end_token_even_where_that_is_the_padding_token(tiny_model, write, tiny_tokenizer):
    a, b, end = tiny_tokenizer.convert_tokens_to_ids(["a", "b", "<|endoftext|>"])
    model = echo_model(tiny_model(), {a: b, b: end, end: a})
    same = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    same.pad_token = same.eos_token
    # An end token inside the prompt (of an earlier turn) is text, though it has the id of the padding.
    prompts = [Prompt("short", (a,), []), Prompt("long", (b, end, a, b, end), [])]
    for tokenizer in (same, tiny_tokenizer):
        short, long = write(model, prompts, GREEDY, ends=frozenset([end]), tokenizer=tokenizer)
        assert short == Generation("b", (b,), end_id=end)
        assert long == Generation("ab", (a, b), end_id=end)


def test_text_without_an_end_token_is_cut_at_the_limit(tiny_model, write, tiny_tokenizer):
    a, b, end = tiny_tokenizer.convert_tokens_to_ids(["a", "b", "<|endoftext|>"])
    model = echo_model(tiny_model(), {a: b, b: a})
    (written,) = write(model, [Prompt("0", (a,), [])], replace(GREEDY, max_new_tokens=5), ends=frozenset([end]))
    assert written == Generation("babab", (b, a, b, a, b), end_id=None)


def test_a_text_that_ends_at_once_is_empty(tiny_model, write, tiny_tokenizer):
    a, end = tiny_tokenizer.convert_tokens_to_ids(["a", "<|endoftext|>"])
    model = echo_model(tiny_model(), {a: end})
    assert write(model, [Prompt("0", (a,), [])], GREEDY, ends=frozenset([end])) == [Generation("", (), end_id=end)]


@pytest.mark.parametrize("size", [1, 2])
def test_ngrams_do_not_repeat_and_padding_is_not_one_of_them(size, tiny_model, write, tiny_tokenizer):
    a, b, c, end = tiny_tokenizer.convert_tokens_to_ids(["a", "b", "c", "<|endoftext|>"])
    model = echo_model(tiny_model(), {a: a, b: c, c: end})
    sampling = replace(GREEDY, max_new_tokens=4, no_repeat_ngram_size=size)
    ends = frozenset([end])
    # The tokenizer pads with its end token: once that counts as text, size 1 forbids the short row to end.
    padded_with_end = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    prompts = [Prompt("short", (b,), []), Prompt("long", (a, a, a, a), [])]
    short, long = write(model, prompts, sampling, ends=ends, tokenizer=padded_with_end)
    assert short == Generation("c", (c,), end_id=end)
    assert long.token_ids[:1] != (a,)


def test_defaults_that_a_model_brings_along_are_not_used_and_stay_with_the_model(tiny_model, write, prompts):
    model = sharpened(tiny_model())
    plain = write(model, prompts, GREEDY)
    own = GenerationConfig(repetition_penalty=50.0, do_sample=True, temperature=9.0, num_beams=2)
    model.generation_config = own
    assert write(model, prompts, GREEDY) == plain
    assert model.generation_config is own


def test_ids_beyond_the_effective_vocabulary_are_never_written(tiny_model, write, prompts):
    model = sharpened(tiny_model(vocab_size=400))
    for sampling in (GREEDY, replace(SAMPLED, max_new_tokens=40)):
        for generation in write(model, prompts, sampling, vocab_size=250):
            assert max(generation.token_ids) < 250


def test_top_k_of_one_is_greedy(tiny_model, write, prompts):
    model = sharpened(tiny_model())
    assert write(model, prompts, replace(SAMPLED, top_k=1)) == write(model, prompts, GREEDY)


def test_a_prompt_that_leaves_no_room_for_the_answer_is_refused(tiny_model, write, prompts):
    model = tiny_model()
    limit = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"exceed the {limit} positions of the model"):
        write(model, prompts, Sampling(max_new_tokens=limit))


def test_a_chats_end_of_turn_ends_a_text_as_eos_does(tiny_model, tiny_chat_tokenizer):
    model = tiny_model()
    eos = tiny_chat_tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=[7, 9])
    assert end_tokens(model, tiny_chat_tokenizer) == {eos, 7, 9}
    model.generation_config = GenerationConfig(eos_token_id=7)
    assert end_tokens(model, tiny_chat_tokenizer) == {eos, 7}

"""Two tokenizers are the same exactly when every text becomes the same ids; their files say nothing else."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distilllens.vocabulary import (
    effective_vocab_size,
    num_token_ids,
    require_matching_tokenizer,
    save_tokenizer,
    tokenizer_digest,
)


def edited(tokenizer, change) -> PreTrainedTokenizerFast:
    """A copy of ``tokenizer`` whose tokenizer.json went through ``change``."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    change(backend)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token=tokenizer.eos_token
    )


# The effective vocabulary -------------------------------------------------------------------------


def test_the_effective_vocabulary_ends_at_the_head_or_at_the_last_token(tiny_tokenizer, tiny_model):
    assert num_token_ids(tiny_tokenizer) == len(tiny_tokenizer)
    padded = tiny_model("llama", vocab_size=len(tiny_tokenizer) + 64)
    assert effective_vocab_size(padded, tiny_tokenizer) == len(tiny_tokenizer)
    assert effective_vocab_size(300, tiny_tokenizer) == 300


def test_an_added_token_extends_the_effective_vocabulary(tiny_tokenizer):
    extended = copy.deepcopy(tiny_tokenizer)
    extended.add_tokens(["<new>"])
    assert effective_vocab_size(1000, extended) == effective_vocab_size(1000, tiny_tokenizer) + 1


def test_holes_in_the_ids_do_not_shorten_the_effective_vocabulary(tiny_tokenizer):
    def move_last(backend):
        vocab = backend["model"]["vocab"]
        vocab[max(vocab, key=vocab.__getitem__)] = 400

    assert effective_vocab_size(1000, edited(tiny_tokenizer, move_last)) == 401


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused(tiny_tokenizer, tiny_model):
    with pytest.raises(ValueError, match=r"does not match teacher/: it has ids up to 319.*embeddings for 318"):
        require_matching_tokenizer(tiny_model("llama", vocab_size=318), tiny_tokenizer, "teacher/")


def test_a_tokenizer_that_leaves_most_rows_empty_is_refused(tiny_tokenizer, tiny_model):
    with pytest.raises(ValueError, match="fewer than half"):
        require_matching_tokenizer(tiny_model("llama", vocab_size=641), tiny_tokenizer, "teacher/")


@pytest.mark.parametrize("vocab_size", [320, 384])
def test_a_padded_embedding_is_no_mismatch(vocab_size, tiny_tokenizer, tiny_model):
    require_matching_tokenizer(tiny_model("gpt2", vocab_size=vocab_size), tiny_tokenizer, "teacher/")


# The digest ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside_a_model", [True, False])
def test_the_digest_survives_saving_and_loading(tiny_chat_tokenizer, tiny_model, tmp_path, beside_a_model):
    save_tokenizer(tiny_chat_tokenizer, tmp_path)
    if beside_a_model:  # transformers may then pick the architecture's own tokenizer class
        tiny_model("llama").save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_digest(loaded) == tokenizer_digest(tiny_chat_tokenizer)
    assert loaded.chat_template == tiny_chat_tokenizer.chat_template
    assert loaded.eos_token_id == tiny_chat_tokenizer.eos_token_id


def test_the_digest_of_a_real_tokenizer_survives_saving_and_loading(stories260k, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    save_tokenizer(tokenizer, tmp_path)
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_digest(tokenizer)


def test_the_digest_does_not_depend_on_what_changes_no_id(tiny_tokenizer):
    other = copy.deepcopy(tiny_tokenizer)
    other("a long text that is cut", truncation=True, max_length=2, padding="max_length")
    other.pad_token = "<|im_start|>"
    other.padding_side = "left"
    other.chat_template = "{{ messages }}"
    other.name_or_path = "elsewhere"
    assert tokenizer_digest(other) == tokenizer_digest(tiny_tokenizer)


def _swap_merges(backend):
    merges = backend["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def _swap_ids(first: int):
    def swap(backend):
        vocab = backend["model"]["vocab"]
        names = {index: token for token, index in vocab.items()}
        vocab[names[first]], vocab[names[first + 1]] = first + 1, first

    return swap


def _lower(backend):
    backend["normalizer"] = json.loads(normalizers.Lowercase().__getstate__())


def _digits(backend):
    split = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    backend["pre_tokenizer"] = json.loads(split.__getstate__())


def _prefix_space(backend):
    backend["pre_tokenizer"]["add_prefix_space"] = True


def _add_bos(backend):
    template = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    backend["post_processor"] = json.loads(template.__getstate__())


def _drop_added(backend):
    backend["added_tokens"].pop()


def _strip_added(backend):
    backend["added_tokens"][1]["lstrip"] = True


@pytest.mark.parametrize(
    "change",
    [
        _swap_merges,
        _swap_ids(0),
        _swap_ids(260),
        _lower,
        _digits,
        _prefix_space,
        _add_bos,
        _drop_added,
        _strip_added,
    ],
)
def test_a_tokenizer_of_the_same_size_that_gives_other_ids_has_another_digest(tiny_tokenizer, change):
    plain = edited(tiny_tokenizer, lambda backend: None)
    assert tokenizer_digest(plain) == tokenizer_digest(tiny_tokenizer)
    changed = edited(tiny_tokenizer, change)
    assert len(changed) == len(tiny_tokenizer)
    assert tokenizer_digest(changed) != tokenizer_digest(tiny_tokenizer)


def test_the_token_with_id_zero_is_in_the_digest(tiny_tokenizer):
    backend = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    digests = set()
    for name in ("<|a|>", "<|b|>"):
        vocab = {name: 0} | {token: index for token, index in backend["model"]["vocab"].items() if index}
        changed = backend | {"added_tokens": [], "model": backend["model"] | {"vocab": vocab}}
        digests.add(tokenizer_digest(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(changed)))))
        vocab.pop(name)
        changed = backend | {"added_tokens": [], "model": backend["model"] | {"vocab": vocab}}
        digests.add(tokenizer_digest(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(changed)))))
    assert len(digests) == 3  # with <|a|>, with <|b|>, with neither


def test_another_end_of_text_is_another_digest(tiny_tokenizer):
    other = copy.deepcopy(tiny_tokenizer)
    other.eos_token = "<|im_end|>"
    assert tokenizer_digest(other) != tokenizer_digest(tiny_tokenizer)


def test_a_tokenizer_without_a_tokenizer_json_is_refused():
    with pytest.raises(ValueError, match=r"has no tokenizer.json"):
        tokenizer_digest(SimpleNamespace())  # type: ignore[arg-type]


# The files ----------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_one_tokenizer_has_one_set_of_bytes_wherever_it_was(tiny_chat_tokenizer, tmp_path):
    save_tokenizer(tiny_chat_tokenizer, tmp_path / "one")
    again = AutoTokenizer.from_pretrained(tmp_path / "one")
    again("a long text that is cut", truncation=True, max_length=2, padding="max_length")
    save_tokenizer(again, tmp_path / "a/path/of this machine")
    first, second = contents(tmp_path / "one"), contents(tmp_path / "a/path/of this machine")
    assert first == second
    assert set(first) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert not any(str(tmp_path).encode() in content for content in first.values())


def test_saving_leaves_the_tokenizer_as_it_is(tiny_tokenizer, tmp_path):
    before = tiny_tokenizer.backend_tokenizer.to_str()
    save_tokenizer(tiny_tokenizer, tmp_path)
    assert tiny_tokenizer.backend_tokenizer.to_str() == before

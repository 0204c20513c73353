"""A new student is its source without some blocks, or fresh from a seed; and a whole folder or none."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from distilllens import new_student
from distilllens.config import NewStudentConfig
from distilllens.depth_pruning import blocks_path, check_kept, prune_depth, spread_layers
from distilllens.models import load_model
from distilllens.new_student import run_new_student
from distilllens.vocabulary import tokenizer_digest

TOKENS = torch.arange(3, 43)[None]


def logits(model, **settings) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, **settings).logits


class PassedOver(nn.Module):
    """A block that does nothing."""

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def with_blocks_passed_over(model, kept: tuple[int, ...]):
    """``model`` itself, in its own numbering, with every block outside ``kept`` doing nothing."""
    blocks = model.get_submodule(blocks_path(model))
    for index in range(len(blocks)):
        if index + 1 not in kept:
            blocks[index] = PassedOver()
    return model


# Which layers -------------------------------------------------------------------------------------


def test_ten_of_thirty_layers_are_the_documented_ones():
    assert spread_layers(10, 30) == (1, 4, 7, 11, 14, 17, 20, 24, 27, 30)
    assert spread_layers(1, 30) == (1,)
    assert spread_layers(2, 30) == (1, 30)


@given(st.data(), st.integers(2, 200))
def test_spread_layers_begin_and_end_with_the_model_and_are_even(data, num_layers):
    num_kept = data.draw(st.integers(2, num_layers))
    kept = spread_layers(num_kept, num_layers)
    gaps = {right - left for left, right in pairwise(kept)}
    assert (len(kept), kept[0], kept[-1]) == (num_kept, 1, num_layers)
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("num_kept", [0, 5, -1])
def test_more_layers_than_there_are_is_refused(num_kept):
    with pytest.raises(ValueError, match=rf"--layers {num_kept}: the model has 4 layers"):
        spread_layers(num_kept, 4)


@pytest.mark.parametrize(
    ("keep", "sentence"),
    [
        ((), "names no layer"),
        ((0, 1), "no layer 0; layers are counted from 1 to 4"),
        ((1, 5), "no layer 5"),
        ((2, 1), "ascending order"),
        ((2, 2), "once"),
    ],
)
def test_a_wrong_list_of_layers_is_refused(keep, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_kept(keep, 4)


# Pruning ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("kept", [(1, 4), (2, 3), (1, 2, 3, 4), (3,)])
def test_the_pruned_model_is_the_model_with_the_other_blocks_passed_over(architecture, tied, kept, tiny_model):
    pruned = prune_depth(tiny_model(architecture, tied=tied), kept)
    expected = logits(with_blocks_passed_over(tiny_model(architecture, tied=tied), kept), use_cache=False)
    assert pruned.config.num_hidden_layers == len(kept)
    torch.testing.assert_close(logits(pruned), expected, atol=1e-5, rtol=1e-5)
    assert (pruned.get_output_embeddings().weight is pruned.get_input_embeddings().weight) is tied


@pytest.mark.parametrize("kept", [(1, 3), (2, 4), (2, 3, 4)])
def test_each_kept_block_keeps_its_kind_of_attention(kept, tiny_model):
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    settings = {"layer_types": kinds, "sliding_window": 4}
    pruned = prune_depth(tiny_model("gemma2", **settings), kept)
    assert pruned.config.layer_types == [kinds[layer - 1] for layer in kept]
    expected = logits(with_blocks_passed_over(tiny_model("gemma2", **settings), kept), use_cache=False)
    torch.testing.assert_close(logits(pruned), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_the_pruned_model_generates_the_same_with_and_without_a_kv_cache(architecture, tiny_model):
    pruned = prune_depth(tiny_model(architecture), (2, 4))
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = pruned.generate(TOKENS, use_cache=True, **settings)
    assert torch.equal(cached, pruned.generate(TOKENS, use_cache=False, **settings))
    assert cached.shape[1] == TOKENS.shape[1] + 8


def test_a_list_that_only_happens_to_be_as_long_as_the_model_is_left_alone(tiny_model):
    model = tiny_model("llama", eos_token_id=[0, 1, 2, 3])
    assert prune_depth(model, (1, 4)).config.eos_token_id == [0, 1, 2, 3]


def test_pruning_moves_nobodys_random_state_and_not_the_source(tiny_model):
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    pruned = prune_depth(model, (1, 4))
    assert torch.equal(torch.rand(3), expected)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_blocks_that_differ_by_their_number_are_refused(tiny_model):
    mixture = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [0],
    }
    model = tiny_model("qwen2_moe", shared_expert_intermediate_size=16, **mixture)
    with pytest.raises(ValueError, match=r"can't be pruned to layers 2,3: its blocks differ"):
        prune_depth(model, (2, 3))


# The command --------------------------------------------------------------------------------------


@pytest.fixture
def teacher(tiny_model_folder, tiny_chat_tokenizer) -> Path:
    return tiny_model_folder("llama", tokenizer=tiny_chat_tokenizer, tied=True, num_layers=6)


@pytest.fixture
def model_config(tmp_path, tiny_model) -> Path:
    """A config.json with another model's special ids."""
    tiny_model("llama", num_layers=2).config.save_pretrained(tmp_path / "fresh")
    return tmp_path / "fresh" / "config.json"


def make(**settings) -> new_student.NewStudent:
    return run_new_student(NewStudentConfig(**settings))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_student_is_an_ordinary_model_folder(teacher, tmp_path, tiny_chat_tokenizer):
    made = make(from_model=str(teacher), layers=3, output_dir=tmp_path / "deep" / "student")
    assert made.layers == (1, 4, 6)
    assert made.folder == tmp_path / "deep" / "student"
    student = AutoModelForCausalLM.from_pretrained(made.folder).eval()
    assert student.config.num_hidden_layers == made.num_layers == 3
    assert made.num_parameters == student.num_parameters()
    expected = logits(with_blocks_passed_over(load_model(teacher), (1, 4, 6)), use_cache=False)
    torch.testing.assert_close(logits(student), expected, atol=1e-5, rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    assert tokenizer_digest(tokenizer) == tokenizer_digest(tiny_chat_tokenizer)
    assert tokenizer.chat_template == tiny_chat_tokenizer.chat_template
    assert (made.folder / "generation_config.json").is_file()
    assert "3 of the 6 layers" in str(made)
    assert "(1, 4, 6)" in str(made)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["student"]


def test_the_named_layers_are_kept(teacher, tmp_path):
    made = make(from_model=str(teacher), keep=(2, 5), output_dir=tmp_path / "student")
    expected = load_model(teacher).model.layers[4].mlp.up_proj.weight
    assert made.layers == (2, 5)
    assert torch.equal(load_model(made.folder).model.layers[1].mlp.up_proj.weight, expected)


def test_the_dtype_and_the_generation_settings_of_the_source_are_kept(teacher, tmp_path):
    source = load_model(teacher, dtype="bfloat16")
    source.generation_config.update(do_sample=True, temperature=0.3)
    shutil.copytree(teacher, tmp_path / "teacher")
    source.save_pretrained(tmp_path / "teacher")
    made = make(from_model=str(tmp_path / "teacher"), layers=2, output_dir=tmp_path / "student")
    student = load_model(made.folder, dtype="auto")
    assert made.dtype == "bfloat16"
    assert student.dtype == torch.bfloat16
    assert student.generation_config.temperature == 0.3


def test_fresh_weights_depend_on_the_seed_alone(model_config, teacher, tmp_path):
    state = torch.get_rng_state()
    folders = {}
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        made = make(config_file=model_config, tokenizer=str(teacher), seed=seed, output_dir=tmp_path / name)
        folders[name] = contents(made.folder)
        torch.rand(5)
        assert made.layers is None
    assert folders["one"] == folders["two"]
    assert folders["one"]["model.safetensors"] != folders["other"]["model.safetensors"]
    torch.rand(15)
    torch.set_rng_state(state)


def test_a_fresh_model_ends_its_text_with_its_tokenizers_token(model_config, teacher, tmp_path, tiny_chat_tokenizer):
    made = make(config_file=model_config, from_model=str(teacher), output_dir=tmp_path / "student")
    student = load_model(made.folder)
    assert student.config.eos_token_id == tiny_chat_tokenizer.eos_token_id != 0
    assert student.generation_config.eos_token_id == tiny_chat_tokenizer.eos_token_id
    assert "fresh weights" in str(made)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("not json", "doesn't describe a causal language model"),
        ('{"hidden_size": 8}', "doesn't describe a causal language model"),
        ('{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}', "doesn't describe"),
        ('{"model_type": "vit"}', "doesn't describe a causal language model"),
    ],
)
def test_a_config_that_describes_no_language_model_is_refused(content, sentence, teacher, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        make(config_file=tmp_path / "config.json", tokenizer=str(teacher), output_dir=tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_a_fresh_model_with_too_small_a_vocabulary_is_refused(model_config, teacher, tmp_path):
    model_config.write_text(json.dumps(json.loads(model_config.read_text()) | {"vocab_size": 100}))
    with pytest.raises(ValueError, match="the tokenizer does not match"):
        make(config_file=model_config, tokenizer=str(teacher), output_dir=tmp_path / "student")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"from_model": "x"}, "none of --layers, --keep, --config and a width such as --hidden-size given"),
        ({"from_model": "x", "layers": 2, "keep": (1,)}, "--layers and --keep given"),
        ({"layers": 2}, "give --from MODEL"),
        ({"config_file": "config.json"}, "give --tokenizer FOLDER"),
        ({"config_file": "absent.json", "tokenizer": "TEACHER"}, "absent.json is not a file"),
        ({"from_model": "TEACHER", "layers": 7}, "the model has 6 layers"),
        ({"from_model": "TEACHER", "keep": (1, 9)}, "there is no layer 9"),
        ({"from_model": "./absent", "layers": 2}, "./absent does not exist"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_and_writes_nothing(settings, sentence, teacher, tmp_path):
    filled = {name: str(teacher) if value == "TEACHER" else value for name, value in settings.items()}
    with pytest.raises(ValueError, match=sentence):
        make(output_dir=tmp_path / "student", **filled)
    assert list(tmp_path.iterdir()) == []


# The output folder --------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_refused_and_left_alone(teacher, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        make(from_model=str(teacher), layers=2, output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"holds more than a model \(notes.txt\)"):
        make(from_model=str(teacher), layers=2, output_dir=tmp_path, overwrite=True)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_overwrite_never_takes_anything_but_the_model_along(teacher, tmp_path):
    made = make(from_model=str(teacher), layers=2, output_dir=tmp_path / "student")
    (made.folder / "notes.txt").write_text("mine")
    (made.folder / "checkpoint-8").mkdir()
    before = {path.name for path in made.folder.iterdir()}
    with pytest.raises(ValueError, match=r"holds more than a model \(checkpoint-8, notes.txt\)"):
        make(from_model=str(teacher), layers=3, output_dir=made.folder, overwrite=True)
    assert {path.name for path in made.folder.iterdir()} == before


def test_an_empty_folder_is_taken(teacher, tmp_path):
    (tmp_path / "student").mkdir()
    assert make(from_model=str(teacher), layers=2, output_dir=tmp_path / "student").num_layers == 2


def test_overwrite_replaces_a_model_and_leaves_nothing_of_it(teacher, tmp_path):
    make(from_model=str(teacher), layers=2, output_dir=tmp_path / "student")
    make(from_model=str(teacher), layers=3, output_dir=tmp_path / "student", overwrite=True)
    assert load_model(tmp_path / "student").config.num_hidden_layers == 3
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_student_never_replaces_its_source(overwrite, teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "teacher")
    with pytest.raises(ValueError, match="is where the student would be made from"):
        make(
            from_model=str(tmp_path / "teacher"),
            layers=2,
            output_dir=tmp_path / "teacher",
            overwrite=overwrite,
        )


@pytest.mark.parametrize("stopped", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_stopped_command_leaves_the_old_student_and_nothing_else(stopped, teacher, tmp_path, monkeypatch):
    make(from_model=str(teacher), layers=2, output_dir=tmp_path / "student")
    before = contents(tmp_path / "student")

    def stop(*args):
        raise stopped

    monkeypatch.setattr(new_student, "save_tokenizer", stop)
    with pytest.raises(type(stopped)):
        make(from_model=str(teacher), layers=3, output_dir=tmp_path / "student", overwrite=True)
    with pytest.raises(type(stopped)):
        make(from_model=str(teacher), layers=3, output_dir=tmp_path / "another")
    assert contents(tmp_path / "student") == before
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_student_that_cannot_be_moved_to_its_place_leaves_the_old_one_there(teacher, tmp_path, monkeypatch):
    make(from_model=str(teacher), layers=2, output_dir=tmp_path / "student")
    before, rename = contents(tmp_path / "student"), Path.rename

    def refuse_the_new_one(self: Path, target: Path) -> Path:
        if (self / "config.json").is_file() and not target.name.endswith("-replaced") and "replaced" not in self.name:
            raise OSError(30, "Read-only file system")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new_one)
    with pytest.raises(OSError, match="Read-only"):
        make(from_model=str(teacher), layers=3, output_dir=tmp_path / "student", overwrite=True)
    assert contents(tmp_path / "student") == before
    assert [path.name for path in tmp_path.iterdir()] == ["student"]

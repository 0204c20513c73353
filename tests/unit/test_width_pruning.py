"""A narrower model computes what its source computes without what was left out, and what is left out weighs least."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from distilllens.config import NewStudentConfig
from distilllens.models import load_model
from distilllens.new_student import run_new_student
from distilllens.width_pruning import Width, check_width, prune_width, width_of

TOKENS = torch.arange(3, 43)[None]
HEAD, HEADS, GROUPS, COLUMNS, HIDDEN = 8, 4, 2, 64, 32


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def with_biases(model):
    """Biases and gains that are not 0 and 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def columns_of(places: list[int], size: int = 1) -> Tensor:
    return (torch.tensor(places, dtype=torch.long)[:, None] * size + torch.arange(size)).flatten()


ALL_OF = {"llama": {}, "qwen2": {}, "qwen3": {"head_dim": HEAD, "attention_bias": True}, "mistral": {}, "gpt2": {}}


@pytest.mark.parametrize("architecture", ALL_OF)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_its_own_width_is_the_model(architecture: str, tied: bool, tiny_model) -> None:
    model = with_biases(tiny_model(architecture, tied=tied, **ALL_OF[architecture]))
    model.generation_config.update(do_sample=True, temperature=0.3)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    same = prune_width(model, width_of(model.config))
    assert torch.equal(torch.rand(3), expected)  # nobody's random state moves
    assert torch.equal(logits(same), logits(model))
    assert same.generation_config.temperature == 0.3
    assert (same.get_output_embeddings().weight is same.get_input_embeddings().weight) is tied


@given(data=st.data())
@settings(max_examples=6, deadline=None)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_what_writes_nothing_goes_first_and_the_rest_computes_the_same(architecture: str, data, tiny_model) -> None:
    """Heads, groups and columns that write nothing, in each layer others."""
    model = with_biases(tiny_model(architecture, num_layers=2, **ALL_OF[architecture]))
    num_columns = data.draw(st.integers(1, COLUMNS))
    in_group = data.draw(st.integers(1, HEADS // GROUPS))
    num_groups = data.draw(st.integers(1, GROUPS))
    for layer in model.model.layers:
        dead_columns = data.draw(st.permutations(range(COLUMNS)))[num_columns:]
        dead_groups = data.draw(st.permutations(range(GROUPS)))[num_groups:]
        dead_heads = [
            2 * group + head
            for group in range(GROUPS)
            for head in (range(2) if group in dead_groups else data.draw(st.permutations(range(2)))[in_group:])
        ]
        with torch.no_grad():
            layer.mlp.down_proj.weight[:, columns_of(dead_columns)] = 0
            layer.self_attn.o_proj.weight[:, columns_of(dead_heads, HEAD)] = 0
    asked = Width(
        num_attention_heads=in_group * num_groups, num_key_value_heads=num_groups, intermediate_size=num_columns
    )
    pruned = prune_width(model, asked)
    assert width_of(pruned.config) == Width(HIDDEN, in_group * num_groups, num_groups, num_columns)
    torch.testing.assert_close(logits(pruned), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_loses_the_heads_columns_and_channels_that_nothing_is_written_to(tied: bool, tiny_model) -> None:
    model = with_biases(tiny_model("gpt2", tied=tied))
    dead = columns_of([1, 5, 6, 20, 21, 22, 23, 31])
    mean = torch.ones(HIDDEN)
    mean[dead] = 0
    with torch.no_grad():
        for number, block in enumerate(model.transformer.h):
            block.attn.c_proj.weight[columns_of([number], HEAD)] = 0  # rows are inputs here
            block.mlp.c_proj.weight[columns_of(range(number, 128, 4))] = 0
            for part in (block.attn.c_proj, block.mlp.c_proj):
                part.weight[:, dead] = 0
                part.bias[dead] = 0
        for table in (model.transformer.wte, model.transformer.wpe):
            table.weight[:, dead] = 0
    pruned = prune_width(model, Width(hidden_size=24, num_attention_heads=3, intermediate_size=96))
    assert (pruned.config.n_embd, pruned.config.n_head, pruned.config.n_inner) == (24, 3, 96)
    kept = [place for place in range(HIDDEN) if place not in dead]
    assert torch.equal(pruned.transformer.wte.weight, model.transformer.wte.weight[:, kept])
    for number, (narrow, wide) in enumerate(zip(pruned.transformer.h, model.transformer.h, strict=True)):
        heads = columns_of([head for head in range(HEADS) if head != number], HEAD)
        qkv = torch.cat([heads, heads + HIDDEN, heads + 2 * HIDDEN])
        assert torch.equal(narrow.attn.c_attn.weight, wide.attn.c_attn.weight[kept][:, qkv])
        assert torch.equal(narrow.attn.c_attn.bias, wide.attn.c_attn.bias[qkv])
        assert torch.equal(narrow.attn.c_proj.weight, wide.attn.c_proj.weight[heads][:, kept])
        columns = [column for column in range(128) if column % 4 != number]
        assert torch.equal(narrow.mlp.c_fc.weight, wide.mlp.c_fc.weight[kept][:, columns])
        assert torch.equal(narrow.mlp.c_proj.weight, wide.mlp.c_proj.weight[columns][:, kept])
    assert torch.isfinite(logits(pruned)).all()


def test_gpt2_loses_the_channels_that_its_norms_shut_out(tiny_model) -> None:
    model, dead = with_biases(tiny_model("gpt2")), columns_of([0, 3, 4, 16, 17, 18, 30, 31])
    with torch.no_grad():
        for part in [model.transformer.ln_f, *(getattr(b, n) for b in model.transformer.h for n in ("ln_1", "ln_2"))]:
            part.weight[dead] = 0
    pruned = prune_width(model, Width(hidden_size=24, num_attention_heads=3))
    kept = [place for place in range(HIDDEN) if place not in dead]
    assert torch.equal(pruned.transformer.wte.weight, model.transformer.wte.weight[:, kept])


@pytest.mark.parametrize("how", ["written", "read", "gain"])
def test_channels_that_are_not_used_go_first_and_the_rest_computes_the_same(how: str, tiny_model) -> None:
    """A norm over fewer channels of the same energy divides by more: its gain makes up for it."""
    model, dead = with_biases(tiny_model("llama")), columns_of([0, 3, 4, 16, 17, 18, 30, 31])
    stays = torch.ones(HIDDEN)
    stays[dead] = 0
    blocks = model.model.layers
    with torch.no_grad():
        if how == "written":
            model.model.embed_tokens.weight *= stays
            for block in blocks:
                block.self_attn.o_proj.weight *= stays[:, None]
                block.mlp.down_proj.weight *= stays[:, None]
        elif how == "gain":
            for part in [model.model.norm, *(getattr(b, n) for b in blocks for n in NORMS)]:
                part.weight *= stays
        else:
            model.lm_head.weight *= stays
            for block in blocks:
                for part in (*(getattr(block.self_attn, f"{one}_proj") for one in "qkv"), block.mlp.gate_proj):
                    part.weight *= stays
                block.mlp.up_proj.weight *= stays
    pruned = prune_width(model, Width(hidden_size=HIDDEN - len(dead)))
    kept = [place for place in range(HIDDEN) if place not in dead]
    assert torch.equal(pruned.model.embed_tokens.weight, model.model.embed_tokens.weight[:, kept])
    assert pruned.config.head_dim == HEAD
    if how == "written":
        with torch.no_grad():
            for part in [pruned.model.norm, *(getattr(b, n) for b in pruned.model.layers for n in NORMS)]:
                part.weight *= (HIDDEN / len(kept)) ** 0.5
        torch.testing.assert_close(logits(pruned), logits(model), atol=1e-3, rtol=1e-3)


NORMS = ("input_layernorm", "post_attention_layernorm")


@pytest.mark.parametrize(
    ("architecture", "asked", "sentence"),
    [
        ("llama", {"hidden_size": 33}, "--hidden-size 33: the model has 32"),
        ("llama", {"intermediate_size": 65}, "--intermediate-size 65: the model has 64"),
        ("llama", {"num_key_value_heads": 3}, "--num-key-value-heads 3: the model has 2"),
        ("llama", {"num_attention_heads": 3}, "3 attention heads cannot share 2 key and value heads"),
        ("llama", {"num_attention_heads": 3, "num_key_value_heads": 1}, "a whole ratio of at most 2"),
        ("llama", {"hidden_size": 26}, "26 is no multiple of 4 attention heads"),
        ("gpt2", {"hidden_size": 20}, "give --hidden-size 32 with 4 heads"),
        ("gpt2", {"num_attention_heads": 3}, "give --hidden-size 24 with 3 heads"),
        ("gemma2", {"hidden_size": 8}, "type gemma2 can't be pruned in width, only llama, mistral, qwen2, qwen3, gpt2"),
    ],
)
def test_sizes_that_cannot_be_are_refused(architecture: str, asked: dict, sentence: str, tiny_model) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_width(Width(**asked), tiny_model(architecture).config)


def test_groups_keep_their_heads_and_heads_their_groups_where_only_one_is_named(tiny_model) -> None:
    config = tiny_model("llama").config
    assert check_width(Width(num_key_value_heads=1), config).num_attention_heads == 2
    assert check_width(Width(num_attention_heads=2), config).num_key_value_heads == 2


def test_the_command_prunes_depth_and_width_at_once(tiny_model_folder, tmp_path) -> None:
    teacher = tiny_model_folder("llama", tied=True, num_layers=6)
    sizes = {"hidden_size": 24, "num_key_value_heads": 1, "intermediate_size": 40}
    made = run_new_student(
        NewStudentConfig(from_model=str(teacher), layers=3, output_dir=tmp_path / "student", **sizes)
    )
    student = AutoModelForCausalLM.from_pretrained(made.folder).eval()
    assert width_of(student.config) == Width(24, 2, 1, 40)
    assert student.config.num_hidden_layers == 3
    assert "3 of the 6 layers" in str(made)
    assert "(1, 4, 6), hidden size 24, num key value heads 1, intermediate size 40, " in str(made)
    assert torch.isfinite(logits(student)).all()
    source = load_model(teacher)
    narrow = run_new_student(
        NewStudentConfig(from_model=str(teacher), intermediate_size=10, output_dir=tmp_path / "narrow")
    )
    assert narrow.num_layers == 6
    assert torch.equal(load_model(narrow.folder).model.embed_tokens.weight, source.model.embed_tokens.weight)
    with pytest.raises(ValueError, match="--intermediate-size prunes a model, --config has sizes of its own"):
        run_new_student(
            NewStudentConfig(
                config_file=teacher / "config.json",
                tokenizer=str(teacher),
                intermediate_size=10,
                output_dir=tmp_path / "x",
            )
        )

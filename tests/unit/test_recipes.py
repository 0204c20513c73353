"""The recipes are what their commands accept, fit together, and are the paper's."""

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from distilllens.cli import cli
from distilllens.config import CacheTeacherConfig, TrainConfig, load_config
from distilllens.layer_maps import PRESETS, parse_pairs
from distilllens.recipes import SHIPPED, STEPS, about, check_recipe, commands, recipe_names, steps_of

PAPER = {
    "gpt2-120m": ("gpt2-12-48", 2e-4, 20, 16, None),
    "gpt2-340m": ("gpt2-24-48", 5e-5, 20, 16, None),
    "tinyllama": ("tinyllama-22-32", 5e-6, 10, 4, None),
    "qwen2.5-1.5b": ("qwen2.5-28-36", 1e-4, 10, 4, 8),
}
"""Preset of the layers, learning rate, epochs, examples a step and LoRA rank of the released runs."""


HUB = {
    "gpt2-120m": ("MiniLLM/teacher-gpt2-1.5B", "openai-community/gpt2"),
    "gpt2-340m": ("MiniLLM/teacher-gpt2-1.5B", "openai-community/gpt2-medium"),
    "tinyllama": ("MiniLLM/SFT-Llama-7B", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"),
    "qwen2.5-1.5b": ("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-1.5B"),
}
"""Teachers and students of the released runs."""
MARKED_TEACHER = " Qwen/Qwen2.5-3B  # ours: not fine-tuned"
OURS = {
    "batch_size", "cache", "dataset", "dtype", "gradient_accumulation_steps", "input_column", "method", "model",
    "output_column", "output_dir", "per_device_train_batch_size", "split", "store_tail",
}  # fmt: skip
"""Settings of the paper's recipes that are not the released scripts', or are called otherwise there."""


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(cli, ["recipes", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_every_folder_is_a_recipe_with_files_of_known_names() -> None:
    assert {path.name for path in SHIPPED.iterdir()} == set(recipe_names()) == {*PAPER, "smollm2"}
    for name in recipe_names():
        assert {path.name for path in (SHIPPED / name).iterdir()} <= {step.file for step in STEPS}


@pytest.mark.parametrize("name", recipe_names())
def test_every_file_is_accepted_by_its_command_alone(name: str) -> None:
    check_recipe(SHIPPED / name)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_have_its_layers_and_hyper_parameters(name: str) -> None:
    preset, rate, epochs, examples, rank = PAPER[name]
    cache = load_config(CacheTeacherConfig, file=SHIPPED / name / "cache.yaml", flags={})
    train = load_config(TrainConfig, file=SHIPPED / name / "train.yaml", flags={})
    assert cache.layers == preset
    assert parse_pairs(train.pairs or "") == PRESETS[preset].pairs
    assert cache.lens_norm == "none"
    assert (train.learning_rate, train.num_train_epochs, train.lora_r) == (rate, epochs, rank)
    assert train.per_device_train_batch_size * train.gradient_accumulation_steps == examples
    assert (train.method, train.task, train.lens_divergence) == ("distilllens", "rkl", "jsd")
    assert (train.kd_ratio, train.lens_weight, train.weight_decay, train.max_grad_norm) == (1.0, 1.0, 0.01, 1.0)
    assert (cache.max_length, cache.max_prompt_length, cache.template) == (512, 256, "alpaca")
    assert (train.min_learning_rate, train.lr_scheduler_type, train.warmup_steps) == (1e-7, "cosine", 0)
    assert (train.seed, train.bf16, train.gradient_checkpointing) == (10, True, not name.startswith("gpt2"))
    assert (cache.teacher, cache.tokenizer) == HUB[name] == (cache.teacher, train.student)
    if rank:
        assert (train.lora_alpha, train.lora_dropout) == (32, 0.1)


@pytest.mark.parametrize("name", PAPER)
def test_what_is_not_the_papers_is_marked_as_ours(name: str) -> None:
    for step in steps_of(SHIPPED / name):
        for line in (SHIPPED / name / step.file).read_text().splitlines():
            key, _, value = line.partition(":")
            marked = "# ours" in value
            assert line.startswith("#") or marked == (key in OURS) or (key, value) == ("teacher", MARKED_TEACHER), line


def test_the_list_has_a_line_about_each() -> None:
    lines = invoke("list").splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(about(SHIPPED / name) in line for name, line in zip(recipe_names(), lines, strict=True))
    assert about(SHIPPED / "gpt2-120m") == "GPT-2 XL (1.5B, 48 layers) to GPT-2 (120M, 12 layers)."


def test_a_recipe_is_shown_whole_with_the_commands_that_run_it() -> None:
    shown = invoke("show", "smollm2")
    for step in steps_of(SHIPPED / "smollm2"):
        assert (SHIPPED / "smollm2" / step.file).read_text() in shown
    assert "distilllens new-student --run smollm2-recipe/teacher.yaml" in shown
    assert "distilllens train --config smollm2-recipe/train.yaml" in shown


def test_a_copy_is_checked_and_never_replaces_anything(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    assert invoke("copy", "gpt2-120m", folder).splitlines() == commands(folder)
    assert invoke("check", folder) == f"{folder}: ok\n"
    (folder / "train.yaml").write_text("mine")
    with pytest.raises(ValueError, match=r"already has a cache\.yaml: give another folder"):
        invoke("copy", "gpt2-120m", folder)
    assert (folder / "train.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("train.yaml", {"lerning_rate": 1}, r"train\.yaml has 1 mistake:\n  lerning_rate"),
        ("train.yaml", {"pairs": "2:9"}, r"train\.yaml pairs 2:9, and cache\.yaml keeps layers 8, 16, 24, 32, 40"),
        ("train.yaml", {"pairs": "2:8=0.5"}, r"the shares sum to 0\.5, not 1"),
        ("train.yaml", {"method": "kd"}, r"--task rkl is not --method kd"),
        ("train.yaml", {"cache": "other"}, r"train\.yaml reads other and cache\.yaml writes gpt2-120m/cache"),
        ("cache.yaml", {"layers": "8,16"}, r"pairs 6:24, and cache\.yaml keeps layers 8, 16"),
        ("evaluate.yaml", {"model": "other"}, r"evaluate\.yaml measures other, not gpt2-120m/run"),
        ("evaluate.yaml", None, r"is no recipe: it has no evaluate\.yaml"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_in_a_sentence(tmp_path: Path, file: str, change, sentence: str) -> None:
    invoke("copy", "gpt2-120m", tmp_path / "mine")
    path = tmp_path / "mine" / file
    if change is None:
        path.unlink()
    else:
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    with pytest.raises(ValueError, match=sentence):
        invoke("check", tmp_path / "mine")


def test_an_unknown_recipe_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"gpt3 is neither a recipe .*gpt2-120m.* nor a folder"):
        invoke("show", "gpt3")


def test_a_dry_run_prints_the_resolved_config_and_opens_nothing(tmp_path: Path) -> None:
    arguments = ["train", "--config", str(SHIPPED / "qwen2.5-1.5b" / "train.yaml"), "--max-steps", "7", "--dry-run"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    (tmp_path / "resolved.yaml").write_text(result.output)
    config = load_config(TrainConfig, file=tmp_path / "resolved.yaml", flags={})
    assert (config.max_steps, config.lora_r, config.dry_run, config.learning_rate) == (7, 8, False, 1e-4)
    with pytest.raises(ValueError, match="lens_weight"):
        CliRunner().invoke(cli, [*arguments, "--lens-weight", "-1"], catch_exceptions=False)

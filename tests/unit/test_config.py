"""A run is one YAML file under flags: both give one config, and mistakes are named by key."""

from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from distilllens.cli import cli
from distilllens.config import (
    CacheTeacherConfig,
    DemoConfig,
    EvaluateConfig,
    NewStudentConfig,
    RunConfig,
    TrainConfig,
    load_config,
    save_config,
)
from distilllens.options import run_options

COMMANDS: dict[str, type[RunConfig]] = {
    "cache-teacher": CacheTeacherConfig,
    "new-student": NewStudentConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "demo": DemoConfig,
}


def parse(arguments: list[str], model: type[RunConfig] = TrainConfig) -> RunConfig:
    seen = []
    command = click.command()(run_options(model)(seen.append))
    command.main(arguments, standalone_mode=False)
    return seen[0]


@pytest.mark.parametrize(("name", "model"), COMMANDS.items())
def test_every_key_is_a_flag_with_a_help_text(name: str, model: type[RunConfig]) -> None:
    command = cli.commands[name]
    by_field = {option.name: option for option in command.params}
    assert set(model.model_fields) <= set(by_field)
    for field in model.model_fields:
        assert by_field[field].help or by_field[field].hidden, field


@pytest.mark.parametrize("name", [*COMMANDS, "env"])
def test_help_ends_with_examples(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    assert f"distilllens {name}" in result.output
    assert result.output.index("Options:") < result.output.index("Examples:")


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("student: s\ncache: c\noutput-dir: o\nlearning_rate: 1.0e-3\nseed: 7\npairs: 1:2\n")
    config = parse(["--config", str(file), "--seed", "8", "--pairs", "1:2,2:4"])
    assert isinstance(config, TrainConfig)
    assert (config.learning_rate, config.seed, config.pairs, config.num_train_epochs) == (1e-3, 8, "1:2,2:4", 3.0)


def test_lists_in_yaml_and_commas_on_the_command_line_are_one(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: [a, b]\nseeds: [1, 2]\ncache: c\noutput_dir: o\n")
    from_file = parse(["--config", str(file)], EvaluateConfig)
    flags = ["--model", "a", "--model", "b", "--seeds", "1,2", "--cache", "c", "--output-dir", "o"]
    assert from_file == parse(flags, EvaluateConfig) == parse(["--model", "a,b", *flags[4:]], EvaluateConfig)
    file.write_text("teacher: t\ndataset: d\noutput_dir: o\nlayers: [4, 8]\ntop_k: {final: 8, lens: 4}\n")
    config = parse(["--config", str(file)], CacheTeacherConfig)
    assert isinstance(config, CacheTeacherConfig)
    assert (config.layers, config.top_k) == ("4,8", "final=8,lens=4")


TEACHER = ["--teacher", "t", "--dataset", "d", "--output-dir", "o"]


def test_max_k_is_another_name_of_top_k_and_two_different_values_are_refused(tmp_path: Path) -> None:
    wanted = parse([*TEACHER, "--top-k", "final=8,lens=4"], CacheTeacherConfig)
    assert parse([*TEACHER, "--max-k", "final=8,lens=4"], CacheTeacherConfig) == wanted
    file = tmp_path / "run.yaml"
    file.write_text("teacher: t\ndataset: d\noutput_dir: o\nmax-k: {final: 8, lens: 4}\n")
    assert parse(["--config", str(file)], CacheTeacherConfig) == wanted
    both = parse([*TEACHER, "--max-k", "8", "--top-k", "8"], CacheTeacherConfig)
    assert isinstance(both, CacheTeacherConfig)
    assert both.top_k == "8"
    with pytest.raises(ValueError, match="the command line has top_k 8 and max_k 9, which are two names"):
        parse([*TEACHER, "--max-k", "9", "--top-k", "8"], CacheTeacherConfig)
    for flag in ("--max-k", "--top-k"):
        config = parse(["--config", str(file), flag, "9"], CacheTeacherConfig)
        assert isinstance(config, CacheTeacherConfig)
        assert config.top_k == "9"
    file.write_text("teacher: t\ndataset: d\noutput_dir: o\nmax_k: 9\ntop_k: 8\n")
    with pytest.raises(ValueError, match=r"run\.yaml has top_k 8 and max_k 9"):
        parse(["--config", str(file)], CacheTeacherConfig)


def test_a_single_pair_and_a_bare_on_are_texts_and_numbers_and_truths_are_not(tmp_path: Path) -> None:
    """YAML 1.1 reads the pair as 128 and the word as true."""
    file = tmp_path / "run.yaml"
    file.write_text("student: s\ncache: c\noutput_dir: o\npairs: 2:8\nlens_head_grad: on\nseed: 7\nbf16: true\n")
    config = parse(["--config", str(file)])
    assert isinstance(config, TrainConfig)
    assert (config.pairs, config.lens_head_grad, config.seed, config.bf16) == ("2:8", "on", 7, True)
    save_config(config, file)
    assert parse(["--config", str(file)]) == config


def test_every_mistake_is_named_by_its_key(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("cache: c\nlerning_rate: 1\nkd_ratio: 2\n")
    with pytest.raises(ValueError, match=r"run\.yaml has 4 mistakes") as error:
        load_config(TrainConfig, file=file, flags={})
    for sentence in ("lerning_rate: Extra inputs", "kd_ratio: Input should be less", "student: is required"):
        assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"student": "s", "output_dir": "o"}, "trains from a teacher cache: give --cache"),
        ({"student": "s", "output_dir": "o", "method": "sft"}, "give one of --dataset and --cache"),
        ({"student": "s", "output_dir": "o", "cache": "c", "dataset": "d"}, "drop --dataset"),
    ],
)
def test_a_method_without_its_data_is_refused(flags: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_config(TrainConfig, file=None, flags=flags)
    assert str(error.value).splitlines()[1].startswith("  --")  # no key is to blame alone


@pytest.mark.parametrize(
    ("text", "meaning"), [("jsd", "jsd"), ("jsd:0.5", "jsd"), ("jsd:0.3", "jsd:0.3"), ("ab:0.5,0.6", "ab:0.5,0.6")]
)
def test_divergences_are_written_by_name_and_parameters(text: str, meaning: str) -> None:
    base = ["--student", "s", "--cache", "c", "--output-dir", "o"]
    assert parse([*base, "--lens-divergence", text]).lens_divergence == meaning  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["kl", "jsd:1.5", "jsd:0.1,0.2", "fkl:1", "ab:0.2", "akl:x"])
def test_a_divergence_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="task"):
        parse(["--student", "s", "--cache", "c", "--output-dir", "o", "--task", text])


def test_a_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = TrainConfig(student="s", cache=Path("c"), output_dir=Path("o"), pairs="1:2", save_total_limit=3)
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(TrainConfig, file=tmp_path / "resolved.yaml", flags={}) == config
    assert "teacher" not in yaml.safe_load((tmp_path / "resolved.yaml").read_text())


def test_a_bare_resume_flag_means_the_latest_checkpoint() -> None:
    base = ["--student", "s", "--cache", "c", "--output-dir", "o"]
    assert parse([*base, "--resume-from-checkpoint"]).resume_from_checkpoint == "latest"  # type: ignore[attr-defined]
    assert parse([*base, "--resume-from-checkpoint", "x"]).resume_from_checkpoint == "x"  # type: ignore[attr-defined]

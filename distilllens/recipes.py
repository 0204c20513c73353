"""command: the recipes that are shipped, each a folder with one YAML file per command."""

import shlex
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import click

from distilllens.config import CacheTeacherConfig, EvaluateConfig, NewStudentConfig, RunConfig, TrainConfig, load_config
from distilllens.layer_maps import PRESETS, parse_pairs

SHIPPED = Path(str(files("distilllens"))) / "recipes"


@dataclass(frozen=True)
class Step:
    """One file of a recipe, and the command that runs it."""

    file: str
    command: str
    config: type[RunConfig]
    is_required: bool = True


STEPS = (
    Step("teacher.yaml", "new-student --run", NewStudentConfig, is_required=False),
    Step("student.yaml", "new-student --run", NewStudentConfig, is_required=False),
    Step("cache.yaml", "cache-teacher --config", CacheTeacherConfig),
    Step("train.yaml", "train --config", TrainConfig),
    Step("evaluate.yaml", "evaluate --config", EvaluateConfig),
)
"""In the order in which they are run."""


def recipe_names() -> list[str]:
    """The recipes that are shipped."""
    return sorted(path.name for path in SHIPPED.iterdir() if (path / "train.yaml").is_file())


def recipe_folder(name: str) -> Path:
    """The folder of a shipped recipe, or of the user's own. ValueError for neither."""
    if name in recipe_names():
        return SHIPPED / name
    if Path(name).is_dir():
        return Path(name)
    raise ValueError(f"{name} is neither a recipe ({', '.join(recipe_names())}) nor a folder with one")


def about(folder: Path) -> str:
    """What a recipe is for: the first line of its train.yaml."""
    return (folder / "train.yaml").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def commands(folder: Path) -> list[str]:
    """What a user types to run a recipe that lies in ``folder``."""
    return [f"distilllens {step.command} {shlex.quote(str(folder / step.file))}" for step in steps_of(folder)]


def steps_of(folder: Path) -> list[Step]:
    """The steps that a recipe has. ValueError where one is missing."""
    if missing := [step.file for step in STEPS if step.is_required and not (folder / step.file).is_file()]:
        raise ValueError(f"{folder} is no recipe: it has no {missing[0]}")
    return [step for step in STEPS if (folder / step.file).is_file()]


def check_recipe(folder: Path) -> None:
    """Raise ValueError for a file that its command would refuse, or for files that don't fit together.

    Reads the configs alone: no model, dataset or cache.
    """
    configs = {step.file: load_config(step.config, file=folder / step.file, flags={}) for step in steps_of(folder)}
    cache, train, evaluate = (configs[name] for name in ("cache.yaml", "train.yaml", "evaluate.yaml"))
    assert isinstance(cache, CacheTeacherConfig)
    assert isinstance(train, TrainConfig)
    assert isinstance(evaluate, EvaluateConfig)
    if train.cache != (str(cache.output_dir),):
        raise ValueError(
            f"{folder}: train.yaml reads {', '.join(train.cache)} and cache.yaml writes {cache.output_dir}"
        )
    if str(train.output_dir) not in evaluate.model:
        raise ValueError(f"{folder}: evaluate.yaml measures {', '.join(evaluate.model)}, not {train.output_dir}")
    stored = cached_layers(cache.layers)
    if train.pairs is None or stored is None:
        return
    for student, teacher in parse_pairs(train.pairs):
        if teacher not in stored:
            listed = ", ".join(map(str, sorted(stored)))
            raise ValueError(f"{folder}: train.yaml pairs {student}:{teacher}, and cache.yaml keeps layers {listed}")


def cached_layers(text: str) -> set[int] | None:
    """The lens layers that ``--layers`` lists or presets; None where they depend on the teacher."""
    if text in PRESETS:
        return {teacher for _, teacher in PRESETS[text].pairs}
    parts = text.split(",")
    return {int(part) for part in parts} if all(part.strip().isdecimal() for part in parts) else None


@click.group()
def recipes() -> None:
    """List, show, copy and check the recipes that are shipped: the paper's runs, and a small one.

    \b
    Examples:
      distilllens recipes list
      distilllens recipes copy gpt2-120m my-recipe/
      distilllens recipes check my-recipe/
    """


@recipes.command("list")
def list_() -> None:
    """Print every recipe with a line about it.

    \b
    Examples:
      distilllens recipes list
    """
    width = max(map(len, recipe_names()))
    for name in recipe_names():
        click.echo(f"{name:<{width}}  {about(SHIPPED / name)}")


@recipes.command()
@click.argument("name")
def show(name: str) -> None:
    """Print the files of recipe NAME and the commands that run them.

    \b
    Examples:
      distilllens recipes show smollm2
    """
    folder = recipe_folder(name)
    for step in steps_of(folder):
        click.echo(f"# {step.file}\n{(folder / step.file).read_text(encoding='utf-8')}")
    click.echo("\n".join(["# To run it:", f"distilllens recipes copy {name} {name}-recipe"]))
    click.echo("\n".join(line.replace(str(folder), f"{name}-recipe") for line in commands(folder)))


@recipes.command()
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
def copy(name: str, folder: Path) -> None:
    """Copy recipe NAME to FOLDER, to be changed; nothing that is there is replaced.

    \b
    Examples:
      distilllens recipes copy smollm2 my-recipe/
    """
    source = recipe_folder(name)
    steps = steps_of(source)
    if taken := [step.file for step in steps if (folder / step.file).exists()]:
        raise ValueError(f"{folder} already has a {taken[0]}: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        (folder / step.file).write_bytes((source / step.file).read_bytes())
    click.echo("\n".join(commands(folder)))


@recipes.command()
@click.argument("names", nargs=-1)
def check(names: tuple[str, ...]) -> None:
    """Check the configs of recipes (NAMES or folders; all when none is given) without opening a model.

    \b
    Examples:
      distilllens recipes check
      distilllens recipes check my-recipe/
    """
    for name in names or recipe_names():
        check_recipe(recipe_folder(name))
        click.echo(f"{name}: ok")

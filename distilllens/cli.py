"""The commands one types: thin, with heavy imports inside each command."""

import json
import signal
import sys
from inspect import cleandoc
from typing import Any

import click

from distilllens import __version__
from distilllens.config import (
    CacheTeacherConfig,
    DemoConfig,
    EvaluateConfig,
    NewStudentConfig,
    TrainConfig,
    config_text,
)
from distilllens.free_space import NoSpaceError
from distilllens.options import run_options
from distilllens.recipes import recipes
from distilllens_inspect.commands import CHECK_FAILED, inspect

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM, with the state saved."""


@click.group(context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="distilllens")
# The deepspeed launcher writes this before the command; the variable LOCAL_RANK says the same.
@click.option("--local_rank", "--local-rank", hidden=True, expose_value=False)
def cli() -> None:
    """Distil a large language model into a small one, offline.

    A first pass writes what the teacher thinks, layer by layer, into a cache; students then train from the cache
    alone.

    \b
    Examples:
      distilllens demo
      distilllens cache-teacher --teacher big/ --dataset rows.jsonl --output-dir cache/
      distilllens new-student --from big/ --layers 10 --output-dir student/
      distilllens train --student student/ --cache cache/ --output-dir run/
      distilllens inspect summary cache/
    """


@cli.command()
@run_options(CacheTeacherConfig)
def cache_teacher(config: CacheTeacherConfig) -> None:
    """Run the teacher once over a dataset and write its targets to a cache.

    \b
    Examples:
      distilllens cache-teacher --teacher big/ --dataset rows.jsonl --output-dir cache/
      distilllens cache-teacher --teacher big/ --dataset rows.jsonl --layers 8,16,24 \\
          --top-k final=64,lens=32 --output-dir cache/ --dry-run
      distilllens cache-teacher --config cache.yaml --limit 1000
      distilllens cache-teacher --config cache.yaml --repair
      torchrun --nproc-per-node 4 -m distilllens cache-teacher --config cache.yaml
      distilllens cache-teacher --teacher big/ --dataset rows.jsonl --output-dir cache/ --append more.jsonl
    """
    from distilllens.cache_teacher import run_cache_teacher
    from distilllens.repair import run_repair

    if config.repair:
        run_repair(config)
    else:
        run_cache_teacher(config)


@cli.command()
@run_options(NewStudentConfig, rename={"from_model": "--from", "config_file": "--config"}, config_flag="--run")
def new_student(config: NewStudentConfig) -> None:
    """Write a smaller model: some layers of a larger one, narrower ones, or fresh weights.

    \b
    Examples:
      distilllens new-student --from big/ --layers 10 --output-dir student/
      distilllens new-student --from big/ --keep 1,4,7,12 --output-dir student/
      distilllens new-student --from big/ --layers 10 --hidden-size 384 --intermediate-size 1024 --output-dir student/
      distilllens new-student --config config.json --tokenizer big/ --output-dir student/
    """
    from distilllens.new_student import run_new_student

    click.echo(run_new_student(config))


@cli.command()
@run_options(TrainConfig)
def train(config: TrainConfig) -> None:
    """Train a student from a teacher cache; the teacher itself is never opened.

    \b
    Examples:
      distilllens train --student student/ --cache cache/ --output-dir run/
      distilllens train --student student/ --cache cache/ --eval-cache valid/ --pairs 2:8,4:16 \\
          --task fkl --learning-rate 2e-4 --output-dir run/ --resume-from-checkpoint
      distilllens train --student student/ --cache chat/ --cache code/ --cache-weights 0.7,0.3 --output-dir run/
      torchrun --nproc-per-node 2 -m distilllens train --config run.yaml
      distilllens train --method sft --student student/ --dataset rows.jsonl --output-dir sft/
      distilllens train --student big/ --cache cache/ --lora-r 8 --lora-merge --output-dir adapter/
      distilllens train --config run.yaml --dry-run
    """
    if config.dry_run:
        click.echo(config_text(config), nl=False)
        return
    from distilllens.train import run_train

    run_train(config)


@cli.command()
@run_options(EvaluateConfig)
def evaluate(config: EvaluateConfig) -> None:
    """Measure models: ROUGE-L of what they write, and how close they are to the teacher in a cache.

    \b
    Examples:
      distilllens evaluate --model run/ --dataset valid.jsonl --output-dir results/
      distilllens evaluate --model student/ --model run/ --dataset valid.jsonl --cache valid-cache/ \\
          --limit 32 --seeds 10 --max-new-tokens 64 --output-dir results/
    """
    from distilllens.evaluate import run_evaluate

    run_evaluate(config)


@cli.command()
@run_options(DemoConfig)
def demo(config: DemoConfig) -> None:
    """Distil a real model on this machine, from teacher pass to evaluation, in about ten minutes.

    \b
    Examples:
      distilllens demo
      distilllens demo --output-dir /tmp/demo --max-steps 50
    """
    from distilllens.demo import run_demo

    run_demo(config)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def env(as_json: bool) -> None:
    """Print versions and hardware, for bug reports.

    \b
    Examples:
      distilllens env
      distilllens env --json
    """
    from distilllens.env import environment, render_environment

    facts = environment()
    click.echo(json.dumps(facts, indent=2) if as_json else render_environment(facts))


cli.add_command(inspect)
cli.add_command(recipes)


def _examples_last(command: click.Command) -> None:
    """Move the examples of a command's help, and of its subcommands', below its options."""
    text, mark, examples = cleandoc(command.help or "").partition("\b\nExamples:")
    if mark:
        command.help, command.epilog = text.rstrip(), mark + examples
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        _examples_last(inner)


_examples_last(cli)


def main(arguments: list[str] | None = None) -> None:
    """Run one command; every error a user can cause is one sentence on stderr and an exit code."""
    sys.exit(_exit_code(arguments))


def _exit_code(arguments: list[str] | None) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = cli.main(args=arguments, prog_name="distilllens", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted. What was finished is saved; the same command continues.", err=True)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        click.echo(f"Error: {error}", err=True)
        return CHECK_FAILED if isinstance(error, NoSpaceError) else 1
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        click.echo(
            "Error: the device's memory is full. Use a smaller batch (--batch-tokens, --per-device-train-batch-size), "
            "--gradient-checkpointing, or a smaller --loss-chunk-rows",
            err=True,
        )
        return 1


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt

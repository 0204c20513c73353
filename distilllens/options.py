"""Every key of a run's config as a click flag of the same name, merged over the YAML file given with --config."""

import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from distilllens.config import APPEND_DATASET
from distilllens.locations import Location
from distilllens.run_config import AnyConfig, RunConfig, load_config

BARE = {"resume_from_checkpoint": ("latest", "[FOLDER]"), "append": (APPEND_DATASET, "[FILE]")}
"""Flags that need no value: what they mean without one, and how help shows them."""


def run_options(
    model: type[AnyConfig], *, rename: dict[str, str] | None = None, config_flag: str = "--config"
) -> Callable[[Callable[[AnyConfig], Any]], Callable[..., Any]]:
    """Decorate a command that takes a ``model``: its fields become flags, ``rename`` maps a field to another flag."""
    names = rename or {}

    def decorate(command: Callable[[AnyConfig], Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_config(config_path: Path | None, **values: Any) -> Any:
            flags = {name: value for name, value in values.items() if value is not None and value != ()}
            return command(load_config(model, file=config_path, flags=flags))

        flagged: Callable[..., Any] = with_config
        for name, field in reversed(_own_first(model)):
            flagged = _option(name, field, names.get(name, f"--{name.replace('_', '-')}"))(flagged)
        for other, name in model.OTHER_NAMES.items():
            flag = f"--{other.replace('_', '-')}"
            flagged = click.option(flag, other, default=None, hidden=True, help=f"Another name of {name}.")(flagged)
        path, text = click.Path(path_type=Path), "YAML file with these keys; flags win."
        return click.option(config_flag, "config_path", type=path, metavar="FILE", help=text)(flagged)

    return decorate


def _own_first(model: type[RunConfig]) -> list[tuple[str, FieldInfo]]:
    """Fields as help shows them: required ones, then the command's own, then those it shares with others."""
    fields = model.model_fields.items()
    return sorted(fields, key=lambda item: (not item[1].is_required(), item[0] not in model.__annotations__))


def _option(name: str, field: FieldInfo, flag: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    kind, choices = _kind(field.annotation)
    help_text = field.description or ""
    if not field.is_required() and field.default not in (None, False, ()):
        default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        help_text = f"{help_text} [{default}]"
    if name in BARE:
        value, metavar = BARE[name]
        return click.option(flag, name, is_flag=False, flag_value=value, default=None, metavar=metavar, help=help_text)
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=help_text)
    if choices:
        return click.option(flag, name, type=click.Choice(choices), default=None, help=help_text)
    if get_args(kind)[:1] == (Location,):
        return click.option(flag, name, multiple=True, metavar="PATH", help=help_text)
    if name == "model":
        return click.option(flag, name, multiple=True, metavar="MODEL", callback=_joined, help=help_text)
    types_by_kind: dict[type, Any] = {int: int, float: float, Path: click.Path(path_type=Path)}
    metavars = {int: "N", float: "X", Path: "PATH"}
    return click.option(
        flag,
        name,
        type=types_by_kind.get(kind, str),
        default=None,
        metavar=metavars.get(kind, name.upper().rpartition("_")[-1]),
        help=help_text,
    )


def _joined(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part for text in value for part in text.split(",") if part)


def _kind(annotation: Any) -> tuple[type, tuple[str, ...]]:
    """The Python type behind an annotation such as ``Annotated[int, ...] | None``, and its choices if it has any."""
    origin = get_origin(annotation)
    if origin is Literal:
        return str, get_args(annotation)
    if origin in (Union, types.UnionType):
        return _kind(next(part for part in get_args(annotation) if part is not type(None)))
    if origin is tuple:
        return (annotation if get_args(annotation)[0] is Location else str), ()
    if origin is not None and hasattr(annotation, "__metadata__"):
        return _kind(get_args(annotation)[0])
    return (annotation, ()) if isinstance(annotation, type) else (str, ())

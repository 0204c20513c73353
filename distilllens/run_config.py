"""What the configs of all runs share: frozen models, their types, one YAML file under flags."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from distilllens.text_file import write_text

RESOLVED = "config.resolved.yaml"
"""File with the settings of a run, beside its output."""


def split_text(value: Any) -> Any:
    """``"1,4,7"`` on a command line and ``[1, 4, 7]`` in a YAML file are the same list."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return (value,) if isinstance(value, int | float) else value


def _text(value: Any) -> Any:
    """``top_k: 64`` and ``layers: [4, 8]`` in YAML are the texts ``"64"`` and ``"4,8"`` of a command line."""
    if isinstance(value, list | tuple):
        return ",".join(str(part) for part in value)
    if isinstance(value, dict):
        return ",".join(f"{key}={part}" for key, part in value.items())
    return str(value) if isinstance(value, int | float) else value


Numbers = Annotated[tuple[float, ...], BeforeValidator(split_text)]
Integers = Annotated[tuple[int, ...], BeforeValidator(split_text)]
Spec = Annotated[str, BeforeValidator(_text)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class RunConfig(BaseModel):
    """What every run shares: frozen, unknown keys refused, the text below a field is the help of its flag."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())
    OTHER_NAMES: ClassVar[dict[str, str]] = {}
    """Further names of keys, in files and as flags -> the key."""


class _CoreLoader(yaml.SafeLoader):
    """Reads numbers and truth values as YAML 1.2 does: in 1.1, PyYAML's, ``pairs: 2:8`` is 128 and ``on`` is true."""


_INT, _BOOL = "tag:yaml.org,2002:int", "tag:yaml.org,2002:bool"
_CoreLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _BOOL)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_CoreLoader.add_implicit_resolver(_INT, re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
_CoreLoader.add_implicit_resolver(_BOOL, re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


def load_config(model: type[AnyConfig], *, file: Path | None, flags: dict[str, Any]) -> AnyConfig:
    """The run that ``file`` (YAML) and ``flags`` describe; flags win.

    Raises ValueError with one line per mistake, named by key.
    """
    values: dict[str, Any] = {}
    if file is not None:
        if not file.is_file():
            raise ValueError(f"{file} is not a file: --config takes a YAML file with the keys of this command")
        try:
            loaded = yaml.load(file.read_text(encoding="utf-8"), _CoreLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not valid YAML: {error}") from None
        if not isinstance(loaded, dict | None):
            raise ValueError(f"{file} holds a {type(loaded).__name__}, not keys with values")
        values = {str(key).replace("-", "_"): value for key, value in (loaded or {}).items()}
        values = _by_first_name(model, values, str(file))
    values |= _by_first_name(model, flags, "the command line")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        source = str(file) if file is not None and not flags else "the command line"
        if file is not None and flags:
            source = f"{file} with the command line"
        raise ValueError(_sentences(error, source)) from None


def _by_first_name(model: type[RunConfig], values: dict[str, Any], source: str) -> dict[str, Any]:
    """Other names of keys replaced by the keys. ValueError where both are given and say different things."""
    found = {name: value for name, value in values.items() if name not in model.OTHER_NAMES}
    for other, name in model.OTHER_NAMES.items():
        if other not in values:
            continue
        if name in found and _text(found[name]) != _text(values[other]):
            raise ValueError(
                f"{source} has {name} {_text(found[name])} and {other} {_text(values[other])}, which are two names of "
                f"one setting: keep one of them"
            )
        found[name] = values[other]
    return found


def _sentences(error: ValidationError, source: str) -> str:
    mistakes = []
    for detail in error.errors():
        name = ".".join(str(part) for part in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "missing":
            message = f"is required: give --{name.replace('_', '-')}"
        # What no single key is to blame for names its flags itself.
        mistakes.append(f"  {name}: {message}" if name else f"  {message}")
    noun = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    return f"{source} has {noun}:\n" + "\n".join(mistakes)


def save_config(config: RunConfig, file: Path) -> None:
    """Write the resolved run as YAML beside its output."""
    write_text(file, config_text(config))


def config_text(config: RunConfig) -> str:
    """The resolved run as YAML; a dry run as the run that it stands for."""
    values = config.model_dump(mode="json")
    if "dry_run" in values:
        values["dry_run"] = False
    return yaml.safe_dump(values, sort_keys=False)

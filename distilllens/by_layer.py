"""Settings that may differ between the final layer and the lens layers: ``64``, or ``final=64,lens=32``."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value")

TAILS = ("bucket", "profile", "sketch", "sampled", "renorm")
"""What can stand for the rest of a target in a loss."""


def split_by_layer(flag: str, text: str) -> tuple[str | None, str | None]:
    """The texts for the final layer and for the lens layers; None where ``text`` says nothing of one."""
    found: dict[str, str] = {}
    for part in text.replace(" ", "").split(","):
        name, equals, value = part.partition("=") if re.match(r"(final|lens)=", part) else ("", "=", part)
        if not value or not equals or name in found:
            raise ValueError(f"{flag} {text!r}: expected one value, or final=...,lens=...")
        found[name] = value
    if len(found) > 2:
        raise ValueError(f"{flag} {text!r}: expected one value, or final=...,lens=...")
    return found.get("final", found.get("")), found.get("lens", found.get(""))


def parse_by_layer(
    flag: str, text: str, layers: tuple[int, ...], convert: Callable[[str], Value], *, default: Value
) -> dict[int, Value]:
    """One value for each of ``layers``, of which the last is the final one. ValueError that names the flag."""
    values: list[Value] = []
    for part in split_by_layer(flag, text):
        try:
            values.append(default if part is None else convert(part))
        except ValueError as error:
            raise ValueError(f"{flag} {text!r}: {error}") from None
    final, lens = values
    return {layer: final if layer == layers[-1] else lens for layer in layers}


@dataclass(frozen=True)
class TailChoice:
    """What stands for the rest at a layer."""

    name: str
    """One of TAILS."""
    rank: int | None = None
    """Of a sketch: how many of its directions are used; all when not given."""

    def __str__(self) -> str:
        return self.name if self.rank is None else f"{self.name}:{self.rank}"


def parse_tail_choices(text: str) -> tuple[TailChoice | None, TailChoice | None]:
    """What ``--tail`` asks for at the final layer and at the lens layers."""

    def choice(part: str | None) -> TailChoice | None:
        if part is None:
            return None
        name, _, rank = part.partition(":")
        if name not in TAILS or (rank and (name != "sketch" or not rank.isdecimal() or int(rank) < 1)):
            raise ValueError(
                f"--tail {text!r}: {part!r} is not a tail; expected {', '.join(TAILS)}, with a rank as in sketch:64"
            )
        return TailChoice(name, int(rank) if rank else None)

    final, lens = split_by_layer("--tail", text)
    return choice(final), choice(lens)


def parse_gate(text: str | None) -> tuple[float, float]:
    """The entropies in nats that ``--entropy-gate`` gives the final layer and the lens layers; infinity for none."""
    final, lens = (None, None) if text is None else split_by_layer("--entropy-gate", text)

    def entropy(part: str | None) -> float:
        try:
            value = math.inf if part is None else float(part)
        except ValueError:
            value = math.nan
        if not value >= 0:
            raise ValueError(f"--entropy-gate {text!r}: expected nats, 0 or more, such as 2.5 or final=2.5,lens=6")
        return value

    return entropy(final), entropy(lens)

"""Which examples, layers and positions a user means, or a sentence with those that there are."""

from collections.abc import Sequence

from distilllens_cache import CachedExample

FIRST_TARGETS = 4
"""Targets shown when none are chosen."""


def check_example(number: int, num_examples: int) -> int:
    """The number of an example of the cache, or a ValueError with the valid range."""
    if not 0 <= number < num_examples:
        raise ValueError(f"there is no example {number}; this cache has {num_examples}, from 0 to {num_examples - 1}.")
    return number


def choose_layers(text: str | None, layers: Sequence[int]) -> list[int]:
    """The layers named in ``4,8``, all of the cache by default, the last first."""
    wanted = list(layers) if text is None else _whole_numbers(text, "--layers", "layers such as 4,8")
    unknown = [layer for layer in wanted if layer not in layers]
    if unknown:
        has = ", ".join(str(layer) for layer in layers)
        raise ValueError(f"the cache has no layer {unknown[0]}; choose --layers among {has}.")
    return sorted(set(wanted), reverse=True)


def choose_positions(text: str | None, example: CachedExample) -> list[int]:
    """The target positions in ``0:8`` (those between, end not included) or ``3,5``; by default the first."""
    positions = example.target_positions.tolist()
    if text is None:
        return positions[:FIRST_TARGETS]
    if not positions:
        raise ValueError(f"example {example.index} has no target position; --positions {text} finds nothing.")
    where = f"example {example.index} has {len(positions)} of them, from {positions[0]} to {positions[-1]}"
    if ":" in text:
        start, _, stop = text.partition(":")
        low = _whole_number(start, "--positions") if start.strip() else 0
        high = _whole_number(stop, "--positions") if stop.strip() else len(example.token_ids)
        chosen = [position for position in positions if low <= position < high]
        if not chosen:
            raise ValueError(f"no target position lies in {text}: {where}.")
        return chosen
    chosen = _whole_numbers(text, "--positions", "positions such as 0:8 or 3,5")
    for position in chosen:
        if position not in positions:
            raise ValueError(f"position {position} is no target position: {where}.")
    return sorted(set(chosen))


def choose_examples(text: str | None, count: int, num_examples: int) -> list[int]:
    """The examples named in ``0,1,2``, in that order, or the first ``count`` of the cache."""
    if text is None:
        return list(range(min(count, num_examples)))
    chosen = _whole_numbers(text, "--examples", "examples such as 0,1,2")
    return [check_example(number, num_examples) for number in dict.fromkeys(chosen)]


def _whole_numbers(text: str, option: str, expected: str) -> list[int]:
    parts = [part for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError(f"{option} is empty; expected are {expected}.")
    return [_whole_number(part, option) for part in parts]


def _whole_number(text: str, option: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"{option} has {text.strip()!r}, which is no whole number from 0.")
    return int(text)

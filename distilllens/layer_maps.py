"""Which layers of the teacher are read, and which student layer is matched with which. Counted from 1."""

import math
from dataclasses import dataclass

Pairs = tuple[tuple[int, int], ...]
"""Layers that are matched: (student, teacher), counted from 1."""
SHARES_TOLERANCE = 0.01
"""How far from 1 shares may sum: thirds are written with few digits."""


@dataclass(frozen=True)
class Preset:
    """Layer pairs of a released run of DistillLens (arXiv 2602.13567)."""

    student_layers: int
    teacher_layers: int
    pairs: tuple[tuple[int, int], ...]


PRESETS = {
    "gpt2-12-48": Preset(12, 48, ((2, 8), (4, 16), (6, 24), (8, 32), (10, 40))),
    "gpt2-24-48": Preset(24, 48, ((4, 8), (8, 16), (12, 24), (16, 32), (20, 40))),
    "tinyllama-22-32": Preset(22, 32, ((4, 5), (7, 10), (11, 16), (15, 21), (18, 26))),
    "qwen2.5-28-36": Preset(28, 36, ((6, 7), (11, 14), (17, 22), (22, 29))),
}
"""The released lists, by name. No one rule gives all four."""


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Lens layers of a teacher with ``num_layers`` layers, ascending, its final layer last.

    ``text`` is ``anchors:n`` (n layers evenly inside), ``stride:n`` (every n-th), a preset's name, or a list
    such as ``4,8,12``.
    """
    name, _, number = text.partition(":")
    if text in PRESETS:
        preset = PRESETS[text]
        if preset.teacher_layers != num_layers:
            raise ValueError(
                f"--layers {text} is for a teacher of {preset.teacher_layers} layers, and this one has "
                f"{num_layers}: choose anchors:5, or list the layers"
            )
        layers = {teacher for _, teacher in preset.pairs}
    elif name in ("anchors", "stride"):
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(f"--layers {text}: expected {name}:N with N at least 1, such as {name}:5")
        n = int(number)
        if n >= num_layers:
            raise ValueError(f"--layers {text}: the teacher has only {num_layers} layers; N must be below that")
        if name == "anchors":
            layers = {_round(i * num_layers / (n + 1)) for i in range(1, n + 1)}
        else:
            layers = set(range(n, num_layers, n))
    else:
        try:
            layers = {int(part) for part in text.split(",") if part.strip()}
        except ValueError:
            raise ValueError(
                f"--layers {text!r} is neither anchors:N, stride:N, a list such as 4,8,12, nor a preset "
                f"({', '.join(PRESETS)})"
            ) from None
        if wrong := sorted(layer for layer in layers if not 1 <= layer <= num_layers):
            raise ValueError(
                f"--layers {text}: layer {wrong[0]} does not exist; the teacher has layers 1 to {num_layers}"
            )
    return tuple(sorted(layers | {num_layers}))


def derive_pairs(
    teacher_layers: tuple[int, ...], *, num_student_layers: int, num_teacher_layers: int
) -> tuple[tuple[int, int], ...]:
    """Pairs (student, teacher) for the lens layers of a cache: student layer round(l * L_S / L_T).

    Student layers lie within 1 and L_S - 1 and occur once; of two teacher layers that fall on one student layer,
    the nearer is kept.
    """
    nearest: dict[int, tuple[float, int]] = {}
    for layer in teacher_layers:
        if layer == num_teacher_layers:
            continue
        exact = layer * num_student_layers / num_teacher_layers
        student = min(max(_round(exact), 1), num_student_layers - 1)
        if student >= 1:
            nearest[student] = min(nearest.get(student, (math.inf, 0)), (abs(exact - student), layer))
    return tuple((student, layer) for student, (_, layer) in sorted(nearest.items()))


def parse_pairs(text: str) -> Pairs:
    """Pairs (student, teacher) from ``"2:8,4:16"`` or ``"2:8=0.3,4:16=0.7"``; ``"none"`` is no pair."""
    return tuple(pair for pair, _ in _weighted_pairs(text))


def parse_shares(text: str) -> tuple[float, ...]:
    """The share of each of ``parse_pairs`` in the lens loss: equal ones where ``text`` gives none."""
    weighted = _weighted_pairs(text)
    given = [share for _, share in weighted if share is not None]
    return tuple(share / sum(given) for share in given) if given else equal_shares(len(weighted))


def equal_shares(num_pairs: int) -> tuple[float, ...]:
    """Shares of a plain mean."""
    return (1 / max(1, num_pairs),) * num_pairs


def _weighted_pairs(text: str) -> list[tuple[tuple[int, int], float | None]]:
    if text.strip() == "none":
        return []
    try:
        weighted = [_weighted_pair(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--pairs {text!r}: expected student:teacher layers such as 2:8,4:16, with shares such as "
            f"2:8=0.3,4:16=0.7, or none"
        ) from None
    if len({student for (student, _), _ in weighted}) < len(weighted):
        raise ValueError(f"--pairs {text}: a student layer occurs twice")
    shares = [share for _, share in weighted if share is not None]
    if shares and len(shares) < len(weighted):
        raise ValueError(f"--pairs {text}: {len(shares)} of {len(weighted)} pairs have a share; give all of them one")
    if not all(share > 0 for share in shares):
        raise ValueError(f"--pairs {text}: a share is not above 0; leave out a pair that should not count")
    if shares and not abs(sum(shares) - 1) <= SHARES_TOLERANCE:
        scaled = ",".join(f"{s}:{t}={share / sum(shares):.3g}" for (s, t), share in weighted if share is not None)
        raise ValueError(
            f"--pairs {text}: the shares sum to {sum(shares):g}, not 1 (--lens-weight scales all of them): give "
            f"{scaled}"
        )
    return weighted


def _weighted_pair(part: str) -> tuple[tuple[int, int], float | None]:
    layers, _, share = part.partition("=")
    student, teacher = layers.split(":")
    return (int(student), int(teacher)), float(share) if "=" in part else None


def check_pairs(
    pairs: tuple[tuple[int, int], ...],
    *,
    num_student_layers: int,
    num_teacher_layers: int,
    cached: tuple[int, ...],
) -> None:
    """Raise ValueError for a pair outside the student, outside the teacher, or without targets in the cache."""
    for student, teacher in pairs:
        if not 1 <= student < num_student_layers:
            raise ValueError(
                f"pair {student}:{teacher}: the student has lens layers 1 to {num_student_layers - 1} "
                f"(layer {num_student_layers} is its final one, which the task matches); choose among those in --pairs"
            )
        if teacher not in cached[:-1]:
            lens = ", ".join(map(str, cached[:-1])) or "none"
            raise ValueError(
                f"pair {student}:{teacher}: the cache has no lens targets of teacher layer {teacher} "
                f"(of {num_teacher_layers}); it holds {lens}. Choose among those, or cache that layer"
            )


def _round(value: float) -> int:
    """Halves go up, as in the released layer lists; Python's round goes to even."""
    return math.floor(value + 0.5)

"""One way to keep a teacher's distribution, as the fidelity bench compares them."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Gradients = Callable[[Tensor, Tensor], dict[str, tuple[Tensor, Tensor]]]
"""The student's logits (n, V), which rows (n) they are -> by loss, values (n) and gradients at the logits (n, V)."""


@dataclass(frozen=True)
class Representation:
    """One way to keep a teacher's distribution."""

    name: str
    family: str
    num_bytes: float
    """Per target, as stored."""
    gradients: Gradients

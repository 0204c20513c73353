"""The method and its baselines by name: what each fixes of the loss, and what it only suggests.

The baselines mix in half of cross-entropy, as the released scripts of DistillLens (arXiv 2602.13567) do; DistillLens
itself has none of it there. To compare the two, set the same ``--kd-ratio`` for both.
"""

from dataclasses import dataclass, field
from typing import Any, Final

DEFAULT_METHOD: Final = "distilllens"


@dataclass(frozen=True)
class Method:
    """Settings of the loss by the names of their flags."""

    fixed: dict[str, Any] = field(default_factory=dict)
    """What makes it this method: another value is a contradiction."""
    suggested: dict[str, Any] = field(default_factory=dict)
    """Values of what is not given."""

    @property
    def settings(self) -> dict[str, Any]:
        """Values of what is not given, fixed or not."""
        return self.fixed | self.suggested

    @property
    def has_lens(self) -> bool:
        """Whether lens layers take part in the loss."""
        return "lens_weight" not in self.fixed


def _at_the_final_layer(task: str) -> Method:
    return Method({"task": task, "lens_weight": 0.0}, {"kd_ratio": 0.5})


METHODS = {
    DEFAULT_METHOD: Method(),
    "sft": Method({"task": "ce", "lens_weight": 0.0, "kd_ratio": 0.0}),
    "kd": _at_the_final_layer("fkl"),
    "rkl": _at_the_final_layer("rkl"),
    "fkl+rkl": _at_the_final_layer("fkl+rkl"),
    "jsd": _at_the_final_layer("jsd"),
    "akl": _at_the_final_layer("akl"),
}
"""Every method. ``distilllens`` fixes nothing: its task and divergence are free."""

"""Divergences by name, as flags and YAML write them: ``fkl``, ``jsd:0.3``, ``ab:0.2,0.7``."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Parameter:
    """A number that a divergence takes."""

    name: str
    default: float
    low: float
    high: float
    """Limits, both excluded."""


KNOWN: dict[str, tuple[Parameter, ...]] = {
    "fkl": (),
    "rkl": (),
    "fkl+rkl": (),
    "jsd": (Parameter("beta", 0.5, 0, 1),),
    "jeffreys": (),
    "akl": (Parameter("mu", 0.5, 0, 1),),
    "skew_fkl": (Parameter("alpha", 0.1, 0, 1),),
    "skew_rkl": (Parameter("alpha", 0.1, 0, 1),),
    "tvd": (),
    "ab": (Parameter("alpha", 0.2, 0, 10), Parameter("beta", 0.7, 0, 10)),
}
"""Every divergence with its parameters."""


@dataclass(frozen=True)
class DivergenceSpec:
    """One divergence with its parameters."""

    name: str
    parameters: tuple[float, ...] = ()

    def __str__(self) -> str:
        defaults = tuple(parameter.default for parameter in KNOWN[self.name])
        numbers = ",".join(f"{value:g}" for value in self.parameters)
        return self.name if self.parameters == defaults else f"{self.name}:{numbers}"


def parse_divergence(text: str) -> DivergenceSpec:
    """The divergence that ``text`` names; parameters not given have their defaults. ValueError with what is known."""
    name, _, numbers = text.strip().partition(":")
    if name not in KNOWN:
        raise ValueError(f"{text!r} is not a divergence: expected {', '.join(KNOWN)}, with parameters as in jsd:0.3")
    wanted = KNOWN[name]
    try:
        values = tuple(float(number) for number in numbers.split(",")) if numbers else tuple(p.default for p in wanted)
    except ValueError:
        values = ()
    if len(values) != len(wanted) or not all(p.low < value < p.high for p, value in zip(wanted, values, strict=True)):
        takes = " and ".join(f"{p.name} between {p.low:g} and {p.high:g}" for p in wanted) or "no parameter"
        raise ValueError(f"{text!r}: {name} takes {takes}")
    return DivergenceSpec(name, values)

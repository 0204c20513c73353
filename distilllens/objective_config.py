"""What is in the loss, as a run's config says it."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from distilllens.by_layer import parse_gate, parse_tail_choices
from distilllens.divergence_spec import parse_divergence
from distilllens.layer_maps import parse_pairs
from distilllens.lens_schedule import parse_schedule
from distilllens.methods import DEFAULT_METHOD, METHODS
from distilllens.run_config import Fraction, RunConfig, Spec

LENS_SETTINGS = ("lens_divergence", "lens_schedule", "lens_rows", "lens_head_grad")
"""Settings that mean nothing without a lens, besides its weight."""


def _tail(text: str | None) -> str | None:
    if text is not None:
        parse_tail_choices(text)
    return text


Tail = Annotated[Spec | None, AfterValidator(_tail)]


def _divergence(text: str) -> str:
    return str(parse_divergence(text))


def _task(text: str) -> str:
    return text if text == "ce" else _divergence(text)


def _pairs(text: str | None) -> str | None:
    if text is not None:
        parse_pairs(text)
    return text


def _schedule(text: str) -> str:
    parse_schedule(text)
    return text


def _gate(text: str | None) -> str | None:
    parse_gate(text)
    return text


class ObjectiveConfig(RunConfig):
    """Task, lens, and the positions that they are computed at."""

    method: Literal["distilllens", "sft", "kd", "rkl", "fkl+rkl", "jsd", "akl"] = DEFAULT_METHOD
    """distilllens, or a baseline: sft (cross-entropy; --dataset in place of --cache), or at the final layer alone kd
    (forward KL), rkl, fkl+rkl, jsd or akl, each with --kd-ratio 0.5 unless given."""
    pairs: Annotated[Spec | None, AfterValidator(_pairs)] = None
    """Layers to match, student:teacher, such as 2:8,4:16, or with shares of the lens weight, which sum to 1, such as
    2:8=0.3,4:16=0.7; none for the task alone. Derived from the cache's layers when not given."""
    task: Annotated[str, AfterValidator(_task)] = "fkl"
    """Divergence on the final layer: fkl, rkl, fkl+rkl (their sum), jsd[:beta], jeffreys, akl[:mu], skew_fkl[:alpha],
    skew_rkl[:alpha], tvd or ab[:alpha,beta]; ce is cross-entropy with the next token."""
    lens_divergence: Annotated[str, AfterValidator(_divergence)] = "jsd"
    """Divergence between the lens distributions of a pair: the same names."""
    tail: Tail = None
    """What stands for the rest: bucket, profile, sketch[:RANK], sampled or renorm; or final=...,lens=.... By default
    the best that the cache stores."""
    lens_weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight (lambda) of the mean lens divergence."""
    lens_schedule: Annotated[str, AfterValidator(_schedule)] = "constant"
    """The lens weight over the run: constant, linear or cosine (both fall to 0), or warm-off[:SHARE] (on for the first
    half of the steps, or SHARE of them)."""
    lens_rows: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the target positions that each lens layer reads, drawn anew in every step. Less is cheaper and leaves
    the loss unbiased."""
    lens_head_grad: Literal["on", "off"] = "on"
    """off: lens pairs train the layers under the head, and the head learns from the final layer alone."""
    entropy_gate: Annotated[Spec | None, AfterValidator(_gate)] = None
    """Entropy in nats of a target (kept tokens and rest) above which forward KL takes the place of the divergence, as
    one number, or final=X,lens=X."""
    positions_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of each example's target positions that is trained on: those where --positions-by is highest."""
    positions_by: Literal["loss", "entropy"] = "loss"
    """What --positions-share looks at: the loss at the student's final layer, or the entropy of its distribution."""
    kd_ratio: Fraction = 1.0
    """Share (rho) of distillation in the loss; the rest is cross-entropy."""

    @model_validator(mode="before")
    @classmethod
    def _method_fills_in(cls, values: Any) -> Any:
        method = METHODS.get(values.get("method", DEFAULT_METHOD)) if isinstance(values, dict) else None
        return values if method is None else method.settings | values

    @model_validator(mode="after")
    def _method_is_not_contradicted(self) -> "ObjectiveConfig":
        for name, value in METHODS[self.method].fixed.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{_flag(name)} {getattr(self, name)} is not --method {self.method}, which has {_flag(name)} "
                    f"{value}: drop one of the two (--method {DEFAULT_METHOD} takes any)"
                )
        for name in () if METHODS[self.method].has_lens else LENS_SETTINGS:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{_flag(name)} is for the lens, which --method {self.method} has none of: drop it")
        if self.positions_by != "loss" and self.positions_share == 1.0:
            raise ValueError("--positions-by chooses nothing while all positions are kept: give --positions-share")
        return self


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"

"""The settings of sequence-level distillation: how a teacher writes the responses of its cache."""

from typing import Annotated

from pydantic import Field, model_validator

from distilllens.run_config import PositiveInt, RunConfig


class GenerateConfig(RunConfig):
    """How a teacher writes the responses that its cache is made of, where it does."""

    generate: bool = False
    """Let the teacher write the responses, in place of those of the dataset (sequence-level distillation). They are
    kept in OUTPUT_DIR.generated.jsonl, where a stopped run goes on."""
    max_new_tokens: PositiveInt = 256
    """Most tokens that --generate writes per row."""
    do_sample: bool = True
    """Sample with --generate; --no-do-sample writes the likeliest tokens."""
    sampling_temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Temperature of --generate."""
    sampling_top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus of --generate."""
    sampling_top_k: Annotated[int, Field(ge=0)] = 0
    """Sample among this many tokens with --generate; 0 for all."""
    generate_batch_size: PositiveInt = 16
    """Rows that --generate writes at a time; what it writes does not depend on it."""

    @model_validator(mode="after")
    def _only_where_something_is_written(self) -> "GenerateConfig":
        fields = ("max_new_tokens", "do_sample", "sampling_temperature", "sampling_top_p", "sampling_top_k")
        for name in () if self.generate else (*fields, "generate_batch_size"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"--{name.replace('_', '-')} is for responses that the teacher writes: give --generate"
                )
        return self

"""The settings of a LoRA student."""

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from distilllens.run_config import PositiveInt, RunConfig, split_text


class LoraConfig(RunConfig):
    """A student that keeps its weights and learns low-rank additions to them (LoRA), under peft's names."""

    lora_r: PositiveInt | None = None
    """Rank of LoRA adapters, which are then all that is trained; every weight is when not given."""
    lora_alpha: Annotated[float, Field(gt=0.0)] = 32.0
    """Adapters are scaled by this number over their rank."""
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout before the adapters."""
    lora_target_modules: Annotated[tuple[str, ...] | None, BeforeValidator(split_text)] = None
    """Modules that get adapters, such as q_proj,v_proj, or all-linear; peft's choice for the architecture when not
    given."""
    lora_merge: bool = False
    """Also write the student with its adapters merged, an ordinary model folder, to "merged" in the output folder."""

    @model_validator(mode="after")
    def _adapters_have_a_rank(self) -> "LoraConfig":
        for name in () if self.lora_r is not None else ("lora_alpha", "lora_dropout", "lora_target_modules"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"--{name.replace('_', '-')} is for new adapters: give --lora-r, or drop it")
        return self

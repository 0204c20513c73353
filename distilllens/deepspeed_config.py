"""A DeepSpeed JSON file for one run: every "auto" resolved, every conflict with the run named."""

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from distilllens.config import TrainConfig


@dataclass(frozen=True)
class RunFacts:
    """What a run settles for DeepSpeed."""

    world_size: int
    hidden_size: int


def load_deepspeed_config(config: TrainConfig, facts: RunFacts) -> dict[str, Any]:
    """The run's DeepSpeed file (or the shipped ZeRO-2 one) with every "auto" filled in.

    Raises ValueError for a file that is not JSON, an "auto" nobody knows, or a value that contradicts the run.
    """
    if config.deepspeed is None:
        text, name = (
            (resources.files("distilllens") / "deepspeed" / "zero2.json").read_text("utf-8"),
            "zero2.json",
        )
    else:
        if not config.deepspeed.is_file():
            raise ValueError(f"--deepspeed {config.deepspeed} is not a file: give a DeepSpeed JSON file")
        text, name = config.deepspeed.read_text("utf-8"), str(config.deepspeed)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None
    # The run's own schedule sets the learning rate before every step.
    values.pop("scheduler", None)
    known = _known_values(config, facts)
    resolved = _resolve(values, known, name, prefix="")
    return {key: value for key, value in known.items() if "." not in key} | resolved


def _known_values(config: TrainConfig, facts: RunFacts) -> dict[str, Any]:
    micro, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * facts.world_size,
        "gradient_clipping": config.max_grad_norm,
        "bf16.enabled": config.bf16,
        "fp16.enabled": False,
        "optimizer.params.lr": config.learning_rate,
        "optimizer.params.betas": [config.adam_beta1, config.adam_beta2],
        "optimizer.params.eps": config.adam_epsilon,
        "optimizer.params.weight_decay": config.weight_decay,
        "zero_optimization.reduce_bucket_size": facts.hidden_size**2,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * facts.hidden_size**2),
        "zero_optimization.stage3_param_persistence_threshold": 10 * facts.hidden_size,
    }


def _resolve(values: dict[str, Any], known: dict[str, Any], name: str, *, prefix: str) -> dict[str, Any]:
    resolved = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            resolved[key] = _resolve(value, known, name, prefix=f"{path}.")
        elif value == "auto":
            if path not in known:
                raise ValueError(f'{name}: "auto" for {path} has no meaning here; give it a value')
            resolved[key] = known[path]
        elif path in known and not path.startswith("zero_optimization") and value != known[path]:
            raise ValueError(
                f'{name} says {path} = {value}, and the run says {known[path]}: make them equal, or write "auto"'
            )
        else:
            resolved[key] = value
    return resolved

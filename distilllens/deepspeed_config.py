"""A DeepSpeed JSON file for one run: every "auto" resolved and told, every conflict and unknown key named."""

import difflib
import json
import os
from dataclasses import dataclass, field
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from distilllens.config import TrainConfig
from distilllens.schedule import warmup_steps

DEFAULT = "zero2"
"""The shipped file that several ranks use when none is named."""
SETTINGS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "disable_allgather", "dataloader_drop_last",
}  # fmt: skip
"""Keys without a section of their own."""
SECTIONS: dict[str, str | set[str]] = {
    "zero_optimization": "deepspeed.runtime.zero.config.DeepSpeedZeroConfig",
    "tensorboard": "deepspeed.monitor.config.TensorBoardConfig",
    "wandb": "deepspeed.monitor.config.WandbConfig",
    "csv_monitor": "deepspeed.monitor.config.CSVConfig",
    "comms_logger": "deepspeed.comm.config.CommsLoggerConfig",
    "optimizer": {"type", "params", "params.lr", "params.betas", "params.eps", "params.weight_decay",
                  "params.adam_w_mode", "params.torch_adam", "params.bias_correction"},
    "scheduler": {"type", "params", "params.warmup_min_lr", "params.warmup_max_lr", "params.warmup_num_steps",
                  "params.warmup_type", "params.total_num_steps", "params.cos_min_ratio", "params.warmup_min_ratio",
                  "params.last_batch_iteration"},
    "bf16": {"enabled", "auto_cast", "immediate_grad_update", "check_grad_overflow"},
    "fp16": {"enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis",
             "consecutive_hysteresis", "min_loss_scale"},
    "activation_checkpointing": {"partition_activations", "number_checkpoints", "contiguous_memory_optimization",
                                 "synchronize_checkpoint_boundary", "profile", "cpu_checkpointing"},
    "aio": {"block_size", "queue_depth", "intra_op_parallelism", "thread_count", "single_submit", "overlap_events",
            "use_gds"},
    "flops_profiler": {"enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed",
                       "output_file"},
}  # fmt: skip
"""Sections, with their keys or with the model of DeepSpeed's that knows them."""
SCHEDULERS = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
"""DeepSpeed's schedules, and the --lr-scheduler-type of the same shape."""


@dataclass(frozen=True)
class RunFacts:
    """What a run settles for DeepSpeed; None for what is not known before student and data are opened."""

    world_size: int
    hidden_size: int | None
    num_steps: int | None


@dataclass(frozen=True)
class ResolvedDeepSpeed:
    """A DeepSpeed file without an "auto", as ``deepspeed.initialize`` takes it."""

    name: str
    values: dict[str, Any]
    autos: dict[str, Any] = field(default_factory=dict)
    """What each "auto" of the file became, by its dotted key."""
    notes: tuple[str, ...] = ()

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's state lives in the host's memory."""
        offload = self.values.get("zero_optimization", {}).get("offload_optimizer") or {}
        return offload.get("device", "none") != "none"

    @property
    def report(self) -> str:
        """What the user is told: the stage, every "auto" and what it became, and what is not used."""
        stage = self.values.get("zero_optimization", {}).get("stage", 0)
        lines = [f"DeepSpeed, ZeRO stage {stage}, from {self.name}"]
        lines += [f"  {key}: auto -> {json.dumps(value)}" for key, value in self.autos.items()]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def shipped_configs() -> list[str]:
    """Names that --deepspeed takes beside files."""
    folder = resources.files("distilllens") / "deepspeed"
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir())


def load_deepspeed_config(config: TrainConfig, facts: RunFacts) -> ResolvedDeepSpeed:
    """The run's DeepSpeed file, or a shipped one by its name, with every "auto" filled in.

    Optimizer and learning rate are the run's own; what the file says of them is compared and taken out.

    Raises ValueError: no such file, not JSON, a key that DeepSpeed or this program doesn't know, an "auto" without a
    meaning, or values that contradict the run.
    """
    name, text = _read(config.deepspeed)
    try:
        file = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(file, dict):
        raise ValueError(f"{name} holds a {type(file).__name__}, not a DeepSpeed configuration with keys")
    _require_known_keys(file, name)
    known, free = _known_values(config, facts), _free_values(facts)
    autos: dict[str, Any] = {}
    resolved = _resolve(file, name, known, free, autos)
    _require_adamw(resolved.pop("optimizer", {}), name)
    notes = _schedule_notes(resolved.pop("scheduler", {}), config, name)
    if config.device == "cpu" or not torch.cuda.is_available():
        # DeepSpeed would otherwise take a GPU, or look for an accelerator's compiler at import.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _require_valid_values(resolved, name)
    _require_no_nvme(resolved, name)
    notes += _drop_idle_offload(resolved.get("zero_optimization", {}))
    values = {key: value for key, value in known.items() if "." not in key} | resolved
    if config.bf16 and not values.get("zero_optimization", {}).get("stage"):
        # As in one process. DeepSpeed's bfloat16 optimizer without ZeRO doesn't show what it keeps of a parameter.
        values |= {"bf16": {"enabled": False}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
        notes = (*notes, "bf16 without ZeRO is torch's autocast, as in one process")
    return ResolvedDeepSpeed(name, values, autos, notes)


def _read(asked: Path | None) -> tuple[str, str]:
    shipped = resources.files("distilllens") / "deepspeed" / f"{asked or DEFAULT}.json"
    if asked is not None and asked.is_file():
        return str(asked), asked.read_text("utf-8")
    if str(asked or DEFAULT) in shipped_configs():
        return shipped.name, shipped.read_text("utf-8")
    raise ValueError(
        f"--deepspeed {asked} is neither a file nor one of {', '.join(shipped_configs())}: give a DeepSpeed JSON file"
    )


def _known_values(config: TrainConfig, facts: RunFacts) -> dict[str, Any]:
    micro, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * facts.world_size,
        "gradient_clipping": config.max_grad_norm,
        # The optimizer is torch's AdamW in every engine.
        "zero_force_ds_cpu_optimizer": False,
        "bf16.enabled": config.bf16,
        "fp16.enabled": False,
        "optimizer.params.lr": config.learning_rate,
        "optimizer.params.betas": [config.adam_beta1, config.adam_beta2],
        "optimizer.params.eps": config.adam_epsilon,
        "optimizer.params.weight_decay": config.weight_decay,
        "scheduler.params.warmup_max_lr": config.learning_rate,
        "scheduler.params.warmup_num_steps": facts.num_steps and warmup_steps(config, num_steps=facts.num_steps),
        "scheduler.params.total_num_steps": facts.num_steps,
        "zero_optimization.compute_grad_norm": True,
    }


def _free_values(facts: RunFacts) -> dict[str, Any]:
    """What an "auto" becomes where any other value would do, too: the formulas of Hugging Face's trainer."""
    size = facts.hidden_size or 1
    return {
        "scheduler.params.warmup_min_lr": 0,
        "zero_optimization.reduce_bucket_size": size**2,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * size**2),
        "zero_optimization.stage3_param_persistence_threshold": 10 * size,
    }


def _resolve(
    values: dict[str, Any],
    name: str,
    known: dict[str, Any],
    free: dict[str, Any],
    autos: dict[str, Any],
    *,
    prefix: str = "",
) -> dict[str, Any]:
    resolved = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            resolved[key] = _resolve(value, name, known, free, autos, prefix=f"{path}.")
        elif value == "auto":
            if path not in known and path not in free:
                raise ValueError(f'{name}: "auto" for {path} has no meaning here; give it a value')
            resolved[key] = autos[path] = known[path] if path in known else free[path]
        elif known.get(path) is not None and value != known[path]:
            raise ValueError(
                f'{name} says {path} = {value}, and the run says {known[path]}: make them equal, or write "auto"'
            )
        else:
            resolved[key] = value
    return resolved


def _require_known_keys(file: dict[str, Any], name: str) -> None:
    for key, value in file.items():
        if key not in SETTINGS and key not in SECTIONS:
            raise ValueError(_unknown(name, key, {*SETTINGS, *SECTIONS}))
        keys = SECTIONS.get(key)
        if keys is not None and not isinstance(value, dict):
            raise ValueError(f"{name}: {key} is {json.dumps(value)}, expected a section with keys of its own")
        if not isinstance(keys, set):
            continue
        for path in _paths(value):
            if path not in keys:
                raise ValueError(_unknown(name, f"{key}.{path}", {f"{key}.{one}" for one in keys}))


def _paths(section: dict[str, Any]) -> list[str]:
    inner = [f"{key}.{path}" for key, value in section.items() if isinstance(value, dict) for path in _paths(value)]
    return [*section, *inner]


def _unknown(name: str, key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"{name}: {key} is not a DeepSpeed key that train takes" + (f"; did you mean {near[0]}?" if near else "")


def _require_valid_values(resolved: dict[str, Any], name: str) -> None:
    """DeepSpeed's own models judge what has one: unknown keys, types and ranges."""
    for key, model in SECTIONS.items():
        if key not in resolved or not isinstance(model, str):
            continue
        module, _, found = model.rpartition(".")
        try:
            getattr(import_module(module), found)(**resolved[key])
        except ValidationError as error:
            detail = error.errors()[0]
            path = ".".join([key, *(str(part) for part in detail["loc"])])
            if detail["type"] == "extra_forbidden":
                fields = getattr(import_module(module), found).model_fields
                names = {f"{key}.{field.alias or one}" for one, field in fields.items()}
                raise ValueError(_unknown(name, path, names)) from None
            raise ValueError(f"{name}: {path} = {json.dumps(detail['input'])}: {detail['msg']}") from None


def _require_no_nvme(resolved: dict[str, Any], name: str) -> None:
    for offload in ("offload_optimizer", "offload_param"):
        section = resolved.get("zero_optimization", {}).get(offload) or {}
        if section.get("device") == "nvme":
            raise ValueError(f"{name} says zero_optimization.{offload}.device = nvme: train offloads to cpu only")


def _drop_idle_offload(zero: dict[str, Any]) -> tuple[str, ...]:
    """Takes out what the stage has no use for, which DeepSpeed would do without a word."""
    stage, notes = int(zero.get("stage", 0)), []
    for key, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        if stage < lowest and (zero.get(key) or {}).get("device", "none") != "none":
            del zero[key]
            notes.append(f"zero_optimization.{key} is not used: it needs stage {lowest} or higher, and this is {stage}")
    return tuple(notes)


def _require_adamw(optimizer: dict[str, Any], name: str) -> None:
    kind, params = optimizer.get("type", "AdamW"), optimizer.get("params", {})
    is_adamw = kind in ("Adam", "AdamW") and params.get("adam_w_mode", True) and params.get("bias_correction", True)
    if not is_adamw:
        raise ValueError(
            f"{name} says optimizer {json.dumps(optimizer)}, and the run says AdamW: change it, or leave it out"
        )


def _schedule_notes(scheduler: dict[str, Any], config: TrainConfig, name: str) -> tuple[str, ...]:
    if not scheduler:
        return ()
    kind, own = scheduler.get("type"), config.lr_scheduler_type
    if kind not in SCHEDULERS:
        raise ValueError(f"{name} says scheduler.type = {kind}: expected one of {', '.join(SCHEDULERS)}")
    if SCHEDULERS[kind] == own:
        return ()
    if "lr_scheduler_type" in config.model_fields_set:
        raise ValueError(
            f"{name} says scheduler.type = {kind} ({SCHEDULERS[kind]}), and the run says --lr-scheduler-type {own}: "
            "make them equal, or leave the section out"
        )
    return (f"scheduler.type: {kind} is not used; the run's schedule is {own} (--lr-scheduler-type)",)

"""Many processes under DeepSpeed, ZeRO 0 to 3, with the numbers of one process."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from distilllens.collate import Batch
from distilllens.config import TrainConfig
from distilllens.console import say
from distilllens.deepspeed_config import RunFacts, load_deepspeed_config
from distilllens.engine import Engine, HasWeights, build_optimizer
from distilllens.optimizer_state import (
    MOMENTS,
    WEIGHT,
    OptimizerState,
    plain_tensors,
    restore_plain,
    write_optimizer_state,
)

FLAT_PARTITIONS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
"""Where DeepSpeed's optimizers (ZeRO 1 and 2, ZeRO 3, ZeRO 1 in bfloat16) keep the float32 weights of a rank."""


class DeepSpeedEngine(Engine):
    """Many processes: DeepSpeed, whose averaging over ranks and accumulation is undone."""

    def __init__(self, student: nn.Module, config: TrainConfig, device: torch.device, facts: RunFacts) -> None:
        resolved = load_deepspeed_config(config, facts)
        import deepspeed

        # torch deprecates what DeepSpeed calls, and says so at every call on every rank.
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
        # Its shared-memory kernel for CPU ranks would first be compiled, for minutes; gloo computes the same sums.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" not in os.environ and not torch.distributed.is_initialized():
            # Alone, and without a port that another run could hold.
            from torch._C._distributed_c10d import HashStore

            os.environ.setdefault("LOCAL_RANK", "0")
            torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.device = device
        say(resolved.report)
        self._student = student
        # DeepSpeed's own CPU optimizer would have to be compiled; torch's fused one comes compiled.
        own = build_optimizer(student, config, fused=True if resolved.offloads_optimizer else None)
        initialize: Any = deepspeed.initialize
        # It would take the device of the local rank, which a launcher may have hidden from this one.
        place = SimpleNamespace(device_rank=device.index or 0)
        self._engine, optimizer, *_ = initialize(args=place, model=student, optimizer=own, config=resolved.values)
        self._has_autocast = resolved.values.get("torch_autocast", {}).get("enabled", False)
        self._optimizer: Any = optimizer
        self._is_plain = optimizer is own
        self._steps = 0
        if not self._is_plain:
            self._make_moments()

    def forward(self, batch: Batch, **options: Any) -> dict[str, Tensor]:
        return self._engine(batch, **options)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self._has_autocast else nullcontext()

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks; the loss is already divided by the step's targets over all ranks.
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def update(self, learning_rate: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._plain_norm() if self._is_plain else None
        self._engine.step()
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        self._steps += 1
        return norm

    def _plain_norm(self) -> float:
        """Without ZeRO DeepSpeed clips, but doesn't tell the norm."""
        gradients = [p.grad for p in self._student.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(gradients).item()

    def all_sum(self, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, claim: bool) -> bool:
        return bool(self.all_sum(torch.tensor(float(claim), device=self.device)) > 0)

    def gather(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        torch.distributed.barrier()

    def close(self) -> None:
        self._engine.destroy()

    @property
    def is_sharded(self) -> bool:
        return any(hasattr(parameter, "ds_id") for parameter in self._student.parameters())

    def whole_weights(self, model: HasWeights) -> dict[str, Tensor] | None:
        if not self.is_sharded:
            return None
        import deepspeed

        copies: dict[int, Tensor] = {}
        own = model.state_dict(keep_vars=True)
        for tensor in {id(tensor): tensor for tensor in own.values()}.values():
            # One at a time: together they need not fit on one device.
            with deepspeed.zero.GatheredParameters([tensor]):
                if self.is_main:
                    copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
        return {name: copies[id(tensor)] for name, tensor in own.items()} if self.is_main else {}

    def save_state(self, folder: Path) -> None:
        tensors = plain_tensors(self._student, self._optimizer) if self._is_plain else self._gathered_tensors()
        write_optimizer_state(folder, tensors, steps=self._steps, is_main=self.is_main)

    def _gathered_tensors(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        of_moment: Any = safe_get_full_optimizer_state
        of_weight: Any = safe_get_full_fp32_param
        for name, parameter in self._trainable():
            for moment in MOMENTS:
                yield f"{name}.{moment}", of_moment(parameter, moment)
            if parameter.dtype != torch.float32:
                yield f"{name}.{WEIGHT}", of_weight(parameter)

    def load_state(self, folder: Path) -> None:
        state = OptimizerState(folder)
        self._steps = state.steps
        if self._is_plain:
            restore_plain(self._student, self._optimizer, state)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for flat in self._partitions():
            self._optimizer.optimizer.state[flat]["step"].fill_(float(state.steps))
        for name, parameter in self._trainable():
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[f"{name}.{moment}"].to(self.device), moment)
            if f"{name}.{WEIGHT}" in state:
                safe_set_full_fp32_param(parameter, state[f"{name}.{WEIGHT}"].to(self.device))

    def _make_moments(self) -> None:
        """Moments of 0 for this rank's partitions, which torch would make in the first step.

        With several parameter groups DeepSpeed links moments to parameters after the first group's step: too early for
        the others, whose moments it then never finds.
        """
        for flat in self._partitions():
            moments = {moment: torch.zeros_like(flat.data) for moment in MOMENTS}
            # torch's fused kernel wants the number of steps beside the weights.
            place = flat.device if self._optimizer.optimizer.defaults["fused"] else None
            self._optimizer.optimizer.state[flat] = {"step": torch.tensor(0.0, device=place), **moments}
        if hasattr(self._optimizer, "_lazy_init_hp_params_optimizer_state"):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _partitions(self) -> Sequence[nn.Parameter]:
        return next(getattr(self._optimizer, name) for name in FLAT_PARTITIONS if hasattr(self._optimizer, name))

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return (pair for pair in self._student.named_parameters() if pair[1].requires_grad)

    def train(self, training: bool) -> None:
        self._engine.train(training)

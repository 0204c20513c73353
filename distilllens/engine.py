"""Where a step meets hardware: one process in plain torch, or many under DeepSpeed."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distilllens.collate import Batch
from distilllens.config import TrainConfig
from distilllens.deepspeed_config import RunFacts, load_deepspeed_config
from distilllens.models import pick_device


def parameter_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms (anything of one dimension) don't."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with the run's settings."""
    return torch.optim.AdamW(
        parameter_groups(module, weight_decay=config.weight_decay),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )


class HasParameters(Protocol):
    """A model, or something beside it that knows its weights."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights."""
        ...


class Engine(ABC):
    """Runs the wrapped student forward, backward and forward again."""

    rank = 0
    world_size = 1
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        """Whether no rank holds the whole weights, so that all ranks have to call the model together."""
        return False

    @abstractmethod
    def forward(self, batch: Batch, **options: Any) -> dict[str, Tensor]:
        """The student's sums for a batch on this rank; ``options`` go to its ``forward``."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients. ``loss`` is its sum over the target positions of the *whole* step."""

    @abstractmethod
    def update(self, learning_rate: float) -> float:
        """Clip, step, clear; the gradient's norm before clipping. After the last micro-batch's backward."""

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        return tensor

    def any(self, claim: bool) -> bool:
        """Whether a claim holds on any rank."""
        return claim

    def barrier(self) -> None:
        """Wait for every rank."""
        return

    def whole_weights(self, model: HasParameters) -> AbstractContextManager[Any]:
        """While entered, by every rank, ``model`` has its whole weights, for saving."""
        return nullcontext()

    @abstractmethod
    def save_state(self, folder: Path) -> None:
        """Write the optimizer's state. Every rank calls it."""

    @abstractmethod
    def load_state(self, folder: Path) -> None:
        """Read what ``save_state`` wrote."""

    @abstractmethod
    def train(self, training: bool) -> None:
        """Switch the student between training and evaluation."""


class TorchEngine(Engine):
    """One process: plain torch."""

    def __init__(self, student: nn.Module, config: TrainConfig, device: torch.device) -> None:
        self.device = device
        self._student = student.to(device)
        self._optimizer = build_optimizer(student, config)
        self._max_grad_norm = config.max_grad_norm
        self._bf16 = config.bf16

    def forward(self, batch: Batch, **options: Any) -> dict[str, Tensor]:
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self._bf16 else nullcontext()
        with autocast:
            return self._student(batch, **options)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, learning_rate: float) -> float:
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self._max_grad_norm).item()
        if not torch.isfinite(torch.tensor(norm)):
            self._optimizer.zero_grad()
            return norm
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def save_state(self, folder: Path) -> None:
        torch.save(self._optimizer.state_dict(), folder / "optimizer.pt")

    def load_state(self, folder: Path) -> None:
        state = torch.load(folder / "optimizer.pt", map_location=self.device, weights_only=True)
        self._optimizer.load_state_dict(state)

    def train(self, training: bool) -> None:
        self._student.train(training)


class DeepSpeedEngine(Engine):
    """Many processes: DeepSpeed, whose averaging over ranks and accumulation is undone."""

    def __init__(self, student: nn.Module, config: TrainConfig, device: torch.device, hidden_size: int) -> None:
        # CPU ranks: DeepSpeed would otherwise look for an accelerator's compiler at import.
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        # Its shared-memory kernel for CPU ranks would first be compiled, for minutes; gloo computes the same sums.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.device = device
        self.config = load_deepspeed_config(config, RunFacts(self.world_size, hidden_size))
        groups: Any = parameter_groups(student, weight_decay=config.weight_decay)
        self._student = student
        own = None if "optimizer" in self.config else build_optimizer(student, config)
        self._engine, optimizer, *_ = deepspeed.initialize(
            model=student, optimizer=own, model_parameters=None if own else groups, config=self.config
        )
        self._optimizer: Any = optimizer

    def forward(self, batch: Batch, **options: Any) -> dict[str, Tensor]:
        return self._engine(batch, **options)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks; the loss is already divided by the step's targets over all ranks.
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def update(self, learning_rate: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    @property
    def is_sharded(self) -> bool:
        return any(hasattr(parameter, "ds_id") for parameter in self._student.parameters())

    def all_sum(self, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, claim: bool) -> bool:
        return bool(self.all_sum(torch.tensor(float(claim), device=self.device)) > 0)

    def barrier(self) -> None:
        torch.distributed.barrier()

    def whole_weights(self, model: HasParameters) -> AbstractContextManager[Any]:
        import deepspeed

        sharded = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
        return deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext()

    def save_state(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)

    def load_state(self, folder: Path) -> None:
        loaded, _ = self._engine.load_checkpoint(str(folder), tag="deepspeed")
        if loaded is None:
            raise ValueError(f"{folder} holds no DeepSpeed state for {self.world_size} ranks")

    def train(self, training: bool) -> None:
        self._engine.train(training)


def choose_device(name: str) -> torch.device:
    """The device of this rank: the one asked for, and under a launcher the CUDA device of the local rank."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is None:
        device = pick_device(f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}")
        torch.cuda.set_device(device)
    return device


def is_distributed() -> bool:
    """Whether a launcher (torchrun, deepspeed) started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start_engine(student: nn.Module, config: TrainConfig, device: torch.device, *, hidden_size: int) -> Engine:
    """Plain torch for one process; DeepSpeed for several, or where a DeepSpeed file is given."""
    if is_distributed() or config.deepspeed is not None:
        return DeepSpeedEngine(student, config, device, hidden_size)
    return TorchEngine(student, config, device)

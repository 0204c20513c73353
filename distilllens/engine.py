"""Where a step meets hardware: what every engine does, and the optimizer that it runs."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distilllens.collate import Batch
from distilllens.config import TrainConfig


def parameter_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms (anything of one dimension) don't."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, config: TrainConfig, *, fused: bool | None = None) -> torch.optim.AdamW:
    """AdamW with the run's settings; ``fused`` is torch's one kernel for a whole step."""
    return torch.optim.AdamW(
        parameter_groups(module, weight_decay=config.weight_decay),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=fused,
    )


class HasWeights(Protocol):
    """A model, or something beside it that knows which of its weights are saved."""

    def state_dict(self, *, keep_vars: bool = False) -> dict[str, Tensor]:
        """Weights and buffers by name; with ``keep_vars`` the model's own."""
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

    def autocast(self) -> AbstractContextManager[Any]:
        """While entered, the model alone computes in the number type that ``forward`` gives it."""
        return nullcontext()

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

    def gather(self, value: Any) -> list[Any]:
        """A small value of each rank, in the order of the ranks."""
        return [value]

    def barrier(self) -> None:
        """Wait for every rank."""
        return

    def close(self) -> None:
        """Let go of what a later engine in this process needs."""
        return

    def whole_weights(self, model: HasWeights) -> dict[str, Tensor] | None:
        """What to save of a ``model`` that has a part of each weight on every rank: copies on the main rank's CPU, tied
        ones of one tensor. None where a model's own weights are whole. Every rank calls it.
        """
        return None

    @abstractmethod
    def save_state(self, folder: Path) -> None:
        """Write the optimizer's state, in a form that any engine reads. Every rank calls it."""

    @abstractmethod
    def load_state(self, folder: Path) -> None:
        """Read what any engine's ``save_state`` wrote."""

    @abstractmethod
    def train(self, training: bool) -> None:
        """Switch the student between training and evaluation."""

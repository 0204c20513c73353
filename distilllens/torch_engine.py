"""One process in plain torch."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distilllens.collate import Batch
from distilllens.config import TrainConfig
from distilllens.engine import Engine, build_optimizer
from distilllens.optimizer_state import OptimizerState, plain_tensors, restore_plain, write_optimizer_state


class TorchEngine(Engine):
    """One process: plain torch."""

    def __init__(self, student: nn.Module, config: TrainConfig, device: torch.device) -> None:
        self.device = device
        self._student = student.to(device)
        self._optimizer = build_optimizer(student, config)
        self._max_grad_norm = config.max_grad_norm
        self._bf16 = config.bf16
        self._steps = 0

    def forward(self, batch: Batch, **options: Any) -> dict[str, Tensor]:
        with self.autocast():
            return self._student(batch, **options)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self._bf16 else nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, learning_rate: float) -> float:
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            # What a step didn't reach has a gradient of 0, as under ZeRO; torch would leave it out of the step.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = nn.utils.clip_grad_norm_(parameters, self._max_grad_norm).item()
        if not torch.isfinite(torch.tensor(norm)):
            self._optimizer.zero_grad()
            return norm
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._steps += 1
        return norm

    def save_state(self, folder: Path) -> None:
        tensors = plain_tensors(self._student, self._optimizer)
        write_optimizer_state(folder, tensors, steps=self._steps, is_main=self.is_main)

    def load_state(self, folder: Path) -> None:
        state = OptimizerState(folder)
        restore_plain(self._student, self._optimizer, state)
        self._steps = state.steps

    def train(self, training: bool) -> None:
        self._student.train(training)

"""An optimizer's state on disk, by parameter: neither the number of ranks nor a ZeRO stage shows in it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter; ``NAME.exp_avg`` and ``NAME.exp_avg_sq`` in the files, whole and in float32."""
WEIGHT = "weight"
"""``NAME.weight`` is the parameter in float32, where the model trains in a narrower type."""
FILE = "optimizer-{:05}.safetensors"
PART_BYTES = 2 << 30
"""A file is closed when it holds this much, which bounds the memory that writing takes."""


def write_optimizer_state(folder: Path, tensors: Iterable[tuple[str, Tensor]], *, steps: int, is_main: bool) -> None:
    """Write named tensors, of an optimizer that took ``steps`` steps, in parts of about ``PART_BYTES``.

    Every rank calls it, since taking a tensor may need all of them; the main one writes.
    """
    part: dict[str, Tensor] = {}
    number = 0

    def close() -> None:
        nonlocal part, number
        save_file(part, folder / FILE.format(number), metadata={"steps": str(steps)})
        part, number = {}, number + 1

    for name, tensor in tensors:
        if is_main:
            part[name] = tensor.detach().cpu().contiguous()
            if sum(held.nbytes for held in part.values()) >= PART_BYTES:
                close()
    if is_main and (part or number == 0):
        close()


class OptimizerState:
    """What ``write_optimizer_state`` wrote, read a tensor at a time.

    Raises ValueError: no such state in the folder, or a damaged one.
    """

    steps: int
    """Steps that the optimizer had taken."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: dict[str, Any] = {}
        for file in sorted(folder.glob(FILE.format(0).replace("00000", "*"))):
            try:
                part = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file} cannot be read ({error}): resume from another checkpoint") from None
            self.steps = int(part.metadata()["steps"])
            self._parts |= dict.fromkeys(part.keys(), part)
        if not hasattr(self, "steps"):
            raise ValueError(
                f"{folder} holds no optimizer state ({FILE.format(0)}): resume from another checkpoint, or begin anew"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._parts:
            raise ValueError(f"{self._folder} holds no {name}: it was written for another student")
        return self._parts[name].get_tensor(name)


def plain_tensors(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, Tensor]]:
    """The moments of an optimizer that holds the module's own parameters."""
    for name, parameter in module.named_parameters():
        for moment in MOMENTS if parameter in optimizer.state else ():
            yield f"{name}.{moment}", optimizer.state[parameter][moment]


def restore_plain(module: torch.nn.Module, optimizer: torch.optim.Optimizer, state: OptimizerState) -> None:
    """Give the moments back, and weights where the state holds more of them than the model's files."""
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        moments = {moment: state[f"{name}.{moment}"].to(parameter.device) for moment in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(state.steps)), **moments}
        if f"{name}.{WEIGHT}" in state:
            parameter.data.copy_(state[f"{name}.{WEIGHT}"])

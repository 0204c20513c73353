"""One process: a step as every engine takes it, and none where the gradient is not finite."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distilllens import optimizer_state
from distilllens.config import TrainConfig
from distilllens.engine import parameter_groups
from distilllens.torch_engine import TorchEngine


class Two(nn.Module):
    """Two matrices, of which a step may reach one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reached, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"total": self.reached(states).square().sum()}


def build(**settings: object) -> tuple[Any, Any]:
    run = {"method": "sft", "student": "s", "dataset": "d", "output_dir": "o", "weight_decay": 0.5}
    module = Two()
    return module, TorchEngine(module, TrainConfig.model_validate(run | settings), torch.device("cpu"))


def step(engine: Any, states: torch.Tensor) -> float:
    engine.backward(engine.forward(states)["total"])
    return engine.update(0.1)


def test_matrices_decay_where_a_step_does_not_reach_them_and_biases_never() -> None:
    module, engine = build()
    before = copy.deepcopy(module)
    step(engine, torch.ones(2, 3))
    torch.testing.assert_close(module.other.weight, before.other.weight * (1 - 0.1 * 0.5))
    assert torch.equal(module.other.bias, before.other.bias)
    assert [group["weight_decay"] for group in parameter_groups(module, weight_decay=0.5)] == [0.5, 0.0]


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_touches_nothing_and_is_forgotten(number: float) -> None:
    (module, engine), (wanted, other) = build(), build()
    before = copy.deepcopy(module.state_dict())
    assert not torch.isfinite(torch.tensor(step(engine, torch.full((2, 3), number))))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert step(engine, torch.ones(2, 3)) == step(other, torch.ones(2, 3))
    assert torch.equal(module.reached.weight, wanted.reached.weight)


def test_a_state_in_many_files_is_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_state, "PART_BYTES", 48)
    module, engine = build()
    step(engine, torch.ones(2, 3))
    engine.save_state(tmp_path)
    assert len(list(tmp_path.glob("optimizer-*.safetensors"))) > 2
    state = optimizer_state.OptimizerState(tmp_path)
    for name, parameter in module.named_parameters():
        for moment in optimizer_state.MOMENTS:
            assert torch.equal(state[f"{name}.{moment}"], engine._optimizer.state[parameter][moment])


def test_a_state_is_that_of_an_optimizer_that_was_never_stopped(tmp_path: Path) -> None:
    (module, engine), (resumed, other) = build(), build()
    for n in range(3):
        step(engine, torch.full((2, 3), float(n + 1)))
    engine.save_state(tmp_path)
    resumed.load_state_dict(module.state_dict())
    other.load_state(tmp_path)
    (tmp_path / "again").mkdir()
    other.save_state(tmp_path / "again")
    assert (tmp_path / "again" / "optimizer-00000.safetensors").read_bytes() == (
        tmp_path / "optimizer-00000.safetensors"
    ).read_bytes()
    for one in (engine, other):
        step(one, torch.ones(2, 3))
    for name, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])

"""The fused head gives the numbers and gradients of its plain twin."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distilllens.divergence import sparse_divergence
from distilllens.fused import FUSED, Group, Head, Loss, certain_targets, fused_losses
from distilllens.tails import BucketTail, ProfileTail, Tail
from distilllens.targets import SparseTargets, take_top_k

N, D, V, K = 37, 16, 101, 7


def ragged_targets(generator: torch.Generator, dtype: torch.dtype) -> SparseTargets:
    """Targets that keep between one and K tokens; padding has id 0, which is a real token too."""
    log_probs = (torch.randn(N, V, generator=generator, dtype=torch.float64) * 3).log_softmax(-1)
    targets = take_top_k(log_probs, K)
    is_kept = torch.arange(K) < torch.randint(1, K + 1, (N, 1), generator=generator)
    slots = torch.where(is_kept, targets.ids, V)
    outside = torch.cat([log_probs, torch.zeros(N, 1)], -1).scatter(-1, slots, -torch.inf)[:, :-1]
    return SparseTargets(
        ids=targets.ids.masked_fill(~is_kept, 0),
        log_probs=targets.log_probs.masked_fill(~is_kept, -100.0).to(dtype),
        is_kept=is_kept,
        log_rest=outside.logsumexp(-1).to(dtype),
    )


class Case:
    """Hidden states, a head with a bias, targets and a tail."""

    def __init__(self, tail: str, *, dtype: torch.dtype = torch.float64, spread: float = 0.5) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = torch.randn(N * D + V * D + 2 * V, generator=generator, dtype=torch.float64)
        hidden, weight, bias, profile = draw.split([N * D, V * D, V, V])
        self.hidden = hidden.view(N, D).to(dtype).requires_grad_()
        self.weight = (weight.view(V, D) * spread).to(dtype).requires_grad_()
        self.bias = bias.to(dtype).requires_grad_()
        self.targets = ragged_targets(generator, dtype)
        self.tail: Tail = BucketTail() if tail == "bucket" else ProfileTail(profile.log_softmax(-1).to(dtype))

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias

    def logits(self, scale: float = 1.0, softcap: float | None = None) -> Tensor:
        logits = (self.hidden @ self.weight.T + self.bias) * scale
        return softcap * torch.tanh(logits / softcap) if softcap else logits


both_tails = pytest.mark.parametrize("tail", ["bucket", "profile"])
every_divergence = pytest.mark.parametrize("divergence", FUSED)


@every_divergence
@both_tails
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.7, None), (0.7, 5.0)])
@pytest.mark.parametrize("chunk_rows", [10, 1000])
def test_values_and_gradients_are_those_of_the_plain_twin(
    divergence: str, tail: str, scale: float, softcap: float | None, chunk_rows: int
) -> None:
    case = Case(tail)
    plain = 1.5 * sparse_divergence(divergence, case.logits(scale, softcap), case.targets, case.tail).sum()
    head = Head(case.weight, case.bias, scale, softcap)
    groups = [
        Group(20, (Loss(divergence, case.targets[:20], case.tail, 1.5),)),
        Group(N - 20, (Loss(divergence, case.targets[20:], case.tail, 1.5),)),
    ]
    total, each = fused_losses(case.hidden, head, groups, chunk_rows=chunk_rows)
    torch.testing.assert_close(total, plain.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(1.5 * each.sum(), plain.detach(), rtol=1e-9, atol=1e-9)
    wanted = torch.autograd.grad(3 * plain, case.inputs)
    for mine, theirs in zip(torch.autograd.grad(3 * total, case.inputs), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


@every_divergence
@both_tails
def test_several_losses_of_one_row_add_up(divergence: str, tail: str) -> None:
    case, next_ids = Case(tail), torch.arange(N) % V
    logits = case.logits()
    plain = 0.5 * sparse_divergence(divergence, logits, case.targets, case.tail).sum()
    plain = plain + 0.3 * functional.cross_entropy(logits, next_ids, reduction="sum")
    losses = (
        Loss(divergence, case.targets, case.tail, 0.5),
        Loss("fkl", certain_targets(next_ids), BucketTail(), 0.3),
        Loss("jsd", case.targets, case.tail, 0.0),
    )
    total, each = fused_losses(case.hidden, Head(case.weight, case.bias), [Group(N, losses)], chunk_rows=10)
    torch.testing.assert_close(total, plain.detach(), rtol=1e-9, atol=1e-9)
    assert each[2] > 0
    wanted = torch.autograd.grad(plain, case.inputs)
    for mine, theirs in zip(torch.autograd.grad(total, case.inputs), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


@every_divergence
@both_tails
@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_float32_is_as_true_as_the_plain_twin(divergence: str, tail: str, spread: float) -> None:
    """Wide logits make peaked rows, where a rest computed as 1 - sum has no correct digit."""
    exact, single = Case(tail, spread=spread), Case(tail, dtype=torch.float32, spread=spread)
    truth = sparse_divergence(divergence, exact.logits(), exact.targets, exact.tail).sum()
    wanted = torch.autograd.grad(truth, exact.inputs)
    loss = Loss(divergence, single.targets, single.tail, 1.0)
    total, _ = fused_losses(single.hidden, Head(single.weight, single.bias), [Group(N, (loss,))])
    assert abs(total.item() - truth.item()) <= 2e-6 * abs(truth.item()) + 1e-6
    for mine, theirs in zip(torch.autograd.grad(total, single.inputs), wanted, strict=True):
        assert (mine.double() - theirs).norm() <= 5e-6 * theirs.norm() + 1e-6


@every_divergence
@both_tails
def test_extreme_students_give_finite_losses_and_gradients(divergence: str, tail: str) -> None:
    case = Case(tail, dtype=torch.float32, spread=60.0)
    loss = Loss(divergence, case.targets, case.tail, 1.0)
    total, _ = fused_losses(case.hidden, Head(case.weight, case.bias), [Group(N, (loss,))])
    assert torch.isfinite(total)
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(total, case.inputs))


def test_a_frozen_head_gets_no_gradient_and_without_gradients_only_values_are_computed() -> None:
    case = Case("bucket")
    loss = Loss("jsd", case.targets, case.tail, 1.0)
    total, _ = fused_losses(case.hidden, Head(case.weight.detach()), [Group(N, (loss,))])
    (gradient,) = torch.autograd.grad(total, case.hidden)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        again, _ = fused_losses(case.hidden, Head(case.weight), [Group(N, (loss,))])
    torch.testing.assert_close(again, total.detach())
    assert not again.requires_grad

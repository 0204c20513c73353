"""Draws from the tail: exact probabilities, no bias, and a function of their place alone."""

import numpy as np
import pytest
import torch
from torch import Tensor

from distilllens.divergence import DIVERGENCES, sparse_divergence
from distilllens.divergence_spec import parse_divergence
from distilllens.tail_sampling import draw_tail, tail_uniforms
from distilllens.tails import SampledTail
from distilllens.targets import SparseTargets, split_top_k

V, K = 60, 5


def drawn(logits: Tensor, draws: int, *, seed: int = 0) -> SparseTargets:
    targets, tail = split_top_k(logits, K)
    positions = np.arange(len(logits))
    uniforms = tail_uniforms(seed=seed, layer=3, example=0, positions=positions, draws=draws)
    samples = draw_tail(tail, targets, torch.from_numpy(uniforms))
    return SparseTargets(targets.ids, targets.log_probs, targets.is_kept, targets.log_rest, samples=samples)


def test_draws_are_unique_ids_with_counts_outside_the_kept_ones_and_their_exact_probabilities() -> None:
    logits = torch.randn(20, V, generator=torch.Generator().manual_seed(0)) * 2
    targets = drawn(logits, 40)
    samples, log_p = targets.samples, logits.log_softmax(-1)
    assert samples is not None
    for row in range(20):
        found = samples.ids[row][samples.draws[row] > 0].tolist()
        assert found == sorted(set(found))
        assert not {*found} & {*targets.ids[row].tolist()}
        assert samples.draws[row].sum() == 40
        torch.testing.assert_close(samples.log_probs[row][samples.draws[row] > 0], log_p[row, found])


def test_a_draw_depends_on_its_place_and_on_nothing_else() -> None:
    at = {"seed": 7, "layer": 3, "example": 11}
    alone = tail_uniforms(**at, positions=np.array([5]), draws=4)
    among = tail_uniforms(**at, positions=np.array([2, 5, 9]), draws=4)
    np.testing.assert_array_equal(alone[0], among[1])
    for change in ({"seed": 8}, {"layer": 4}, {"example": 12}):
        assert not np.array_equal(tail_uniforms(**(at | change), positions=np.array([5]), draws=4), alone)


@pytest.mark.parametrize("name", ["fkl", "rkl", "jsd", "jsd:0.3", "jeffreys", "skew_fkl", "skew_rkl", "tvd"])
def test_the_estimate_is_unbiased(name: str) -> None:
    """A z-test over 10^5 draws: 2,500 rows of 40 draws each, |z| < 4."""
    generator = torch.Generator().manual_seed(1)
    teacher, student = torch.randn(2, 1, V, generator=generator, dtype=torch.float64) * 1.5
    targets = drawn(teacher.expand(2500, V).clone(), 40, seed=5)
    estimates = sparse_divergence(name, student.expand(2500, V), targets, SampledTail())
    spec = parse_divergence(name)
    exact = DIVERGENCES[spec.name](teacher.log_softmax(-1), student.log_softmax(-1), *spec.parameters)
    error = estimates.std() / 2500**0.5
    assert abs((estimates.mean() - exact).item()) < 4 * error.item() + 1e-6


def test_the_gradient_is_unbiased() -> None:
    generator = torch.Generator().manual_seed(2)
    teacher, student = torch.randn(2, 1, V, generator=generator, dtype=torch.float64)
    student = student.expand(2500, V).clone().requires_grad_()
    targets = drawn(teacher.expand(2500, V).clone(), 40)
    (gradients,) = torch.autograd.grad(sparse_divergence("jsd", student, targets, SampledTail()).sum(), student)
    one = student[:1].detach().requires_grad_()
    dense = DIVERGENCES["jsd"](teacher.log_softmax(-1), one.log_softmax(-1)).sum()
    (exact,) = torch.autograd.grad(dense, one)
    z = (gradients.mean(0) - exact[0]) / (gradients.std(0) / 2500**0.5 + 1e-12)
    assert z.abs().max() < 5  # the largest of sixty


def test_a_row_without_a_tail_gets_no_draw() -> None:
    certain = torch.full((1, V), -80.0)
    certain[0, :K] = 0.0
    samples = drawn(certain, 10).samples
    assert samples is not None
    assert samples.draws.sum() == 0


def test_a_token_without_probability_is_never_drawn() -> None:
    tail = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0, 0.0]])
    targets = SparseTargets(
        torch.tensor([[0]]), torch.tensor([[-100.0]]), torch.ones(1, 1, dtype=torch.bool), torch.tensor([0.0])
    )
    uniforms = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1 - 2**-53]], dtype=torch.float64)
    samples = draw_tail(tail, targets, uniforms)
    assert samples.ids[samples.draws > 0].tolist() == [1, 3]
    assert samples.draws[0, :2].tolist() == [2, 3]

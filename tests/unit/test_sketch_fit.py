"""The sketch's directions: PCA in a metric, against oracles that need no eigenvectors."""

import pytest
import torch
from torch import Tensor

from distilllens import calibration
from distilllens.fused import Head
from distilllens.sketch_fit import Moments, fit_sketch, head_metric
from distilllens_cache import SketchSpec

N, D, V = 400, 6, 30


@pytest.fixture
def states() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(N, D, generator=generator, dtype=torch.float64) * torch.tensor([4.0, 2.0, 1.0, 0.5, 0.2, 0.1])
    return mixed @ torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q + 1.0


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(V, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def moments_of(states: Tensor, tail: Tensor | None = None) -> Moments:
    moments = Moments.empty(D, V)
    tail = torch.rand(N, V, generator=torch.Generator().manual_seed(2)) if tail is None else tail
    for start in range(0, N, 150):
        moments.add(states[start : start + 150], tail[start : start + 150])
    return moments


def test_a_sketch_of_full_rank_gives_the_states_back(states: Tensor, weight: Tensor) -> None:
    fitted = fit_sketch(moments_of(states), weight, D)
    codes = (states - fitted.mean) @ fitted.encoder
    torch.testing.assert_close(fitted.mean + codes @ fitted.directions.T, states, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_its_logits_are_the_best_of_their_rank(states: Tensor, weight: Tensor, rank: int) -> None:
    """Eckart and Young: no rank-r approximation of the centred logits is nearer than their truncated SVD."""
    fitted = fit_sketch(moments_of(states), weight, rank, metric="logits")
    centred = (states - states.mean(0)) @ weight.T
    mine = (states - fitted.mean) @ fitted.encoder @ fitted.directions.T @ weight.T
    u, s, v = torch.linalg.svd(centred, full_matrices=False)
    best = (centred - u[:, :rank] * s[:rank] @ v[:rank]).square().sum()
    assert (centred - mine).square().sum().item() == pytest.approx(best.item(), rel=1e-4)


def test_codes_are_uncorrelated_with_the_deviations_it_names(states: Tensor, weight: Tensor) -> None:
    fitted = fit_sketch(moments_of(states), weight, 3)
    codes = (states - fitted.mean) @ fitted.encoder
    covariance = codes.T @ codes / N
    torch.testing.assert_close(covariance, torch.diag(fitted.deviations.square()), atol=1e-4, rtol=1e-4)
    assert (fitted.deviations.diff() < 0).all()


def test_the_first_directions_are_those_of_a_lower_rank(states: Tensor, weight: Tensor) -> None:
    moments = moments_of(states)
    small, large = fit_sketch(moments, weight, 2), fit_sketch(moments, weight, 4).first(2)
    torch.testing.assert_close(small.directions, large.directions)
    torch.testing.assert_close(small.encoder, large.encoder)


def test_the_fisher_metric_is_the_covariance_of_the_heads_rows_under_the_mean_tail(weight: Tensor) -> None:
    mass = torch.rand(V, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    shares = mass / mass.sum()
    wanted = weight.T @ (torch.diag(shares) - torch.outer(shares, shares)) @ weight
    torch.testing.assert_close(head_metric(weight, mass, chunk=7), wanted)
    torch.testing.assert_close(head_metric(weight, None, chunk=7), weight.T @ weight)
    torch.testing.assert_close(head_metric(weight, torch.zeros(V), chunk=7), weight.T @ weight)


def test_moments_do_not_depend_on_how_rows_are_cut(states: Tensor) -> None:
    tail = torch.rand(N, V, generator=torch.Generator().manual_seed(4))
    whole, parts = Moments.empty(D, V), moments_of(states, tail)
    whole.add(states, tail)
    torch.testing.assert_close(whole.outer, parts.outer)
    torch.testing.assert_close(whole.tail, parts.tail, atol=1e-4, rtol=1e-6)


def test_more_directions_than_the_states_have_are_refused(states: Tensor, weight: Tensor) -> None:
    with pytest.raises(ValueError, match="lower the rank"):
        fit_sketch(moments_of(states), weight, D + 1)


def test_states_that_vary_in_few_directions_have_a_sketch_all_the_same(weight: Tensor) -> None:
    flat = torch.ones(N, D, dtype=torch.float64)
    flat[:, 0] = torch.randn(N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    fitted = fit_sketch(moments_of(flat), weight, D)
    codes = (flat - fitted.mean) @ fitted.encoder
    assert torch.isfinite(codes).all()
    torch.testing.assert_close(fitted.mean + codes @ fitted.directions.T, flat, atol=1e-4, rtol=0)


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_sketch_that_is_rounded_in_blocks_of_the_head_has_the_same_bytes(
    states: Tensor, weight: Tensor, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = fit_sketch(moments_of(states), weight, 3)
    head = Head(weight.float(), torch.linspace(-1, 1, V) if has_bias else None)
    found = []
    for block in (V, 7):
        monkeypatch.setattr(calibration, "BLOCK_ROWS", block)
        sketch, _ = calibration.round_sketch(fitted, head, SketchSpec(3, 4), temperature=0.7)
        found.append((sketch.basis.tobytes(), sketch.offset.tobytes(), sketch.basis.shape, sketch.offset.shape))
    assert found[0] == found[1]
    assert found[0][2:] == ((V, 3), (V,))

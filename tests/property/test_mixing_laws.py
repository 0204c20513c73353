"""Mixing teachers: with whole vocabularies it is the dense mixture, and with less nothing is lost or made up."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distilllens.divergence import DIVERGENCES, sparse_divergence
from distilllens.fused import Group, Head, Loss, fused_losses
from distilllens.mixed_targets import MixedTail, Mixture, mix
from distilllens.tails import BucketTail, ProfileTail, SketchTail, Tail
from distilllens.targets import SparseTargets, take_top_k
from distilllens.widths import Width

V, N = 24, 5
seeds, widths = st.integers(0, 10_000), st.integers(1, V)
weights_of_two = st.floats(0.05, 0.95).map(lambda weight: (weight, 1 - weight))


def logits_of(seed: int, *, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def shaped(kind: str, seed: int, targets: SparseTargets) -> tuple[SparseTargets, Tail]:
    """Targets with a tail of ``kind``, made up: laws must hold for wrong shapes, too."""
    generator = torch.Generator().manual_seed(seed + 1)
    if kind == "bucket":
        return targets, BucketTail()
    if kind == "profile":
        return targets, ProfileTail(torch.randn(V, generator=generator).log_softmax(-1))
    codes = torch.randint(-7, 8, (N, 4), generator=generator).to(torch.int8)
    tail = SketchTail(torch.randn(V, 3, generator=generator) / 5, torch.randn(V, generator=generator))
    return SparseTargets(targets.ids, targets.log_probs, targets.is_kept, targets.log_rest, codes), tail


def teacher(kind: str, seed: int, k: int) -> tuple[SparseTargets, Tail]:
    """Rows of width up to ``k``, some of them narrower."""
    return shaped(kind, seed, take_top_k(logits_of(seed).float(), Width(k, 1, min_prob=0.01)))


def mixture(kinds: tuple[str, ...], seed: int, k: int, weights: tuple[float, ...]) -> tuple[list, list, Mixture]:
    some = [teacher(kind, seed + 100 * n, k + n if k + n <= V else k) for n, kind in enumerate(kinds)]
    targets, tails = [one for one, _ in some], [tail for _, tail in some]
    return targets, tails, mix(targets, tails, weights, vocab_size=V)


def completed(targets: list[SparseTargets], tails: list[Tail], weights: tuple[float, ...]) -> torch.Tensor:
    """The dense mixture of the completed targets, as probabilities."""
    rows = [tail.completed(one, V).double().exp() for one, tail in zip(targets, tails, strict=True)]
    return sum(weight * row for weight, row in zip(weights, rows, strict=True))


@pytest.mark.parametrize("divergence", ["fkl", "rkl", "jsd", "jeffreys", "tvd"])
@pytest.mark.parametrize("kind", ["bucket", "profile"])
@given(seed=seeds, weights=weights_of_two)
@settings(max_examples=15, deadline=None)
def test_with_whole_vocabularies_it_is_the_dense_mixture_in_value_and_gradient(
    divergence: str, kind: str, seed: int, weights: tuple[float, float]
) -> None:
    dense = [logits_of(seed + n).log_softmax(-1) for n in range(2)]
    some = [shaped(kind, seed, take_top_k(one.float(), V)) for one in dense]
    mixed = mix([one for one, _ in some], [tail for _, tail in some], weights, vocab_size=V)
    log_p = torch.stack([one + math.log(weight) for one, weight in zip(dense, weights, strict=True)]).logsumexp(0)
    found, wanted = (logits_of(seed + 7).requires_grad_() for _ in range(2))
    value = sparse_divergence(divergence, found, mixed.targets, mixed.tail)
    truth = DIVERGENCES[divergence](log_p, wanted.log_softmax(-1))
    torch.testing.assert_close(value, truth, atol=1e-5, rtol=1e-5)
    value.sum().backward()
    truth.sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kinds", [("profile", "profile"), ("profile", "sketch"), ("sketch", "sketch", "profile")])
@given(seed=seeds, k=widths)
@settings(max_examples=25, deadline=None)
def test_tails_with_a_shape_give_exactly_the_mixture_of_the_completed_targets(kinds, seed: int, k: int) -> None:
    weights = (0.5, 0.2, 0.3) if len(kinds) == 3 else (0.7, 0.3)
    targets, tails, mixed = mixture(kinds, seed, k, weights)
    assert isinstance(mixed.tail, MixedTail)
    found = mixed.tail.completed(mixed.targets, V).double().exp()
    torch.testing.assert_close(found, completed(targets, tails, weights), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kinds", [("bucket", "bucket"), ("bucket", "profile"), ("profile", "sketch")])
@given(seed=seeds, k=widths, weights=weights_of_two)
@settings(max_examples=25, deadline=None)
def test_kept_tokens_are_those_of_any_teacher_and_masses_are_those_of_the_mixture(kinds, seed, k, weights) -> None:
    targets, tails, mixed = mixture(kinds, seed, k, weights)
    dense, kept = completed(targets, tails, weights), mixed.targets.is_kept
    for row in range(N):
        ids = mixed.targets.ids[row, kept[row]]
        assert set(ids.tolist()) == {int(id) for one in targets for id in one.ids[row, one.is_kept[row]]}
        probs = mixed.targets.log_probs[row, kept[row]].double().exp()
        torch.testing.assert_close(probs, dense[row, ids], atol=1e-6, rtol=1e-4)
        assert (probs.diff() <= 0).all()
        outside = dense[row].sum() - dense[row, ids].sum()
        torch.testing.assert_close(mixed.targets.log_rest[row].double().exp(), outside, atol=1e-6, rtol=1e-3)
        assert (probs.sum() + mixed.targets.log_rest[row].double().exp()).item() == pytest.approx(1, abs=2e-6)
        assert kept[row, 0]  # the fused head fills rows up with their first token


@given(seed=seeds, k=widths, weights=weights_of_two)
@settings(max_examples=25, deadline=None)
def test_a_teacher_mixed_with_itself_is_itself_and_has_no_disagreement(seed, k, weights) -> None:
    (one, tail) = teacher("sketch", seed, k)
    mixed = mix([one, one], [tail, tail], weights, vocab_size=V)
    assert mixed.jsd.abs().max() < 1e-6
    torch.testing.assert_close(mixed.tail.completed(mixed.targets, V), tail.completed(one, V), atol=1e-4, rtol=1e-5)


@given(seed=seeds, weights=weights_of_two)
@settings(max_examples=25, deadline=None)
def test_disagreement_is_the_jsd_of_whole_vocabularies_and_a_lower_bound_of_it_else(seed, weights) -> None:
    dense = [logits_of(seed + n).log_softmax(-1) for n in range(2)]
    truth = DIVERGENCES["jsd"](dense[0], dense[1], weights[0])
    whole = mix([take_top_k(one.float(), V) for one in dense], [BucketTail()] * 2, weights, vocab_size=V).jsd
    torch.testing.assert_close(whole.double(), truth, atol=1e-5, rtol=1e-5)
    # Even tails within what is kept: exact there, and coarse outside.
    targets, tails, mixed = mixture(("profile", "sketch"), seed, 4, weights)
    log_p, log_q = (tail.completed(one, V).double() for one, tail in zip(targets, tails, strict=True))
    assert (mixed.jsd.double() <= DIVERGENCES["jsd"](log_p, log_q, weights[0]) + 1e-5).all()
    entropy = -sum(weight * math.log(weight) for weight in weights)
    assert (mixed.jsd >= 0).all()
    assert (mixed.jsd <= entropy + 1e-6).all()


def test_three_teachers_disagree_as_their_mean_divergence_from_the_mixture() -> None:
    dense, weights = [logits_of(n).log_softmax(-1) for n in range(3)], (0.5, 0.3, 0.2)
    mean = sum(weight * one.exp() for weight, one in zip(weights, dense, strict=True)).log()
    truth = sum(w * (one.exp() * (one - mean)).sum(-1) for w, one in zip(weights, dense, strict=True))
    found = mix([take_top_k(one.float(), V) for one in dense], [BucketTail()] * 3, weights, vocab_size=V).jsd
    torch.testing.assert_close(found.double(), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("divergence", ["fkl", "rkl", "jsd"])
@pytest.mark.parametrize("k", [1, 4, V])
def test_the_fused_head_sees_the_mixture_as_the_plain_one_does(divergence: str, k: int) -> None:
    _, _, mixed = mixture(("profile", "sketch"), 3, k, (0.6, 0.4))
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(N, 8, generator=generator), torch.randn(V, 8, generator=generator)
    found = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
    group = Group(N, (Loss(divergence, mixed.targets, mixed.tail, 0.5),))
    fused = fused_losses(found[0], Head(found[1]), [group], chunk_rows=3).total
    fused.backward()
    wanted = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
    plain = 0.5 * sparse_divergence(divergence, wanted[0] @ wanted[1].T, mixed.targets, mixed.tail).sum()
    plain.backward()
    torch.testing.assert_close(fused, plain, atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-4)

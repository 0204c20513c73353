"""Oracles of the divergences, on dense and on sparse targets."""

import math
from dataclasses import replace

import pytest
import torch

from distilllens.divergence import DIVERGENCES, jensen_shannon, sparse_divergence
from distilllens.tails import BucketTail, ProfileTail, RenormTail, SampledTail, SketchTail, Tail
from distilllens.targets import SparseTargets, TailSamples, take_top_k


def logs(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64).log()


def profile(vocab_size: int, seed: int = 0) -> ProfileTail:
    generator = torch.Generator().manual_seed(seed)
    return ProfileTail(torch.randn(vocab_size, generator=generator).log_softmax(-1))


TAILS = ("bucket", "profile", "sketch", "sampled", "renorm")
every_tail = pytest.mark.parametrize("tail", TAILS)


def make_tail(name: str, vocab_size: int, dtype: torch.dtype = torch.float32) -> Tail:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(vocab_size, 3, generator=generator, dtype=dtype)
    tails = {
        "bucket": BucketTail(),
        "profile": profile(vocab_size),
        "sketch": SketchTail(basis, basis.sum(-1)),
        "sampled": SampledTail(),
        "renorm": RenormTail(),
    }
    return tails[name]


def with_tail_rows(targets: SparseTargets, logits: torch.Tensor) -> SparseTargets:
    """The same with codes of rank 4, of which a sketch may read 3, and the first unkept token drawn twice, if any."""
    n, k = targets.ids.shape
    codes = torch.arange(n * 4).view(n, 4).remainder(15).sub(7).to(torch.int8)
    outside = logits.log_softmax(-1).scatter(-1, targets.ids, -torch.inf).max(-1)
    draws = torch.full((n, 1), 2 if k < logits.shape[-1] else 0)
    samples = TailSamples(outside.indices[:, None], outside.values[:, None].clamp_min(-100.0), draws)
    return replace(targets, codes=codes, samples=samples)


def test_jsd_of_the_papers_example_is_known() -> None:
    assert jensen_shannon(logs(0.7, 0.2, 0.1), logs(0.1, 0.2, 0.7)).item() == pytest.approx(0.253102, abs=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_distribution_diverges_from_itself_by_zero_and_never_less(name: str) -> None:
    log_p = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)).mul(4).log_softmax(-1)
    assert DIVERGENCES[name](log_p, log_p).abs().max() < 2e-6


def test_jsd_of_disjoint_distributions_is_ln_2() -> None:
    assert jensen_shannon(logs(1, 1e-300), logs(1e-300, 1)).item() == pytest.approx(math.log(2))


@every_tail
@pytest.mark.parametrize("name", DIVERGENCES)
def test_keeping_every_token_equals_the_dense_divergence_in_value_and_gradient(name: str, tail: str) -> None:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(20, 30, generator=generator).mul(3)
    student = torch.randn(20, 30, generator=generator).mul(3).double().requires_grad_()
    targets = with_tail_rows(take_top_k(teacher, 30), teacher)
    sparse = sparse_divergence(name, student, targets, make_tail(tail, 30))
    dense = DIVERGENCES[name](teacher.double().log_softmax(-1), student.log_softmax(-1))
    torch.testing.assert_close(sparse, dense, atol=1e-6, rtol=0)
    (of_sparse,) = torch.autograd.grad(sparse.sum(), student)
    (of_dense,) = torch.autograd.grad(dense.sum(), student)
    torch.testing.assert_close(of_sparse, of_dense, atol=1e-6, rtol=0)


@every_tail
@pytest.mark.parametrize("name", sorted({*DIVERGENCES} - {"akl"}))  # whose weights carry no gradient, by definition
def test_gradients_pass_gradcheck(name: str, tail: str) -> None:
    generator = torch.Generator().manual_seed(2)
    teacher = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    targets = with_tail_rows(take_top_k(teacher, 4), teacher)
    student = torch.randn(5, 12, generator=generator, dtype=torch.float64).requires_grad_()
    one = make_tail(tail, 12, torch.float64)
    assert torch.autograd.gradcheck(lambda z: sparse_divergence(name, z, targets, one), student)


@every_tail
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_teacher_that_is_nearly_certain_gives_finite_gradients(name: str, tail: str) -> None:
    certain = torch.tensor([[math.log(1 - 1e-7), *[math.log(1e-7 / 9)] * 9]])
    student = torch.zeros(1, 10).index_fill(1, torch.tensor([3]), 90.0).requires_grad_()
    loss = sparse_divergence(name, student, with_tail_rows(take_top_k(certain, 2), certain), make_tail(tail, 10))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


def test_bucket_is_zero_for_any_student_with_the_same_masses() -> None:
    targets = take_top_k(torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]]).log(), 2)
    other_tail = torch.tensor([[0.5, 0.3, 0.01, 0.01, 0.18]]).log()
    for name in DIVERGENCES:
        assert sparse_divergence(name, other_tail, targets, BucketTail()).item() == pytest.approx(0, abs=1e-6)


@every_tail
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_completed_target_does_not_diverge_from_its_own_target(name: str, tail: str) -> None:
    teacher = torch.randn(6, 20, generator=torch.Generator().manual_seed(4)).mul(2)
    targets, one = with_tail_rows(take_top_k(teacher, 5), teacher), make_tail(tail, 20)
    completed = one.completed(targets, 20)
    torch.testing.assert_close(completed.exp().sum(-1), torch.ones(6), atol=1e-5, rtol=0)
    assert sparse_divergence(name, completed, targets, one).abs().max() < 2e-6


@pytest.mark.parametrize("tail", ["profile", "sketch"])
def test_a_tail_with_a_shape_is_zero_only_for_the_completed_target(tail: str) -> None:
    logits = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]]).log()
    targets, tail = with_tail_rows(take_top_k(logits, 2), logits), make_tail(tail, 5)
    completed = tail.completed(targets, 5)
    other = completed.clone()
    other[0, [2, 3]] = completed[0, [3, 2]]
    for name in DIVERGENCES:
        assert sparse_divergence(name, completed, targets, tail).item() == pytest.approx(0, abs=1e-6)
        assert sparse_divergence(name, other, targets, tail).item() > 1e-4


def test_rows_that_keep_fewer_tokens_are_read_by_their_count_and_not_by_their_ids() -> None:
    teacher = torch.tensor([[0.1, 0.6, 0.2, 0.1], [0.4, 0.1, 0.3, 0.2]]).log()
    student = torch.randn(2, 4, generator=torch.Generator().manual_seed(3))
    wide = take_top_k(teacher, 2)
    narrow = take_top_k(teacher[:1], 1)
    ids = torch.cat([narrow.ids, torch.zeros(1, 1, dtype=torch.long)], -1)
    padded = SparseTargets(
        ids=torch.cat([ids, wide.ids[1:]]),
        log_probs=torch.cat([torch.cat([narrow.log_probs, torch.full((1, 1), -100.0)], -1), wide.log_probs[1:]]),
        is_kept=torch.tensor([[True, False], [True, True]]),
        log_rest=torch.cat([narrow.log_rest, wide.log_rest[1:]]),
    )
    for tail in (BucketTail(), profile(4)):
        for name in DIVERGENCES:
            both = sparse_divergence(name, student, padded, tail)
            alone = sparse_divergence(name, student[:1], narrow, tail)
            torch.testing.assert_close(both[0], alone[0], atol=1e-6, rtol=0)
            torch.testing.assert_close(both[1], sparse_divergence(name, student, wide, tail)[1], atol=1e-6, rtol=0)


def test_adaptive_kl_weighs_forward_and_reverse_by_the_errors_in_head_and_tail() -> None:
    log_p, log_q = logs(0.4, 0.3, 0.2, 0.1), logs(0.25, 0.25, 0.25, 0.25).requires_grad_()
    # Within mu = 0.5 lies only the first outcome: 0.15 of 0.4 in errors.
    share = 0.15 / 0.40
    wanted = share * DIVERGENCES["fkl"](log_p, log_q) + (1 - share) * DIVERGENCES["rkl"](log_p, log_q)
    found = DIVERGENCES["akl"](log_p, log_q, 0.5)
    assert found.item() == pytest.approx(wanted.item())
    (mine,), (theirs,) = torch.autograd.grad(found, log_q), torch.autograd.grad(wanted, log_q)
    torch.testing.assert_close(mine, theirs)


def test_renorm_sees_only_the_shape_of_the_kept_tokens() -> None:
    targets = take_top_k(torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]]).log(), 2)
    same_shape = torch.tensor([[0.05, 0.03, 0.3, 0.3, 0.32]]).log()
    assert sparse_divergence("jsd", same_shape, targets, RenormTail()).item() == pytest.approx(0, abs=1e-6)


def test_a_sketch_of_full_rank_is_the_dense_teacher() -> None:
    """The reason for the name: with every direction, unrounded, nothing of the teacher is lost."""
    generator = torch.Generator().manual_seed(5)
    states, weight = torch.randn(9, 6, generator=generator), torch.randn(40, 6, generator=generator)
    teacher, student = states @ weight.T, torch.randn(9, 40, generator=generator)
    kept = take_top_k(teacher, 3)
    targets = replace(kept, codes=states)
    tail = SketchTail(weight, torch.zeros(40))
    torch.testing.assert_close(tail.completed(targets, 40), teacher.log_softmax(-1), atol=1e-5, rtol=0)
    at = torch.arange(40).expand(9, -1)
    outside = torch.ones(9, 40, dtype=torch.bool).scatter(-1, kept.ids, False)
    torch.testing.assert_close(tail.log_probs_at(targets, at)[outside], teacher.log_softmax(-1)[outside])
    torch.testing.assert_close(tail.shape(targets, slice(10, 20)), tail.shape(targets)[:, 10:20])
    for name in DIVERGENCES:
        dense = DIVERGENCES[name](teacher.log_softmax(-1), student.log_softmax(-1))
        torch.testing.assert_close(sparse_divergence(name, student, targets, tail), dense, atol=1e-5, rtol=1e-5)

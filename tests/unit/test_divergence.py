"""Oracles of the divergences, on dense and on sparse targets."""

import math

import pytest
import torch

from distilllens.divergence import DIVERGENCES, jensen_shannon, sparse_divergence
from distilllens.tails import BucketTail, ProfileTail
from distilllens.targets import SparseTargets, take_top_k


def logs(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64).log()


def profile(vocab_size: int, seed: int = 0) -> ProfileTail:
    generator = torch.Generator().manual_seed(seed)
    return ProfileTail(torch.randn(vocab_size, generator=generator).log_softmax(-1))


def test_jsd_of_the_papers_example_is_known() -> None:
    assert jensen_shannon(logs(0.7, 0.2, 0.1), logs(0.1, 0.2, 0.7)).item() == pytest.approx(0.253102, abs=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_distribution_diverges_from_itself_by_zero_and_never_less(name: str) -> None:
    log_p = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)).mul(4).log_softmax(-1)
    assert DIVERGENCES[name](log_p, log_p).abs().max() < 2e-6


def test_jsd_of_disjoint_distributions_is_ln_2() -> None:
    assert jensen_shannon(logs(1, 1e-300), logs(1e-300, 1)).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("tail", ["bucket", "profile"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_keeping_every_token_equals_the_dense_divergence_in_value_and_gradient(name: str, tail: str) -> None:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(20, 30, generator=generator).mul(3)
    student = torch.randn(20, 30, generator=generator).mul(3).double().requires_grad_()
    targets = take_top_k(teacher, 30)
    sparse = sparse_divergence(name, student, targets, BucketTail() if tail == "bucket" else profile(30))
    dense = DIVERGENCES[name](teacher.double().log_softmax(-1), student.log_softmax(-1))
    torch.testing.assert_close(sparse, dense, atol=1e-6, rtol=0)
    (of_sparse,) = torch.autograd.grad(sparse.sum(), student)
    (of_dense,) = torch.autograd.grad(dense.sum(), student)
    torch.testing.assert_close(of_sparse, of_dense, atol=1e-6, rtol=0)


@pytest.mark.parametrize("tail", ["bucket", "profile"])
@pytest.mark.parametrize("name", sorted({*DIVERGENCES} - {"akl"}))  # whose weights carry no gradient, by definition
def test_gradients_pass_gradcheck(name: str, tail: str) -> None:
    generator = torch.Generator().manual_seed(2)
    targets = take_top_k(torch.randn(5, 12, generator=generator), 4)
    targets = SparseTargets(targets.ids, targets.log_probs.double(), targets.is_kept, targets.log_rest.double())
    student = torch.randn(5, 12, generator=generator, dtype=torch.float64).requires_grad_()
    shape = BucketTail() if tail == "bucket" else profile(12)
    assert torch.autograd.gradcheck(lambda z: sparse_divergence(name, z, targets, shape), student)


@pytest.mark.parametrize("tail", ["bucket", "profile"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_teacher_that_is_nearly_certain_gives_finite_gradients(name: str, tail: str) -> None:
    certain = torch.tensor([[math.log(1 - 1e-7), *[math.log(1e-7 / 9)] * 9]])
    student = torch.zeros(1, 10).index_fill(1, torch.tensor([3]), 90.0).requires_grad_()
    loss = sparse_divergence(name, student, take_top_k(certain, 2), BucketTail() if tail == "bucket" else profile(10))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


def test_bucket_is_zero_for_any_student_with_the_same_masses() -> None:
    targets = take_top_k(torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]]).log(), 2)
    other_tail = torch.tensor([[0.5, 0.3, 0.01, 0.01, 0.18]]).log()
    for name in DIVERGENCES:
        assert sparse_divergence(name, other_tail, targets, BucketTail()).item() == pytest.approx(0, abs=1e-6)


def test_profile_is_zero_only_for_the_completed_target() -> None:
    targets, tail = take_top_k(torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]]).log(), 2), profile(5)
    completed = tail.teacher(targets)
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

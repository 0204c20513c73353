"""Laws of sparse divergences that hold for every teacher, student and width."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distilllens.divergence import DIVERGENCES, sparse_divergence
from distilllens.divergence_spec import parse_divergence
from distilllens.tails import BucketTail, ProfileTail, log_mass_outside
from distilllens.targets import take_top_k

V = 40
seeds = st.integers(0, 2**31)
widths = st.integers(1, V - 1)
names = st.sampled_from(sorted(DIVERGENCES))
F_DIVERGENCES = st.sampled_from(
    ["fkl", "rkl", "fkl+rkl", "jsd", "jsd:0.2", "jeffreys", "skew_fkl", "skew_rkl:0.3", "tvd"]
)
UPPER = {"jsd": math.log(2), "skew_fkl": -math.log(0.1), "skew_rkl": -math.log(0.1), "tvd": 1.0}


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = 1 + 5 * torch.rand((), generator=generator)
    teacher, student = torch.randn(2, 8, V, generator=generator, dtype=torch.float64) * scale
    return teacher, student


@given(seeds, widths, F_DIVERGENCES)
@settings(deadline=None)
def test_a_bucket_never_exceeds_the_dense_divergence(seed: int, k: int, name: str) -> None:
    teacher, student = pair(seed)
    spec = parse_divergence(name)
    dense = DIVERGENCES[spec.name](teacher.log_softmax(-1), student.log_softmax(-1), *spec.parameters)
    bucket = sparse_divergence(name, student, take_top_k(teacher, k), BucketTail())
    assert (bucket <= dense + 1e-5).all()


@given(seeds, widths)
@settings(deadline=None)
def test_the_bucket_certificate_bounds_the_dense_jsd(seed: int, k: int) -> None:
    teacher, student = pair(seed)
    targets = take_top_k(teacher, k)
    rest = targets.log_rest.exp()
    log_q = student.log_softmax(-1)
    student_rest = log_mass_outside(log_q, targets).exp()
    m = (rest + student_rest) / 2
    w = rest / (2 * m)
    h = -(w * w.log() + (1 - w) * (1 - w).log())
    dense = DIVERGENCES["jsd"](teacher.log_softmax(-1), log_q)
    assert (dense <= sparse_divergence("jsd", student, targets, BucketTail()) + m * h + 1e-5).all()


@given(seeds, widths, names, st.booleans())
@settings(deadline=None)
def test_divergences_stay_in_their_range(seed: int, k: int, name: str, bucket: bool) -> None:
    teacher, student = pair(seed)
    tail = BucketTail() if bucket else ProfileTail(teacher.mean(0).log_softmax(-1))
    value = sparse_divergence(name, student, take_top_k(teacher, k), tail)
    assert (value >= -1e-6).all()
    assert (value <= UPPER.get(name, math.inf) + 1e-6).all()


@given(seeds, widths)
@settings(deadline=None)
def test_completed_targets_are_distributions_that_keep_the_top_k(seed: int, k: int) -> None:
    teacher, other = pair(seed)
    targets = take_top_k(teacher, k)
    completed = ProfileTail(other.mean(0).log_softmax(-1)).completed(targets, V)
    torch.testing.assert_close(completed.exp().sum(-1), torch.ones(8, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(completed.gather(-1, targets.ids), targets.log_probs)


@given(seeds, st.integers(1, V))
@settings(deadline=None)
def test_kept_and_rest_make_one(seed: int, k: int) -> None:
    targets = take_top_k(pair(seed)[0] * 3, k)
    mass = targets.log_probs.double().exp().sum(-1) + targets.log_rest.double().exp()
    torch.testing.assert_close(mass, torch.ones(8, dtype=torch.float64), atol=1e-6, rtol=0)


@given(seeds, widths, names, st.permutations(range(8)))
@settings(deadline=None)
def test_the_order_of_rows_does_not_matter(seed: int, k: int, name: str, order: list[int]) -> None:
    teacher, student = pair(seed)
    value = sparse_divergence(name, student, take_top_k(teacher, k), BucketTail())
    permuted = sparse_divergence(name, student[order], take_top_k(teacher[order], k), BucketTail())
    torch.testing.assert_close(permuted, value[order])


@given(seeds)
@settings(deadline=None)
def test_the_families_meet_where_their_papers_say(seed: int) -> None:
    log_p, log_q = (logits.log_softmax(-1) for logits in pair(seed))
    fkl, rkl = (DIVERGENCES[name](log_p, log_q) for name in ("fkl", "rkl"))
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(DIVERGENCES["skew_fkl"](log_p, log_q, 1e-30), fkl, **close)
    torch.testing.assert_close(DIVERGENCES["skew_rkl"](log_p, log_q, 1e-30), rkl, **close)
    torch.testing.assert_close(DIVERGENCES["ab"](log_p, log_q, 1.0, 1e-7), fkl, **close)
    torch.testing.assert_close(DIVERGENCES["ab"](log_p, log_q, 1e-7, 1.0), rkl, **close)
    low, high = torch.minimum(fkl, rkl), torch.maximum(fkl, rkl)
    akl = DIVERGENCES["akl"](log_p, log_q)
    assert ((low - 1e-9 <= akl) & (akl <= high + 1e-9)).all()


@given(seeds)
@settings(deadline=None)
def test_symmetric_divergences_are_symmetric(seed: int) -> None:
    log_p, log_q = (logits.log_softmax(-1) for logits in pair(seed))
    for name in ("jsd", "jeffreys", "tvd"):
        torch.testing.assert_close(DIVERGENCES[name](log_p, log_q), DIVERGENCES[name](log_q, log_p))

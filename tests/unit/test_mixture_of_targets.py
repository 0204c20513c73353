"""A mixture of targets is the weighted mean of the distributions that they stand for."""

import dataclasses
import math

import pytest
import torch

from distilllens.mixed_targets import mix
from distilllens.tails import BucketTail, ProfileTail, SketchTail, Tail
from distilllens.targets import SparseTargets, take_top_k

V, RANK, WEIGHTS = 60, 3, (0.8, 0.15, 0.05)


def teachers() -> tuple[list[SparseTargets], list[Tail]]:
    """Three teachers of the same rows, each with a tail of its own."""
    generator = torch.Generator().manual_seed(0)
    targets = [take_top_k(torch.randn(7, V, generator=generator) * 2, k) for k in (5, 9, 4)]
    codes = torch.randint(-9, 9, (7, RANK), generator=generator)
    targets[1] = dataclasses.replace(targets[1], codes=codes)
    sketch = SketchTail(torch.randn(V, RANK, generator=generator) / 4, torch.randn(V, generator=generator), 8.0)
    profiles = [ProfileTail(torch.randn(V, generator=generator).log_softmax(-1)) for _ in range(2)]
    return targets, [profiles[0], sketch, profiles[1]]


def mean(targets: list[SparseTargets], tails: list[Tail]) -> torch.Tensor:
    each = zip(targets, tails, WEIGHTS, strict=True)
    return sum((w * tail.completed(one, V).double().exp() for one, tail, w in each), torch.zeros(7, V).double())


def test_tails_with_shapes_are_mixed_by_weight_token_by_token() -> None:
    targets, tails = teachers()
    found = mix(targets, tails, WEIGHTS, vocab_size=V)
    completed = found.tail.completed(found.targets, V).double().exp()
    torch.testing.assert_close(completed, mean(targets, tails), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("bucketed", [0, 1, 2])
def test_beside_a_bucket_the_kept_tokens_and_the_rest_have_the_mass_of_the_mean(bucketed: int) -> None:
    targets, tails = teachers()
    tails[bucketed] = BucketTail()
    found = mix(targets, tails, WEIGHTS, vocab_size=V)
    dense, kept = mean(targets, tails), found.targets.is_kept
    of_kept = dense.gather(-1, found.targets.ids)
    torch.testing.assert_close(found.targets.log_probs.double().exp()[kept], of_kept[kept], atol=1e-6, rtol=1e-4)
    rest = 1 - (of_kept * kept).sum(-1)
    torch.testing.assert_close(found.targets.log_rest.double().exp(), rest, atol=1e-6, rtol=1e-3)
    assert found.jsd.max() < -sum(w * math.log(w) for w in WEIGHTS)

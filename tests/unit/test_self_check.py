"""Before step 1: wrong targets, a loss that ignores them, and shifted caches are all noticed."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distilllens import self_check
from distilllens.collate import Batch, collate
from distilllens.objective import Objective
from distilllens.self_check import check_alignment, check_objective
from distilllens.tails import BucketTail, ProfileTail
from distilllens.targets import SparseTargets, take_top_k, unstack_targets
from distilllens_cache import CachedExample, LayerTargets

V = 50


def batch(tail: str) -> Batch:
    generator = torch.Generator().manual_seed(0)
    targets = {
        layer: unstack_targets(take_top_k(torch.randn(5, V, generator=generator) * 3, 8), [5])[0] for layer in (2, 4)
    }
    example = CachedExample(0, "0", np.arange(8, dtype=np.uint32), np.arange(5, dtype=np.uint32), targets)
    profile = ProfileTail(torch.randn(V, generator=generator).log_softmax(-1))
    return collate([example], {layer: BucketTail() if tail == "bucket" else profile for layer in (2, 4)})


def objective(divergence: str = "jsd") -> Objective:
    return Objective(task=divergence, lens_divergence=divergence, pairs=((1, 2),), lens_weight=1.0, kd_ratio=1.0)


@pytest.mark.parametrize("tail", ["bucket", "profile"])
@pytest.mark.parametrize("divergence", ["fkl", "rkl", "fkl+rkl", "jsd", "jeffreys", "akl", "skew_fkl", "tvd", "ab"])
def test_right_targets_pass_with_every_divergence(divergence: str, tail: str) -> None:
    check_objective(batch(tail), objective(divergence), vocab_size=V)


@pytest.mark.parametrize("tail", ["bucket", "profile"])
def test_targets_that_are_no_distribution_are_refused(tail: str) -> None:
    good = batch(tail)
    bad = {layer: replace(targets, log_probs=targets.log_probs + 0.5) for layer, targets in good.targets.items()}
    with pytest.raises(ValueError, match="self-check of fkl at teacher layer 2"):
        check_objective(replace(good, targets=bad), objective("fkl"), vocab_size=V)


def test_a_loss_that_cannot_tell_targets_apart_is_refused(monkeypatch) -> None:
    def blind(name: str, logits: torch.Tensor, targets: SparseTargets, tail: object) -> torch.Tensor:
        return logits.sum(-1) * 0

    monkeypatch.setattr(self_check, "sparse_divergence", blind)
    with pytest.raises(ValueError, match="cannot tell them apart"):
        check_objective(batch("bucket"), objective(), vocab_size=V)


class Reader:
    """The part of a reader that the canary uses: a copying teacher's targets, stored ``shift`` positions too late."""

    def __init__(self, shift: int) -> None:
        random = np.random.default_rng(0)
        self.manifest = SimpleNamespace(identity=SimpleNamespace(layers=(4,)))
        self._examples = []
        for index in range(20):
            token_ids = random.permutation(V)[:30].astype(np.uint32)
            positions = np.arange(5, 25, dtype=np.uint32)
            targets = LayerTargets(
                counts=np.ones(20, np.int32),
                ids=token_ids[positions.astype(int) + 1 - shift],
                log_probs=np.full(20, -0.1, np.float32),
                log_rest=np.full(20, np.log1p(-np.exp(-0.1)), np.float32),
            )
            self._examples.append(CachedExample(index, str(index), token_ids, positions, {4: targets}))

    def __iter__(self) -> Iterator[CachedExample]:
        return iter(self._examples)


def test_an_aligned_cache_passes_and_a_shifted_one_is_refused() -> None:
    assert "belong" in check_alignment(Reader(0))  # type: ignore[arg-type]
    for shift in (1, -1):
        with pytest.raises(ValueError, match="--allow-mismatch alignment"):
            check_alignment(Reader(shift))  # type: ignore[arg-type]
    assert check_alignment(Reader(1), is_allowed=True)  # type: ignore[arg-type]

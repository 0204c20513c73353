"""Which positions are trained on: as many as the data say, the highest of each example, however a step is divided."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from distilllens.batches import Steps
from distilllens.collate import Batch, collate
from distilllens.divergence import cross_entropy, forward_kl, sparse_divergence
from distilllens.lens import LogitLens
from distilllens.lens_rows import ALL_ROWS, LensRows
from distilllens.objective import Gate, Objective, Positions
from distilllens.positions import num_taken, take_highest
from distilllens.student import Student
from distilllens.tails import BucketTail
from distilllens.targets import take_top_k, unstack_targets
from distilllens_cache import CachedExample

V = 320
LENGTHS = (9, 5, 12, 7)
OBJECTIVE = Objective(task="rkl", lens_divergence="jsd", pairs=((1, 2),), lens_weight=0.7, kd_ratio=0.6)


def examples(seed: int = 0) -> list[CachedExample]:
    """Examples of 2, 3, 4 and 5 targets at teacher layers 2 and 4."""
    random, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    made = []
    for index, length in enumerate(LENGTHS):
        positions = np.sort(random.choice(length - 1, size=2 + index, replace=False)).astype(np.uint32)
        rows = {layer: take_top_k(torch.randn(len(positions), V, generator=generator) * 3, 8) for layer in (2, 4)}
        targets = {layer: unstack_targets(row, [len(positions)])[0] for layer, row in rows.items()}
        made.append(
            CachedExample(index, str(index), random.integers(0, V, length).astype(np.uint32), positions, targets)
        )
    return made


def batch_of(some: list[CachedExample], lens_rows: LensRows = ALL_ROWS) -> Batch:
    return collate(some, {2: BucketTail(), 4: BucketTail()}, lens_rows=lens_rows)


def build(tiny_model, objective: Objective) -> Student:
    model = tiny_model("llama")
    return Student(model, LogitLens(model, lens_norm="final", vocab_size=V), objective, chunk_rows=4)


def with_positions(share: float, by: str = "loss", **settings: object) -> Objective:
    return dataclasses.replace(OBJECTIVE, positions=Positions(share, by), **settings)


@given(st.integers(0, 2000), st.integers(1, 100))
@example(25, 28)
def test_the_number_taken_is_the_share_rounded_up(num_targets: int, percent: int) -> None:
    taken = num_taken(np.array([num_targets]), percent / 100)[0]
    assert taken == -(-num_targets * percent // 100)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.floats(0.01, 1.0), st.integers(0, 99))
def test_each_example_keeps_its_highest(lengths: list[int], share: float, seed: int) -> None:
    scores = torch.randint(0, 5, (sum(lengths),), generator=torch.Generator().manual_seed(seed)).float()
    chosen = take_highest(scores, lengths, share)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    first = 0
    for length, count in zip(lengths, num_taken(np.array(lengths), share), strict=True):
        own = [row - first for row in chosen.tolist() if first <= row < first + length]
        by_score = sorted(range(length), key=lambda row: (-scores[first + row].item(), row))
        assert own == sorted(by_score[:count])
        first += length


@pytest.mark.parametrize("by", ["loss", "entropy"])
@pytest.mark.parametrize(
    "settings", [{}, {"kd_ratio": 0.0}, {"task": "ce"}, {"gate": Gate(1.5)}], ids=["mixed", "ce", "task ce", "gate"]
)
def test_positions_are_chosen_by_the_final_layers_loss_or_entropy(tiny_model, by: str, settings: dict) -> None:
    objective = with_positions(0.5, by, **settings)
    student, batch = build(tiny_model, objective), batch_of(examples())
    logits = student.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[batch.is_target]
    final, ce = batch.targets[4], cross_entropy(logits, batch.next_ids)
    seen = BucketTail().outcomes(logits.log_softmax(-1), final)
    task = ce if objective.task == "ce" else sparse_divergence("rkl", logits, final, BucketTail())
    if settings.get("gate"):
        entropy = -(seen.log_p.exp() * seen.log_p * seen.counts).sum(-1)
        task = torch.where(entropy > 1.5, forward_kl(seen.log_p, seen.log_q, counts=seen.counts), task)
    scores = (1 - objective.kd_ratio) * ce + objective.kd_ratio * task
    if by == "entropy":
        scores = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    chosen = take_highest(scores.detach(), batch.num_targets, 0.5)
    assert chosen.tolist() != list(range(len(chosen)))
    wanted = build(tiny_model, dataclasses.replace(objective, positions=Positions()))(batch.at(chosen))
    found = student(batch)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-5)
    mine, theirs = (torch.autograd.grad(loss, list(one.parameters()), allow_unused=True) for one, loss in (
        (student, found["total"]), (student, build_on(student, objective)(batch.at(chosen))["total"])
    ))  # fmt: skip
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def build_on(student: Student, objective: Objective) -> Student:
    return Student(student.model, student.lens, dataclasses.replace(objective, positions=Positions()), chunk_rows=4)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_sum_to_one_step_whose_denominator_the_index_knows(tiny_model, size: int) -> None:
    some, student = examples(), build(tiny_model, with_positions(0.4, kd_ratio=1.0))
    whole = student(batch_of(some))
    parts = [student(batch_of(some[start : start + size])) for start in range(0, 4, size)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, atol=1e-4, rtol=1e-5)

    class Source:
        num_targets = np.array([len(one.target_positions) for one in some])
        shard_of = np.zeros(4, np.int64)

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> CachedExample:
            return some[index]

    denominator = Steps(Source(), 0, 4 // size, size, 1, positions_share=0.4).num_targets(0)
    assert denominator == sum(math.ceil(0.4 * n) for n in (2, 3, 4, 5)) == 7
    batch = batch_of(some)
    chosen = take_highest(torch.rand(len(batch.next_ids)), batch.num_targets, 0.4)
    assert len(batch.at(chosen).next_ids) == denominator


def test_a_batch_at_some_rows_is_made_of_these_rows_alone() -> None:
    some = examples()
    rows = LensRows(0.5, {1: torch.tensor([0, 3, 4, 8, 13])})
    batch = batch_of(some, rows)
    chosen = torch.tensor([0, 3, 4, 10, 13])
    part = batch.at(chosen)
    assert part.num_targets == (1, 2, 0, 2)
    assert torch.equal(part.next_ids, batch.next_ids[chosen])
    assert torch.equal(part.targets[2].log_probs, batch.targets[2].log_probs[chosen])
    assert part.lens_rows.at(1).tolist() == [0, 1, 2, 4]
    flat = batch.is_target.flatten().nonzero()[:, 0]
    assert torch.equal(part.is_target.flatten().nonzero()[:, 0], flat[chosen])

"""The student's sums: no partition, chunk or order changes them, and each part means what it says."""

import numpy as np
import pytest
import torch

from distilllens.collate import Batch, collate
from distilllens.divergence import sparse_divergence
from distilllens.lens import LogitLens
from distilllens.student import Objective, Student
from distilllens.tails import BucketTail
from distilllens.targets import take_top_k, unstack_targets
from distilllens_cache import CachedExample

V = 320
OBJECTIVE = Objective(task="fkl", lens_divergence="jsd", pairs=((1, 2), (3, 4)), lens_weight=0.7, kd_ratio=0.6)
LENGTHS = (9, 5, 12, 7)


def examples(seed: int = 0) -> list[CachedExample]:
    """Examples of different lengths with different masks and random targets at teacher layers 2, 4 and 6."""
    random, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    made = []
    for index, length in enumerate(LENGTHS):
        positions = np.sort(random.choice(length - 1, size=2 + index % 3, replace=False)).astype(np.uint32)
        rows = {layer: take_top_k(torch.randn(len(positions), V, generator=generator) * 3, 8) for layer in (2, 4, 6)}
        targets = {layer: unstack_targets(row, [len(positions)])[0] for layer, row in rows.items()}
        made.append(
            CachedExample(index, str(index), random.integers(0, V, length).astype(np.uint32), positions, targets)
        )
    return made


def batch_of(some: list[CachedExample]) -> Batch:
    return collate(some, {layer: BucketTail() for layer in (2, 4, 6)})


def build(tiny_model, *, chunk_rows: int = 4, objective: Objective = OBJECTIVE, architecture: str = "llama") -> Student:
    model = tiny_model(architecture)
    return Student(model, LogitLens(model, lens_norm="final", vocab_size=V), objective, chunk_rows=chunk_rows)


def gradient(student: Student, batches: list[Batch]) -> torch.Tensor:
    """The gradient of a step made of micro-batches: sums over target positions, divided once."""
    count = sum(len(batch.next_ids) for batch in batches)
    for batch in batches:
        (student(batch)["total"] / count).backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_a_batch_equals_the_sum_of_its_examples(tiny_model, architecture: str) -> None:
    student, some = build(tiny_model, architecture=architecture), examples()
    together = student(batch_of(some))
    alone = [student(batch_of([one])) for one in some]
    for name in together:
        torch.testing.assert_close(together[name], sum(one[name] for one in alone), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_accumulation_with_ragged_lengths_gives_one_gradient(tiny_model, micro_batches: int) -> None:
    some, size = examples(), 4 // micro_batches
    whole = gradient(build(tiny_model), [batch_of(some)])
    parts = [batch_of(some[start : start + size]) for start in range(0, 4, size)]
    torch.testing.assert_close(gradient(build(tiny_model), parts), whole, atol=1e-6, rtol=1e-5)


def test_the_order_of_examples_does_not_matter(tiny_model) -> None:
    student, some = build(tiny_model), examples()
    forward, backward = student(batch_of(some)), student(batch_of(some[::-1]))
    for name in forward:
        torch.testing.assert_close(forward[name], backward[name], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
def test_the_size_of_a_chunk_changes_neither_losses_nor_gradients(tiny_model, chunk_rows: int) -> None:
    batch = batch_of(examples())
    torch.testing.assert_close(
        gradient(build(tiny_model, chunk_rows=chunk_rows), [batch]),
        gradient(build(tiny_model), [batch]),
        atol=1e-6,
        rtol=1e-5,
    )


def test_each_pair_is_computed_from_its_own_layers(tiny_model) -> None:
    student, batch = build(tiny_model), batch_of(examples())
    sums = student(batch)
    hidden = student.lens.hidden_states(batch.input_ids, batch.attention_mask, [1, 3, 4])
    for mine, teachers in ((1, 2), (3, 4)):
        logits = student.lens.logits(hidden[mine][batch.is_target], mine)
        wanted = sparse_divergence("jsd", logits, batch.targets[teachers], BucketTail()).sum()
        torch.testing.assert_close(sums[f"lens/{mine}:{teachers}"], wanted.detach(), atol=1e-4, rtol=1e-5)
    logits = student.lens.logits(hidden[4][batch.is_target], 4)
    task = sparse_divergence("fkl", logits, batch.targets[6], BucketTail()).sum()
    torch.testing.assert_close(sums["task"], task.detach(), atol=1e-4, rtol=1e-5)
    lens = (sums["lens/1:2"] + sums["lens/3:4"]) / 2
    wanted = 0.4 * sums["ce"] + 0.6 * (sums["task"] + 0.7 * lens)
    torch.testing.assert_close(sums["total"].detach(), wanted)


def test_the_cross_entropy_is_that_of_transformers(tiny_model) -> None:
    student, batch = build(tiny_model), batch_of(examples())
    labels = torch.full_like(batch.input_ids, -100)
    labels[:, 1:] = torch.where(batch.is_target[:, :-1], batch.input_ids[:, 1:], -100)
    own = student.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
    torch.testing.assert_close(student(batch)["ce"] / len(batch.next_ids), own.detach(), atol=1e-5, rtol=1e-5)


def test_a_pair_without_weight_is_not_computed_and_needs_no_targets(tiny_model) -> None:
    objective = Objective(task="ce", lens_divergence="jsd", pairs=((1, 2),), lens_weight=0.0, kd_ratio=1.0)
    student = build(tiny_model, objective=objective)
    assert objective.teacher_layers(6) == ()
    sums = student(collate(examples(), {}))
    assert set(sums) == {"total", "ce", "task"}
    torch.testing.assert_close(sums["total"].detach(), sums["ce"])


def test_measuring_counts_agreement_and_calibration_over_the_same_rows(tiny_model) -> None:
    student, batch = build(tiny_model), batch_of(examples())
    with torch.no_grad():
        sums = student(batch, measured_pairs=((1, 2),))
        logits = student.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[batch.is_target]
    top = logits.argmax(-1)
    assert sums["agrees"].item() == (top == batch.targets[6].ids[:, 0]).sum().item()
    assert sums["correct"].sum().item() == (top == batch.next_ids).sum().item()
    assert sums["confidence"].sum().item() == pytest.approx(logits.softmax(-1).max(-1).values.sum().item(), rel=1e-4)
    assert set(sums) == {"kl", "ce", "agrees", "confidence", "correct", "lens/1:2"}

"""The student's sums: no partition, chunk or order changes them, and each part means what it says."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import distilllens.student as student_module
from distilllens.collate import Batch, collate
from distilllens.divergence import jensen_shannon, sparse_divergence
from distilllens.lens import LogitLens
from distilllens.lens_rows import LensRows, choose_lens_rows, take_evenly
from distilllens.objective import Objective
from distilllens.student import Student
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


def batch_of(some: list[CachedExample], lens_rows: LensRows | None = None) -> Batch:
    tails = {layer: BucketTail() for layer in (2, 4, 6)}
    return collate(some, tails) if lens_rows is None else collate(some, tails, lens_rows=lens_rows)


def rows_at_offset(some: list[CachedExample], offset: float, share: float) -> LensRows:
    """The rows of all examples at one offset, for student layers 1 and 3."""
    taken = [take_evenly(len(one.target_positions), share, offset=offset) for one in some]
    rows = torch.from_numpy(np.flatnonzero(np.concatenate(taken)))
    return LensRows(share, {1: rows, 3: rows})


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


@pytest.mark.parametrize("shares", [(), (0.9, 0.1)])
def test_the_lens_sum_is_what_enters_the_loss(tiny_model, shares: tuple[float, ...]) -> None:
    objective = dataclasses.replace(OBJECTIVE, shares=shares)
    sums = build(tiny_model, objective=objective)(batch_of(examples()))
    first, second = shares or (0.5, 0.5)
    torch.testing.assert_close(sums["lens"], first * sums["lens/1:2"] + second * sums["lens/3:4"])
    wanted = 0.4 * sums["ce"] + 0.6 * (sums["task"] + 0.7 * sums["lens"])
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
    of_lens = {f"{name}/1:2" for name in ("lens", "lens_low", "lens_high", "kept_mass", "student_mass")}
    of_final = {"kl", "ce", "agrees", "confidence", "correct", "kept_mass/final", "student_mass/final"}
    assert set(sums) == of_lens | of_final


@pytest.fixture(params=["fused", "plain"])
def path(request, monkeypatch) -> str:
    """Both ways of computing the losses."""
    if request.param == "plain":
        monkeypatch.setattr("distilllens.losses.is_fused", lambda *_: False)
    return request.param


def test_a_share_of_the_rows_gives_the_full_sums_and_gradient_in_expectation(tiny_model, path: str) -> None:
    """A share of 1/4 has four choices of rows, each as likely as the others: their mean is the expectation."""
    some = examples()
    batches = [batch_of(some, rows_at_offset(some, offset, 0.25)) for offset in (0.1, 0.3, 0.6, 0.8)]
    full, student = batch_of(some), build(tiny_model)
    sums = [student(batch) for batch in batches]
    for name, whole in student(full).items():
        torch.testing.assert_close(sum(one[name] for one in sums) / 4, whole, atol=1e-4, rtol=1e-5)
    parts = [gradient(build(tiny_model), [batch]) for batch in batches]
    whole = gradient(build(tiny_model), [full])
    assert not torch.allclose(parts[0], whole, atol=1e-3)
    torch.testing.assert_close(sum(parts) / 4, whole, atol=1e-6, rtol=1e-5)


def test_the_lens_sums_of_many_steps_average_to_the_full_ones(tiny_model) -> None:
    some, student, num_steps = examples(), build(tiny_model), 150
    with torch.no_grad():
        whole = student(batch_of(some))
        steps = []
        for step in range(num_steps):
            rows = choose_lens_rows(some, OBJECTIVE.lens_layers, share=0.35, seed=0, step=step)
            steps.append(student(batch_of(some, rows)))
    for name in ("lens/1:2", "lens/3:4", "total"):
        values = torch.stack([sums[name] for sums in steps]).double()
        z = (values.mean() - whole[name]) / (values.std() / math.sqrt(num_steps))
        assert abs(z.item()) < 3
    for name in ("ce", "task"):
        assert all(torch.equal(sums[name], whole[name]) for sums in steps)


def test_only_the_rows_that_are_read_go_through_norm_and_head(tiny_model, monkeypatch) -> None:
    some, student = examples(), build(tiny_model)
    rows = LensRows(0.5, {1: torch.tensor([0, 4, 7]), 3: torch.tensor([2])})
    normed, read = [], []
    monkeypatch.setattr(student.lens, "normed", lambda states, _layer: normed.append(len(states)) or states)
    sum_losses = student_module.sum_losses
    monkeypatch.setattr(
        student_module, "sum_losses", lambda *a, **k: read.extend(map(len, a[0])) or sum_losses(*a, **k)
    )
    student(batch_of(some, rows))
    assert normed == [3, 1]
    assert read == [11, 3, 1]


@pytest.mark.parametrize("task", ["fkl", "tvd"])
def test_a_layer_that_reads_no_row_of_a_batch_adds_nothing(tiny_model, path: str, task: str) -> None:
    """A small batch may have none. With tvd the task alone has no fused form."""
    objective = dataclasses.replace(OBJECTIVE, task=task)
    student, none = build(tiny_model, objective=objective), torch.zeros(0, dtype=torch.long)
    sums = student(batch_of(examples(), LensRows(0.1, {1: none, 3: none})))
    assert sums["lens/1:2"] == sums["lens/3:4"] == 0
    torch.testing.assert_close(sums["total"].detach(), 0.4 * sums["ce"] + 0.6 * sums["task"])
    sums["total"].backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_measuring_reads_every_row_whatever_the_lens_rows(tiny_model) -> None:
    some, student = examples(), build(tiny_model)
    rows = LensRows(0.1, {1: torch.tensor([3]), 3: torch.tensor([3])})
    with torch.no_grad():
        some_rows, all_rows = (
            student(batch, measured_pairs=((1, 2),)) for batch in (batch_of(some, rows), batch_of(some))
        )
    assert all(torch.equal(some_rows[name], all_rows[name]) for name in all_rows)


@pytest.mark.parametrize(("divergence", "beta"), [("jsd", 0.5), ("jsd:0.2", 0.2)])
@pytest.mark.parametrize("k", [1, 8, V])
def test_the_dense_jsd_of_every_token_lies_between_its_limits(
    tiny_model, path: str, k: int, divergence: str, beta: float
) -> None:
    """One target position at a time: of a lens pair in training, and of a measured one (whose beta is 1/2)."""
    objective = dataclasses.replace(OBJECTIVE, pairs=((1, 2),), lens_divergence=divergence)
    student, generator = build(tiny_model, objective=objective), torch.Generator().manual_seed(1)
    for temperature in (0.3, 1.0, 4.0):
        for one in examples():
            for position in one.target_positions:
                teacher = torch.randn(1, V, generator=generator) * temperature
                targets = dict.fromkeys((2, 4, 6), unstack_targets(take_top_k(teacher, k), [1])[0])
                token = dataclasses.replace(one, target_positions=np.array([position]), targets=targets)
                batch = batch_of([token])
                with torch.no_grad():
                    hidden = student.lens.hidden_states(batch.input_ids, batch.attention_mask, [1])[1]
                    log_q = student.lens.logits(hidden[batch.is_target], 1).log_softmax(-1)
                    trained, measured = student(batch), student(batch, measured_pairs=((1, 2),))
                for sums, mixed in ((trained, beta), (measured, 0.5)):
                    dense = jensen_shannon(teacher.log_softmax(-1), log_q, mixed).item()
                    low, high = sums["lens_low/1:2"].item(), sums["lens_high/1:2"].item()
                    assert low - 1e-5 <= dense <= high + 1e-5
                    if k == V:
                        assert (low, high) == (pytest.approx(dense, abs=1e-5), pytest.approx(dense, abs=1e-5))


def test_limits_are_of_the_rows_that_are_read_and_of_jensen_and_shannon_alone(tiny_model) -> None:
    some = examples()
    student = build(tiny_model)
    batches = [batch_of(some, rows_at_offset(some, offset, 0.25)) for offset in (0.1, 0.3, 0.6, 0.8)]
    sums, whole = [student(batch) for batch in batches], student(batch_of(some))
    for name in ("lens_low/1:2", "lens_high/3:4"):
        assert whole[name] > 0
        torch.testing.assert_close(sum(one[name] for one in sums) / 4, whole[name], atol=1e-4, rtol=1e-5)
    other = build(tiny_model, objective=dataclasses.replace(OBJECTIVE, lens_divergence="fkl"))
    masses = {f"{name}/{where}" for name in ("kept_mass", "student_mass") for where in ("1:2", "3:4", "final")}
    assert set(other(batch_of(some))) - masses == {"total", "ce", "task", "lens", "lens/1:2", "lens/3:4"}


@pytest.mark.parametrize("divergence", ["fkl", "jsd", "tvd"])
@pytest.mark.parametrize("measures", [False, True])
def test_the_masses_are_those_of_the_kept_tokens_in_the_whole_distributions(
    tiny_model, divergence: str, measures: bool
) -> None:
    objective = dataclasses.replace(OBJECTIVE, task=divergence, lens_divergence=divergence)
    student, batch = build(tiny_model, objective=objective), batch_of(examples())
    with torch.no_grad():
        sums = student(batch, measured_pairs=objective.pairs) if measures else student(batch)
        hidden = student.lens.hidden_states(batch.input_ids, batch.attention_mask, [1, 3, 4])
        for where, layer, teacher in (("1:2", 1, 2), ("3:4", 3, 4), ("final", 4, 6)):
            targets = batch.targets[teacher]
            q = student.lens.logits(hidden[layer][batch.is_target], layer).double().softmax(-1)
            assert sums[f"student_mass/{where}"].item() == pytest.approx(
                q.gather(-1, targets.ids).sum().item(), rel=1e-4
            )
            kept = targets.log_probs.double().exp().sum().item()
            assert sums[f"kept_mass/{where}"].item() == pytest.approx(kept, rel=1e-4)

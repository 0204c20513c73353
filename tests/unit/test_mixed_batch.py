"""What several caches say of a batch: views are masked by their own examples, and losses are weighted as told."""

import dataclasses

import numpy as np
import pytest
import torch

import distilllens.losses as losses_module
from distilllens.collate import collate
from distilllens.divergence import forward_kl, jensen_shannon
from distilllens.lens import LogitLens
from distilllens.lens_rows import ALL_ROWS, LensRows, choose_lens_rows
from distilllens.mixed_batch import Mix, MixedBatch, Teaching, Teachings, collate_mixed
from distilllens.mixture import MixedExample
from distilllens.objective import Gate, Objective, Positions
from distilllens.student import Student
from distilllens.tails import BucketTail, ProfileTail, Tail
from distilllens.targets import take_top_k, unstack_targets
from distilllens_cache import CachedExample, LayerTargets

V, WEIGHTS = 320, (0.7, 0.3)
OBJECTIVE = Objective(task="fkl", lens_divergence="jsd", pairs=((1, 2),), lens_weight=0.7, kd_ratio=0.6)
FINAL = (4, 6)
"""The teachers' final layers: they have different depths. Both match student layer 1 with their layer 2."""


def tails() -> list[Tail]:
    generator = torch.Generator().manual_seed(9)
    return [ProfileTail(torch.randn(V, generator=generator).log_softmax(-1)) for _ in range(2)]


def examples(k: int) -> list[tuple[CachedExample, CachedExample]]:
    """Examples of different lengths, each with the targets of both teachers."""
    random, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    made = []
    for index, length in enumerate((9, 5, 12, 7)):
        positions = np.sort(random.choice(length - 1, size=2 + index % 3, replace=False)).astype(np.uint32)
        ids = random.integers(0, V, length).astype(np.uint32)

        def says(layer: int, count: int = len(positions)) -> LayerTargets:
            return unstack_targets(take_top_k(torch.randn(count, V, generator=generator) * 3, k), [count])[0]

        pair = [CachedExample(index, str(index), ids, positions, {2: says(2), final: says(final)}) for final in FINAL]
        made.append((pair[0], pair[1]))
    return made


def shared(pairs: list[tuple[CachedExample, CachedExample]]) -> list[MixedExample]:
    return [
        MixedExample(a.index, a.id, a.token_ids, a.target_positions, {}, {0: a.targets, 1: b.targets}) for a, b in pairs
    ]


def apart(pairs: list[tuple[CachedExample, CachedExample]]) -> list[MixedExample]:
    """Each example from one of two caches, alternating."""
    each = [(n % 2, pair[n % 2]) for n, pair in enumerate(pairs)]
    return [
        MixedExample(one.index, one.id, one.token_ids, one.target_positions, {}, {n: one.targets}) for n, one in each
    ]


def teachings(mix: Mix, objective: Objective = OBJECTIVE, final: tuple[int, int] = FINAL) -> Teachings:
    each = zip("AB", WEIGHTS, tails(), final, strict=True)
    return Teachings(
        mix,
        tuple(Teaching(name, 1.0 if mix == "data" else w, objective, {2: tail, n: tail}) for name, w, tail, n in each),
    )


def mixed(some: list[MixedExample], of: Teachings) -> MixedBatch:
    return collate_mixed(some, of, lens_rows=lambda _: ALL_ROWS)


def build(tiny_model, objective: Objective = OBJECTIVE) -> Student:
    model = tiny_model("llama")
    return Student(model, LogitLens(model, lens_norm="final", vocab_size=V), objective, chunk_rows=4)


def gradient(student: Student, total: torch.Tensor) -> torch.Tensor:
    total.backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def plain(pairs, number: int):
    """The batch of one teacher alone."""
    tail = tails()[number]
    return collate([pair[number] for pair in pairs], {2: tail, FINAL[number]: tail})


def test_losses_are_the_weighted_sum_of_each_teachers_own_in_value_and_gradient(tiny_model) -> None:
    pairs = examples(8)
    student = build(tiny_model)
    sums = student(mixed(shared(pairs), teachings("losses")))
    alone = [build(tiny_model)(plain(pairs, number)) for number in range(2)]
    for name in ("total", "ce", "task"):
        wanted = sum(weight * one[name] for weight, one in zip(WEIGHTS, alone, strict=True))
        torch.testing.assert_close(sums[name], wanted, atol=1e-4, rtol=1e-5)
    for name, one in zip("AB", alone, strict=True):
        torch.testing.assert_close(sums[f"{name}/task"], one["task"], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(sums[f"{name}/lens/1:2"], one["lens/1:2"], atol=1e-4, rtol=1e-5)
    lens = sum(weight * one["lens/1:2"] for weight, one in zip(WEIGHTS, alone, strict=True))
    torch.testing.assert_close(sums["lens"], lens, atol=1e-4, rtol=1e-5)
    found = gradient(student, sums["total"])
    parts = []
    for number in range(2):
        other = build(tiny_model)
        parts.append(gradient(other, WEIGHTS[number] * other(plain(pairs, number))["total"]))
    torch.testing.assert_close(found, parts[0] + parts[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "products"),
    [({}, 1), ({"lens_divergence": "rkl"}, 1), ({"gate": Gate(final=0.0, lens=0.0)}, 2)],
)
def test_teachers_of_the_same_rows_share_the_heads_products(tiny_model, monkeypatch, settings, products: int) -> None:
    """Beyond a gate each teacher has rows of its own."""
    pairs = examples(8)
    objective = dataclasses.replace(OBJECTIVE, **settings)
    projected: list[int] = []
    whole = losses_module.fused_losses

    def seen(states, head, groups, **options):
        projected.append(len(states))
        return whole(states, head, groups, **options)

    monkeypatch.setattr(losses_module, "fused_losses", seen)
    build(tiny_model, objective)(mixed(shared(pairs), teachings("losses", objective)))
    count = sum(len(pair[0].target_positions) for pair in pairs)
    assert projected == [2 * products * count]


def test_different_data_is_the_sum_over_each_caches_examples_with_its_own_tail(tiny_model) -> None:
    pairs = examples(8)
    sums = build(tiny_model)(mixed(apart(pairs), teachings("data")))
    mine = [plain(pairs[number::2], number) for number in range(2)]
    alone = [build(tiny_model)(batch) for batch in mine]
    assert set(sums) == set(alone[0])
    for name in sums:
        torch.testing.assert_close(sums[name], alone[0][name] + alone[1][name], atol=1e-4, rtol=1e-5)


def test_a_batch_without_examples_of_a_cache_has_those_of_the_others(tiny_model) -> None:
    pairs = examples(8)
    sums = build(tiny_model)(mixed(apart(pairs)[1::2], teachings("data")))
    alone = build(tiny_model)(plain(pairs[1::2], 1))
    assert all(torch.equal(sums[name], alone[name]) for name in alone)


def dense(pairs, layers: tuple[int, int]) -> list[torch.Tensor]:
    """(N, V) log-probabilities of each teacher, from targets that keep every token."""
    found = []
    for number, layer in enumerate(layers):
        batch = plain(pairs, number)
        targets = batch.targets[layer]
        found.append(torch.zeros(len(targets), V).scatter(-1, targets.ids, targets.log_probs))
    return found


@pytest.mark.parametrize("mix", ["losses", "probabilities"])
def test_with_whole_vocabularies_teachers_disagree_and_are_mixed_as_dense_ones(tiny_model, mix: Mix) -> None:
    pairs = examples(V)
    student = build(tiny_model)
    batch = mixed(shared(pairs), teachings(mix))
    sums = student(batch)
    with torch.no_grad():
        logits = student.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    log_q = logits[batch.is_target].log_softmax(-1)
    log_p = dense(pairs, FINAL)
    mean = sum(weight * one.exp() for weight, one in zip(WEIGHTS, log_p, strict=True)).log()
    apart = jensen_shannon(log_p[0], log_p[1], WEIGHTS[0]).sum()
    torch.testing.assert_close(sums["teacher_jsd/final"], apart, atol=1e-3, rtol=1e-4)
    inner = jensen_shannon(*dense(pairs, (2, 2)), WEIGHTS[0]).sum()
    torch.testing.assert_close(sums["teacher_jsd/1"], inner, atol=1e-3, rtol=1e-4)
    # The mean of the KLs is the KL of the mean and the disagreement.
    task = forward_kl(mean, log_q).sum() + (apart if mix == "losses" else 0)
    torch.testing.assert_close(sums["task"], task, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("mix", ["data", "losses", "probabilities"])
def test_a_share_of_the_positions_has_sums_over_those_and_the_same_mean_disagreement(tiny_model, mix: Mix) -> None:
    pairs = examples(8)
    half = dataclasses.replace(OBJECTIVE, positions=Positions(0.5))
    some = apart(pairs) if mix == "data" else shared(pairs)
    sums, whole = (
        build(tiny_model, one)(mixed(some, teachings(mix, one))) for one in (half, dataclasses.replace(OBJECTIVE))
    )
    counts = [len(example.target_positions) for example in some]
    taken, count = sum((count + 1) // 2 for count in counts), sum(counts)
    assert 0 < sums["ce"] < whole["ce"]
    for name in whole:
        if name.startswith("teacher_jsd/"):
            torch.testing.assert_close(sums[name] / taken, whole[name] / count, atol=1e-5, rtol=1e-5)


def test_a_mixture_of_a_teacher_with_itself_trains_as_the_teacher_alone(tiny_model) -> None:
    pairs = [(a, a) for a, _ in examples(8)]
    tail = tails()[0]
    each = tuple(Teaching(name, w, OBJECTIVE, {2: tail, 4: tail}) for name, w in zip("AB", WEIGHTS, strict=True))
    student, other = build(tiny_model), build(tiny_model)
    sums = student(mixed(shared(pairs), Teachings("probabilities", each)))
    wanted = other(plain(pairs, 0))
    assert sums.pop("teacher_jsd/final") < 1e-3
    assert sums.pop("teacher_jsd/1") < 1e-3
    assert set(sums) == set(wanted)
    for name in wanted:
        torch.testing.assert_close(sums[name], wanted[name], atol=1e-3, rtol=1e-4)
    found = gradient(student, sums["total"]), gradient(other, wanted["total"])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("mix", ["data", "losses"])
def test_lens_rows_of_a_view_are_those_of_its_examples_alone(tiny_model, mix: Mix) -> None:
    pairs = examples(8)

    def some_rows(some) -> LensRows:
        return choose_lens_rows(some, (1,), share=0.5, seed=0, step=3)

    make = apart if mix == "data" else shared
    sums = build(tiny_model)(collate_mixed(make(pairs), teachings(mix), lens_rows=some_rows))
    mine = pairs[::2] if mix == "data" else pairs
    rows = some_rows([pair[0] for pair in mine])
    alone = build(tiny_model)(dataclasses.replace(plain(mine, 0), lens_rows=rows))
    if mix == "losses":
        torch.testing.assert_close(sums["A/lens/1:2"], alone["lens/1:2"], atol=1e-4, rtol=1e-5)
    else:
        rows = some_rows([pair[1] for pair in pairs[1::2]])
        other = build(tiny_model)(dataclasses.replace(plain(pairs[1::2], 1), lens_rows=rows))
        torch.testing.assert_close(sums["lens/1:2"], alone["lens/1:2"] + other["lens/1:2"], atol=1e-4, rtol=1e-5)


def test_tails_without_shape_are_mixed_over_a_bucket(tiny_model) -> None:
    pairs = examples(8)
    each = tuple(
        Teaching(name, w, OBJECTIVE, {2: BucketTail(), n: BucketTail()})
        for name, w, n in zip("AB", WEIGHTS, FINAL, strict=True)
    )
    sums = build(tiny_model)(mixed(shared(pairs), Teachings("probabilities", each)))
    assert 0 < sums["task"] < sums["ce"]
    assert torch.isfinite(sums["total"])

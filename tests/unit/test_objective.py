"""The loss is what its settings say: methods, shares of pairs, schedules, the entropy gate, who trains the head."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distilllens.collate import Batch, collate
from distilllens.config import TrainConfig, load_config, save_config
from distilllens.lens import LogitLens
from distilllens.lens_rows import ALL_ROWS, LensRows
from distilllens.lens_schedule import lens_factor, parse_schedule
from distilllens.methods import METHODS
from distilllens.objective import Gate, Objective
from distilllens.student import Student
from distilllens.tails import BucketTail
from distilllens.targets import entropies, take_top_k, unstack_targets
from distilllens.training_run import objective_of
from distilllens_cache import CachedExample

V = 320
LAYERS = (2, 4, 6)
"""Of the teacher; the last is its final one."""
PAIRS = ((1, 2), (3, 4))
OBJECTIVE = Objective(task="rkl", lens_divergence="jsd", pairs=PAIRS, lens_weight=0.7, kd_ratio=0.6)
BASE = {"student": "s", "output_dir": Path("o")}
WITH_CACHE = {**BASE, "cache": Path("c")}


class Teacher:
    """Examples of several lengths with the teacher's dense logits, sure in some and unsure in others."""

    def __init__(self, k: int = V, seed: int = 0) -> None:
        random, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        self.examples, dense = [], {layer: [] for layer in LAYERS}
        for index, length in enumerate((9, 5, 12, 7)):
            positions = np.sort(random.choice(length - 1, size=2 + index, replace=False)).astype(np.uint32)
            scale = torch.linspace(0.2, 6, len(positions))[:, None]
            logits = {layer: torch.randn(len(positions), V, generator=generator) * scale for layer in LAYERS}
            targets = {layer: unstack_targets(take_top_k(z, k), [len(positions)])[0] for layer, z in logits.items()}
            ids = random.integers(0, V, length).astype(np.uint32)
            self.examples.append(CachedExample(index, str(index), ids, positions, targets))
            for layer in LAYERS:
                dense[layer].append(logits[layer].log_softmax(-1))
        self.log_p = {layer: torch.cat(rows) for layer, rows in dense.items()}

    def batch(self, lens_rows: LensRows = ALL_ROWS) -> Batch:
        return collate(self.examples, {layer: BucketTail() for layer in LAYERS}, lens_rows=lens_rows)


def build(tiny_model, objective: Objective, *, architecture: str = "llama", tied: bool = False) -> Student:
    model = tiny_model(architecture, tied=tied)
    return Student(model, LogitLens(model, lens_norm="final", vocab_size=V), objective, chunk_rows=4)


@pytest.fixture(params=["fused", "plain"])
def path(request, monkeypatch) -> str:
    """Both ways of computing the losses."""
    if request.param == "plain":
        monkeypatch.setattr("distilllens.losses.is_fused", lambda *_: False)
    return request.param


def log_q(student: Student, batch: Batch) -> dict[int, Tensor]:
    """The student's dense distributions at layers 1, 3 and 4, by the model's own modules."""
    model = student.model
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    lens = {layer: model.lm_head(model.model.norm(out.hidden_states[layer])) for layer in (1, 3)}
    return {layer: z[batch.is_target].log_softmax(-1) for layer, z in {**lens, 4: out.logits}.items()}


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def jsd(p: Tensor, q: Tensor) -> Tensor:
    m = ((p.exp() + q.exp()) / 2).log()
    return (kl(p, m) + kl(q, m)) / 2


def akl(p: Tensor, q: Tensor) -> Tensor:
    """AKL by its paper: both KLs, weighted by the gaps in the teacher's head (half of the mass) and tail."""
    values = []
    for one, other in zip(p.exp(), q.exp().detach(), strict=True):
        order = one.argsort(descending=True)
        within = one[order].cumsum(0) <= 0.5
        within[0] = True
        gaps = (one - other).abs()[order]
        values.append(gaps[within].sum() / gaps.sum())
    head = torch.stack(values)
    return head * kl(p, q) + (1 - head) * kl(q, p)


def by_formula(method: str, p: dict[int, Tensor], q: dict[int, Tensor], next_ids: Tensor) -> Tensor:
    """The loss of each method, summed over target positions, from dense distributions."""
    ce = -q[4].gather(-1, next_ids[:, None])[:, 0]
    final = {
        "kd": lambda: kl(p[6], q[4]),
        "rkl": lambda: kl(q[4], p[6]),
        "fkl+rkl": lambda: kl(p[6], q[4]) + kl(q[4], p[6]),
        "jsd": lambda: jsd(p[6], q[4]),
        "akl": lambda: akl(p[6], q[4]),
    }
    if method == "sft":
        return ce.sum()
    if method == "distilllens":
        return (kl(p[6], q[4]) + (jsd(p[2], q[1]) + jsd(p[4], q[3])) / 2).sum()
    return (0.5 * ce + 0.5 * final[method]()).sum()


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_a_method_is_its_formula_on_dense_targets(tiny_model, path: str, method: str) -> None:
    config = TrainConfig(method=method, **(BASE | {"dataset": "d"} if method == "sft" else WITH_CACHE))
    teacher = Teacher()
    student, batch = build(tiny_model, objective_of(config, PAIRS, (0.5, 0.5))), teacher.batch()
    total = student(batch)["total"]
    wanted = by_formula(method, teacher.log_p, log_q(student, batch), batch.next_ids)
    torch.testing.assert_close(total, wanted, atol=1e-3, rtol=1e-5)
    mine, theirs = (torch.autograd.grad(loss, student.model.lm_head.weight)[0] for loss in (total, wanted))
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_the_methods_of_the_config_are_those_of_the_table() -> None:
    annotation = TrainConfig.model_fields["method"].annotation
    assert set(annotation.__args__) == set(METHODS)  # type: ignore[union-attr]


def test_flags_win_over_what_a_method_suggests() -> None:
    suggested = load_config(TrainConfig, file=None, flags={**WITH_CACHE, "method": "kd"})
    assert (suggested.task, suggested.kd_ratio, suggested.lens_weight) == ("fkl", 0.5, 0.0)
    given_ratio = load_config(TrainConfig, file=None, flags={**WITH_CACHE, "method": "rkl", "kd_ratio": 1.0})
    assert (given_ratio.task, given_ratio.kd_ratio) == ("rkl", 1.0)


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_resolved_config_reads_back_as_itself(tmp_path: Path, method: str) -> None:
    config = TrainConfig(method=method, **(BASE | {"dataset": "d"} if method == "sft" else WITH_CACHE))
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(TrainConfig, file=tmp_path / "resolved.yaml", flags={}) == config


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "sft", "lens_weight": 1}, "--lens-weight 1.0 is not --method sft, which has --lens-weight 0.0"),
        ({"method": "sft", "kd_ratio": 0.5}, "--kd-ratio 0.5 is not --method sft"),
        ({"method": "kd", "task": "rkl"}, "--task rkl is not --method kd, which has --task fkl: drop one"),
        ({"method": "jsd", "task": "jsd:0.3"}, "--task jsd:0.3 is not --method jsd"),
        ({"method": "kd", "lens_divergence": "rkl"}, "--lens-divergence is for the lens, which --method kd has none"),
        ({"method": "akl", "lens_schedule": "cosine"}, "--lens-schedule is for the lens"),
        ({"method": "rkl", "lens_head_grad": "off"}, "--lens-head-grad is for the lens"),
        ({"positions_by": "entropy"}, "--positions-by chooses nothing while all positions are kept"),
        ({"lens_schedule": "step"}, "'step' is not a schedule: expected constant, linear, cosine, warm-off"),
        ({"lens_schedule": "warm-off:2"}, "warm-off takes a share of the steps between 0 and 1"),
        ({"lens_schedule": "linear:0.5"}, "is not a schedule"),
        ({"entropy_gate": "-1"}, "--entropy-gate '-1': expected nats"),
        ({"entropy_gate": "lens=x"}, "expected nats, 0 or more"),
        ({"pairs": "1:2=0.5,3:4=0.6"}, "the shares sum to 1.1, not 1"),
        ({"pairs": "1:2=0.5,3:4"}, "1 of 2 pairs have a share; give all of them one"),
        ({"pairs": "1:2=1.5,3:4=-0.5"}, "a share is not above 0"),
        ({"pairs": "1:2=nan"}, "a share is not above 0"),
        ({"pairs": "1:2=x"}, "expected student:teacher layers"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_in_a_sentence(settings: dict, sentence: str) -> None:
    base = BASE | {"dataset": "d"} if settings.get("method") == "sft" else WITH_CACHE
    with pytest.raises(ValueError, match="the command line has 1 mistake") as error:
        load_config(TrainConfig, file=None, flags=base | settings)
    assert sentence in str(error.value)


def test_pairs_count_as_much_as_their_shares(tiny_model, path: str) -> None:
    batch = Teacher(k=8).batch()
    student = build(tiny_model, dataclasses.replace(OBJECTIVE, shares=(0.2, 0.8)))
    sums = student(batch)
    lens = 0.2 * sums["lens/1:2"] + 0.8 * sums["lens/3:4"]
    wanted = 0.4 * sums["ce"] + 0.6 * (sums["task"] + 0.7 * lens)
    torch.testing.assert_close(sums["total"].detach(), wanted)


def test_a_factor_scales_the_lens_alone_and_zero_leaves_the_task(tiny_model, path: str) -> None:
    batch, student = Teacher(k=8).batch(), build(tiny_model, OBJECTIVE)
    for factor in (0.0, 0.3):
        sums = student(batch, lens_factor=factor)
        lens = (sums["lens/1:2"] + sums["lens/3:4"]) / 2
        torch.testing.assert_close(
            sums["total"].detach(), 0.4 * sums["ce"] + 0.6 * (sums["task"] + 0.7 * factor * lens)
        )
    bare = build(tiny_model, dataclasses.replace(OBJECTIVE, lens_weight=0.0))
    off, none = (gradients(one, sums) for one, sums in ((student, sums_off(student, batch)), (bare, bare(batch))))
    for name, gradient in none.items():
        torch.testing.assert_close(off[name], gradient, atol=1e-6, rtol=1e-5)


def sums_off(student: Student, batch: Batch) -> dict[str, Tensor]:
    return student(batch, lens_factor=0.0)


def gradients(student: Student, sums: dict[str, Tensor]) -> dict[str, Tensor]:
    student.zero_grad()
    sums["total"].backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@given(st.integers(1, 500), st.data())
def test_schedules_are_their_formulas(num_steps: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, num_steps - 1))
    t = step / num_steps
    wanted = {
        "constant": 1.0,
        "linear": 1 - t,
        "cosine": math.cos(math.pi * t / 2) ** 2,
        "warm-off": 1.0 if 2 * step < num_steps else 0.0,
        "warm-off:0.25": 1.0 if 4 * step < num_steps else 0.0,
    }
    for schedule, factor in wanted.items():
        assert lens_factor(schedule, step=step, num_steps=num_steps) == pytest.approx(factor, abs=1e-12)


def test_a_schedule_without_a_share_has_the_default_one() -> None:
    assert parse_schedule("warm-off") == ("warm-off", 0.5)
    assert parse_schedule("warm-off:0.2") == ("warm-off", 0.2)


@pytest.mark.parametrize("k", [8, V])
def test_the_entropy_of_a_target_counts_the_rest_as_one_outcome(k: int) -> None:
    logits = torch.randn(20, V) * torch.linspace(0.1, 8, 20)[:, None]
    p = logits.softmax(-1).sort(-1, descending=True).values
    outcomes = torch.cat([p[:, :k], p[:, k:].sum(-1, keepdim=True)], -1)
    found = entropies(take_top_k(logits, k))
    torch.testing.assert_close(found, torch.special.entr(outcomes).sum(-1), atol=1e-5, rtol=1e-5)
    assert (found <= torch.special.entr(p).sum(-1) + 1e-5).all()


@pytest.mark.parametrize("gate", [Gate(final=3.0), Gate(lens=3.0), Gate(3.0, 2.0), Gate(0.0, 0.0), Gate(99.0, 99.0)])
def test_beyond_the_gate_forward_kl_takes_the_place_of_the_divergence(tiny_model, path: str, gate: Gate) -> None:
    teacher = Teacher()
    batch, p = teacher.batch(), teacher.log_p
    student = build(tiny_model, dataclasses.replace(OBJECTIVE, gate=gate))
    sums, q = student(batch), log_q(student, batch)
    limits = {2: gate.lens, 4: gate.lens, 6: gate.final}
    is_unsure = {layer: -(p[layer].exp() * p[layer]).sum(-1) > limit for layer, limit in limits.items()}
    wanted = {"task": torch.where(is_unsure[6], kl(p[6], q[4]), kl(q[4], p[6])).sum()}
    for mine, theirs in PAIRS:
        covering, both = kl(p[theirs], q[mine]), jsd(p[theirs], q[mine])
        wanted[f"lens/{mine}:{theirs}"] = torch.where(is_unsure[theirs], covering, both).sum()
    for name, value in wanted.items():
        torch.testing.assert_close(sums[name], value.detach(), atol=1e-3, rtol=1e-4)
    ce = -q[4].gather(-1, batch.next_ids[:, None]).sum()
    lens = (wanted["lens/1:2"] + wanted["lens/3:4"]) / 2
    total = 0.4 * ce + 0.6 * (wanted["task"] + 0.7 * lens)
    torch.testing.assert_close(sums["total"], total, atol=1e-3, rtol=1e-4)
    mine, theirs = (torch.autograd.grad(loss, student.model.lm_head.weight)[0] for loss in (sums["total"], total))
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)
    counts = {"final": 6, "1:2": 2, "3:4": 4}
    for label, layer in counts.items():
        assert (f"unsure/{label}" in sums) is (limits[layer] < math.inf)
        if limits[layer] < math.inf:
            assert sums[f"unsure/{label}"].item() == is_unsure[layer].sum().item()
    assert ("lens_low/1:2" in sums) is (gate.lens == math.inf)


def test_a_gate_adds_forward_kl_to_what_is_checked_at_its_layers() -> None:
    both = dataclasses.replace(OBJECTIVE, task="rkl", gate=Gate(1.0, 1.0)).divergences(6)
    none = dataclasses.replace(OBJECTIVE, task="rkl").divergences(6)
    assert none == [*(("jsd", teacher) for _, teacher in OBJECTIVE.pairs), ("rkl", 6)]
    layers = [teacher for _, teacher in OBJECTIVE.pairs]
    assert sorted(set(both) - set(none)) == [("fkl", layer) for layer in (*layers, 6)]


def test_gated_rows_stay_those_that_the_lens_reads(tiny_model, path: str) -> None:
    """Two halves of the rows, each standing for all, average to all of them."""
    teacher, student = Teacher(k=8), build(tiny_model, dataclasses.replace(OBJECTIVE, gate=Gate(1.5, 1.5)))
    whole = student(teacher.batch())
    rows = torch.arange(len(teacher.log_p[2]))
    halves = [student(teacher.batch(LensRows(0.5, {1: rows[n::2], 3: rows[n::2]}))) for n in (0, 1)]
    assert 0 < whole["unsure/1:2"] < len(rows)
    for name, value in whole.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, value, atol=1e-3, rtol=1e-5)


HEAVY_LENS = dataclasses.replace(OBJECTIVE, lens_weight=30.0)
"""So that no gradient of the lens is lost beside that of the task."""


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_lens_that_does_not_train_the_head_gives_it_the_gradient_of_the_final_layer(
    tiny_model, path: str, architecture: str, tied: bool
) -> None:
    """The twin reads through a copy of the head. Tied embeddings still learn what the lens tells them as embeddings."""
    batch = Teacher(k=8).batch()

    def found(objective: Objective, *, through_copy: bool = False) -> dict[str, Tensor]:
        student = build(tiny_model, objective, architecture=architecture, tied=tied)
        if through_copy:
            decoder, head = student.lens._modules_of_model
            copy = torch.nn.Linear(32, V, bias=False)
            copy.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
            student.lens._modules_of_model = (decoder, copy)
        return gradients(student, student(batch))

    task = dataclasses.replace(HEAVY_LENS, lens_weight=0.0)
    off = found(dataclasses.replace(HEAVY_LENS, lens_trains_head=False))
    with_lens, without, final = found(HEAVY_LENS, through_copy=True), found(task, through_copy=True), found(task)
    zero = torch.zeros(())
    for name, gradient in off.items():
        wanted = with_lens.get(name, zero) - without.get(name, zero) + final.get(name, zero)
        torch.testing.assert_close(gradient, wanted, atol=1e-3, rtol=1e-3)
    differing = {name for name, on in found(HEAVY_LENS).items() if not torch.allclose(off[name], on, atol=1e-2)}
    model = tiny_model(architecture, tied=tied)
    head = model.get_output_embeddings().weight
    assert differing == {f"model.{name}" for name, parameter in model.named_parameters() if parameter is head}


def test_a_lens_that_does_not_train_the_head_does_not_train_its_adapters_either(tiny_model, path: str) -> None:
    peft = pytest.importorskip("peft")

    def found(objective: Objective) -> dict[str, Tensor]:
        settings = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        inner = peft.get_peft_model(tiny_model("llama"), settings).get_base_model()
        student = Student(inner, LogitLens(inner, lens_norm="final", vocab_size=V), objective, chunk_rows=4)
        return gradients(student, student(batch))

    batch = Teacher(k=8).batch()
    on, task = found(HEAVY_LENS), found(dataclasses.replace(HEAVY_LENS, lens_weight=0.0))
    for name, gradient in found(dataclasses.replace(HEAVY_LENS, lens_trains_head=False)).items():
        is_head, sees_lens = "lm_head" in name, "layers.3" not in name
        torch.testing.assert_close(gradient, (task if is_head else on)[name], atol=1e-3, rtol=1e-3)
        if sees_lens:
            assert not torch.allclose(gradient, (on if is_head else task)[name], atol=1e-2), name

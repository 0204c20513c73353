"""The fused head gives the numbers and gradients of its plain twin."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from distilllens import fused
from distilllens import losses as losses_module
from distilllens.divergence import jsd_certificate, sparse_divergence
from distilllens.divergence_spec import KNOWN, parse_divergence
from distilllens.fused import Adapter, Group, Head, Loss, LossSums, certain_targets, fused_losses, is_fused
from distilllens.fused_divergences import FUSED
from distilllens.lens import LogitLens
from distilllens.losses import sum_losses
from distilllens.tails import BucketTail, ProfileTail, RenormTail, SketchTail, Tail
from distilllens.targets import SparseTargets, take_top_k

N, D, V, K, R = 37, 16, 101, 7, 5
DIVERGENCES = (
    "fkl", "rkl", "fkl+rkl", "jsd", "jsd:0.3", "jeffreys", "skew_fkl", "skew_fkl:0.6", "skew_rkl", "skew_rkl:0.6",
)  # fmt: skip
TAILS = ("bucket", "profile", "sketch", "capped sketch")


def ragged_targets(
    generator: torch.Generator, dtype: torch.dtype, *, num_rows: int = N, vocab: int = V
) -> SparseTargets:
    """Targets that keep between one and K tokens; padding has id 0, which is a real token too."""
    log_probs = (torch.randn(num_rows, vocab, generator=generator, dtype=torch.float64) * 3).log_softmax(-1)
    targets = take_top_k(log_probs, K)
    is_kept = torch.arange(K) < torch.randint(1, K + 1, (num_rows, 1), generator=generator)
    slots = torch.where(is_kept, targets.ids, vocab)
    outside = torch.cat([log_probs, torch.zeros(num_rows, 1)], -1).scatter(-1, slots, -torch.inf)[:, :-1]
    return SparseTargets(
        ids=targets.ids.masked_fill(~is_kept, 0),
        log_probs=targets.log_probs.masked_fill(~is_kept, -100.0).to(dtype),
        is_kept=is_kept,
        log_rest=outside.logsumexp(-1).to(dtype),
        codes=torch.randint(-50, 50, (num_rows, R + 1), generator=generator).to(torch.int8),
    )


def make_tail(name: str, generator: torch.Generator, dtype: torch.dtype, *, vocab: int = V) -> Tail:
    if name == "bucket":
        return BucketTail()
    draw = torch.randn(vocab, R + 1, generator=generator, dtype=torch.float64)
    if name == "profile":
        return ProfileTail((2 * draw[:, 0]).log_softmax(-1).to(dtype))
    return SketchTail((draw[:, 1:] / 40).to(dtype), draw[:, 0].to(dtype), 3.0 if name == "capped sketch" else None)


class Case:
    """Hidden states, a head with a bias, targets and a tail."""

    def __init__(self, tail: str, *, dtype: torch.dtype = torch.float64, spread: float = 0.5) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = torch.randn(N * D + V * D + V, generator=generator, dtype=torch.float64)
        hidden, weight, bias = draw.split([N * D, V * D, V])
        self.hidden = hidden.view(N, D).to(dtype).requires_grad_()
        self.weight = (weight.view(V, D) * spread).to(dtype).requires_grad_()
        self.bias = bias.to(dtype).requires_grad_()
        self.targets = ragged_targets(generator, dtype)
        self.tail = make_tail(tail, generator, dtype)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias

    def logits(self, scale: float = 1.0, softcap: float | None = None) -> Tensor:
        logits = (self.hidden @ self.weight.T + self.bias) * scale
        return softcap * torch.tanh(logits / softcap) if softcap else logits

    def sums(self, divergence: str) -> LossSums:
        loss = Loss(divergence, self.targets, self.tail, 1.0)
        return fused_losses(self.hidden, Head(self.weight, self.bias), [Group(N, (loss,))], chunk_rows=10)


every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
every_tail = pytest.mark.parametrize("tail", TAILS)


def assert_gradients_close(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@every_divergence
@every_tail
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.7, None), (0.7, 5.0)])
@pytest.mark.parametrize("chunk_rows", [10, 1000])
def test_values_and_gradients_are_those_of_the_plain_twin(
    divergence: str, tail: str, scale: float, softcap: float | None, chunk_rows: int
) -> None:
    case = Case(tail)
    plain = 1.5 * sparse_divergence(divergence, case.logits(scale, softcap), case.targets, case.tail).sum()
    head = Head(case.weight, case.bias, scale, softcap)
    groups = [
        Group(20, (Loss(divergence, case.targets[:20], case.tail, 1.5),)),
        Group(0, (Loss(divergence, case.targets[:0], case.tail, 1.5),)),
        Group(N - 20, (Loss(divergence, case.targets[20:], case.tail, 1.5),)),
    ]
    sums = fused_losses(case.hidden, head, groups, chunk_rows=chunk_rows)
    torch.testing.assert_close(sums.total, plain.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(1.5 * sums.each.sum(), plain.detach(), rtol=1e-9, atol=1e-9)
    kept = case.logits(scale, softcap).softmax(-1).gather(-1, case.targets.ids) * case.targets.is_kept
    torch.testing.assert_close(sums.on_support.sum(), kept.sum().detach(), rtol=1e-9, atol=1e-9)
    wanted = torch.autograd.grad(3 * plain, case.inputs)
    assert_gradients_close(torch.autograd.grad(3 * sums.total, case.inputs), wanted)


def test_every_divergence_with_a_fused_form_is_tested_here_and_the_others_are_known_to_have_none() -> None:
    assert {parse_divergence(text).name for text in DIVERGENCES} == set(FUSED)
    for name in KNOWN:
        assert is_fused(name, BucketTail()) is (name in FUSED)
    assert not is_fused("jsd", RenormTail())


@every_divergence
@every_tail
def test_finite_differences_agree_with_the_gradients(divergence: str, tail: str) -> None:
    rows, size, vocab = 4, 2, 11
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()  # noqa: E731
    targets = ragged_targets(generator, torch.float64, num_rows=rows, vocab=vocab)
    loss = Loss(divergence, targets, make_tail(tail, generator, torch.float64, vocab=vocab), 0.7)
    group = Group(rows, (loss, Loss("fkl", certain_targets(torch.arange(rows)), BucketTail(), 0.3)))

    def total(hidden: Tensor, weight: Tensor, bias: Tensor, reduced: Tensor, up: Tensor) -> Tensor:
        head = Head(weight, bias, 0.9, 4.0, vocab, (Adapter(lambda _: reduced, up),))
        return fused_losses(hidden, head, [group], chunk_rows=3).total

    inputs = (draw(rows, size), draw(vocab + 1, size), draw(vocab + 1), draw(rows, 1), draw(vocab + 1, 1))
    assert torch.autograd.gradcheck(total, inputs, fast_mode=True)


@every_divergence
@every_tail
def test_several_losses_of_one_row_add_up(divergence: str, tail: str) -> None:
    case, next_ids = Case(tail), torch.arange(N) % V
    logits = case.logits()
    plain = 0.5 * sparse_divergence(divergence, logits, case.targets, case.tail).sum()
    plain = plain + 0.3 * functional.cross_entropy(logits, next_ids, reduction="sum")
    losses = (
        Loss(divergence, case.targets, case.tail, 0.5),
        Loss("fkl", certain_targets(next_ids), BucketTail(), 0.3),
        Loss("jsd", case.targets, case.tail, 0.0),
    )
    sums = fused_losses(case.hidden, Head(case.weight, case.bias), [Group(N, losses)], chunk_rows=10)
    torch.testing.assert_close(sums.total, plain.detach(), rtol=1e-9, atol=1e-9)
    assert sums.each[2] > 0
    assert_gradients_close(torch.autograd.grad(sums.total, case.inputs), torch.autograd.grad(plain, case.inputs))


def test_groups_of_different_weights_and_divergences_share_a_chunk() -> None:
    case, cuts = Case("profile"), (slice(0, 3), slice(3, 5), slice(5, 6), slice(6, N))
    kinds = (("jsd:0.3", 0.0), ("fkl", 2.0), ("jsd:0.3", 0.7), ("rkl", -0.4))
    logits = case.logits()
    plain = torch.stack(
        [
            weight * sparse_divergence(divergence, logits[rows], case.targets[rows], case.tail).sum()
            for rows, (divergence, weight) in zip(cuts, kinds, strict=True)
        ]
    ).sum()
    groups = [
        Group(rows.stop - rows.start, (Loss(divergence, case.targets[rows], case.tail, weight),))
        for rows, (divergence, weight) in zip(cuts, kinds, strict=True)
    ]
    total = fused_losses(case.hidden, Head(case.weight, case.bias), groups, chunk_rows=8).total
    torch.testing.assert_close(total, plain.detach(), rtol=1e-9, atol=1e-9)
    assert_gradients_close(torch.autograd.grad(total, case.inputs), torch.autograd.grad(plain, case.inputs))


def test_as_many_states_as_rows_of_groups_are_needed() -> None:
    case = Case("bucket")
    with pytest.raises(ValueError, match="the groups have 36 rows and the hidden states 37"):
        fused_losses(case.hidden, Head(case.weight), [Group(36, (Loss("jsd", case.targets, case.tail, 1.0),))])


# precision


@every_divergence
@every_tail
@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_float32_is_as_true_as_the_plain_twin(divergence: str, tail: str, spread: float) -> None:
    """Wide logits make peaked rows, where a rest computed as 1 - sum has no correct digit."""
    exact, single = Case(tail, spread=spread), Case(tail, dtype=torch.float32, spread=spread)
    truth = sparse_divergence(divergence, exact.logits(), exact.targets, exact.tail).sum()
    wanted = torch.autograd.grad(truth, exact.inputs)
    total = single.sums(divergence).total
    assert abs(total.item() - truth.item()) <= 2e-6 * abs(truth.item())
    for mine, theirs in zip(torch.autograd.grad(total, single.inputs), wanted, strict=True):
        assert (mine.double() - theirs).norm() <= 5e-6 * theirs.norm()


@every_divergence
@every_tail
def test_float32_gradients_of_a_real_model_are_true(divergence: str, tail: str, stories260k) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(stories260k), dtype=torch.float32)
    lens = LogitLens(model, lens_norm="final", vocab_size=model.config.vocab_size)
    ids = torch.arange(3, 131).view(2, 64)
    with torch.no_grad():
        hidden = lens.hidden_states(ids, None, [3, 5])
        states, teacher = (lens.normed(hidden[layer], layer).flatten(0, 1) for layer in (3, 5))
        targets = take_top_k(lens.head(teacher), 32)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-50, 50, (len(states), R), generator=generator).to(torch.int8)
    targets = SparseTargets(targets.ids, targets.log_probs, targets.is_kept, targets.log_rest, codes)
    own_tail = make_tail(tail, generator, torch.float32, vocab=lens.vocab_size)
    inputs = states.requires_grad_(), model.lm_head.weight
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = sparse_divergence(divergence, exact[0] @ exact[1].T, in_double(targets), in_double(own_tail)).sum()
    loss = Loss(divergence, targets, own_tail, 1.0)
    total = fused_losses(inputs[0], Head(inputs[1]), [Group(len(states), (loss,))]).total
    wanted = torch.autograd.grad(truth, exact)
    for mine, theirs in zip(torch.autograd.grad(total, inputs), wanted, strict=True):
        assert (mine.double() - theirs).norm() <= 5e-6 * theirs.norm()


def in_double(part):
    """Targets or a tail with their floats in float64."""
    if isinstance(part, BucketTail):
        return part
    as_double = lambda one: one.double() if isinstance(one, Tensor) and one.is_floating_point() else one  # noqa: E731
    return type(part)(*(as_double(getattr(part, name)) for name in part.__dataclass_fields__))


@every_divergence
@pytest.mark.parametrize("tail", ["bucket", "profile", "sketch"])
@pytest.mark.parametrize("is_kept", [True, False])
@pytest.mark.parametrize("sureness", [0.0, 30.0])
def test_a_sure_student_gets_true_gradients_however_small_its_tail(
    divergence: str, tail: str, is_kept: bool, sureness: float
) -> None:
    """One token has all mass but e^-gap; the teacher is unsure, or surer still of another token."""
    vocab, generator = 2000, torch.Generator().manual_seed(2)
    teacher = torch.randn(1, vocab, generator=generator) * 2
    teacher[0, 7] += sureness
    targets = take_top_k(teacher, 64)
    codes = torch.randint(-50, 50, (1, R), generator=generator).to(torch.int8)
    targets = SparseTargets(targets.ids, targets.log_probs, targets.is_kept, targets.log_rest, codes)
    own_tail = make_tail(tail, generator, torch.float32, vocab=vocab)
    place = int(targets.ids[0, 3]) if is_kept else min(set(range(vocab)) - set(targets.ids[0].tolist()))
    for gap in (-5.0, 0.0, 4.0, 8.0, 12.0, 16.0, 19.9, 30.0, 50.0, 95.0, 150.0):
        logits = torch.randn(vocab, generator=generator)
        logits[place] = logits.logsumexp(0) + gap
        bias, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
        truth = sparse_divergence(divergence, exact[None], in_double(targets), in_double(own_tail)).sum()
        loss = Loss(divergence, targets, own_tail, 1.0)
        total = fused_losses(torch.zeros(1, 1), Head(torch.zeros(vocab, 1), bias), [Group(1, (loss,))]).total
        (mine,), (wanted,) = torch.autograd.grad(total, bias), torch.autograd.grad(truth, exact)
        assert torch.isfinite(mine).all()
        # The truth itself cancels: float64 leaves about 1e-14 of it.
        allowed = 2e-6 * wanted.norm() + 1e-13 if gap < 20 else 1e-7
        if gap < 100:  # further down the plain twin's floor stops its gradient
            assert (mine.double() - wanted).norm() <= allowed, gap
        assert abs(total.item() - truth.item()) <= 2e-6 * truth.item() + (0 if gap < 20 else 1e-7)


@every_divergence
@every_tail
def test_extreme_students_give_finite_losses_and_gradients(divergence: str, tail: str) -> None:
    case = Case(tail, dtype=torch.float32, spread=60.0)
    total = case.sums(divergence).total
    assert torch.isfinite(total)
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(total, case.inputs))


@every_divergence
@every_tail
def test_a_target_that_keeps_the_whole_vocabulary_has_no_tail(divergence: str, tail: str) -> None:
    case = Case(tail)
    everything = take_top_k(torch.randn(N, V, dtype=torch.float64), V)
    targets = SparseTargets(
        everything.ids, everything.log_probs, everything.is_kept, everything.log_rest, case.targets.codes
    )
    plain = sparse_divergence(divergence, case.logits(), targets, case.tail).sum()
    loss = Loss(divergence, targets, case.tail, 1.0)
    total = fused_losses(case.hidden, Head(case.weight, case.bias), [Group(N, (loss,))]).total
    torch.testing.assert_close(total, plain.detach(), rtol=1e-9, atol=1e-9)
    assert_gradients_close(torch.autograd.grad(total, case.inputs), torch.autograd.grad(plain, case.inputs))


@every_divergence
@every_tail
def test_a_rest_too_small_to_be_stored_is_as_far_away_as_in_the_plain_twin(divergence: str, tail: str) -> None:
    """Without the floor under p, reverse KL would grow with how little is spread."""
    case = Case(tail)
    targets = replace(case.targets, log_rest=torch.full((N,), -100.0, dtype=torch.float64))
    plain = sparse_divergence(divergence, case.logits(), targets, case.tail).sum()
    loss = Loss(divergence, targets, case.tail, 1.0)
    total = fused_losses(case.hidden, Head(case.weight, case.bias), [Group(N, (loss,))]).total
    torch.testing.assert_close(total, plain.detach(), rtol=1e-9, atol=1e-9)
    assert_gradients_close(torch.autograd.grad(total, case.inputs), torch.autograd.grad(plain, case.inputs))


@every_tail
def test_a_bfloat16_head_has_float32_logits_and_sums(monkeypatch, tail: str) -> None:
    monkeypatch.setattr(fused, "BLOCK_TOKENS", 40)
    case = Case(tail, dtype=torch.float32)
    hidden, weight = (one.detach().bfloat16().requires_grad_() for one in (case.hidden, case.weight))
    exact = [one.detach().double().requires_grad_() for one in (hidden, weight)]
    truth = sparse_divergence("jsd", exact[0] @ exact[1].T, in_double(case.targets), in_double(case.tail)).sum()
    loss = Loss("jsd", case.targets, case.tail, 1.0)
    total = fused_losses(hidden, Head(weight), [Group(N, (loss,))], chunk_rows=10).total / 3
    assert abs(3 * total.item() - truth.item()) <= 2e-6 * truth.item()
    for mine, theirs in zip(
        torch.autograd.grad(total, (hidden, weight)), torch.autograd.grad(truth, exact), strict=True
    ):
        assert mine.dtype == torch.bfloat16
        assert (3 * mine.double() - theirs).norm() <= 2**-8 * theirs.norm()


# certificates


@every_tail
@pytest.mark.parametrize("divergence", ["jsd", "jsd:0.3"])
def test_limits_of_the_dense_jsd_come_along(divergence: str, tail: str) -> None:
    case = Case(tail)
    seen = BucketTail().outcomes(case.logits().detach().log_softmax(-1), case.targets)
    wanted = jsd_certificate(seen.log_p, seen.log_q, *parse_divergence(divergence).parameters, counts=seen.counts)
    sums = case.sums(divergence)
    torch.testing.assert_close(sums.low, wanted.low.sum()[None], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sums.slack, wanted.slack.sum()[None], rtol=1e-9, atol=1e-9)
    assert not sums.low.requires_grad


@pytest.mark.parametrize("divergence", [text for text in DIVERGENCES if not text.startswith("jsd")])
def test_other_divergences_have_no_limits(divergence: str) -> None:
    sums = Case("bucket").sums(divergence)
    assert not sums.low.any()
    assert not sums.slack.any()


# memory and what is not computed


class Allocations(TorchDispatchMode):
    """How many numbers each new tensor has that an operation makes while entered."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._known: dict[int, Tensor] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tree_map_only(Tensor, self._learn, (args, kwargs))
        result = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _learn(self, tensor: Tensor) -> None:
        # Kept alive, so that no address comes twice.
        self._known[tensor.untyped_storage().data_ptr()] = tensor

    def _count(self, tensor: Tensor) -> None:
        if tensor.untyped_storage().data_ptr() not in self._known:
            self._learn(tensor)
            self.sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())


@every_divergence
@every_tail
def test_no_tensor_of_all_rows_and_the_vocabulary_is_made(divergence: str, tail: str) -> None:
    case = Case(tail, dtype=torch.float32)
    with Allocations() as made:
        torch.autograd.grad(case.sums(divergence).total / N, case.inputs)
    # A chunk's logits, and the gradient at the head.
    assert max(made.sizes) == V * D
    assert sorted(made.sizes)[-2] == 10 * V


def test_a_frozen_head_gets_no_gradient_and_without_gradients_only_values_are_computed() -> None:
    case = Case("bucket")
    loss = Loss("jsd", case.targets, case.tail, 1.0)
    with Allocations() as made:
        total = fused_losses(case.hidden, Head(case.weight.detach()), [Group(N, (loss,))], chunk_rows=4).total
        (gradient,) = torch.autograd.grad(total, case.hidden)
    assert gradient.abs().sum() > 0
    assert max(made.sizes) == N * D
    with torch.no_grad(), Allocations() as made:
        again = fused_losses(case.hidden, Head(case.weight), [Group(N, (loss,))], chunk_rows=4).total
    assert max(made.sizes) == 4 * V
    torch.testing.assert_close(again, total.detach())
    assert not again.requires_grad


def test_a_second_way_back_gives_the_same_gradients_and_leaves_the_first_ones_alone() -> None:
    case = Case("sketch")
    total = case.sums("jsd").total
    first = torch.autograd.grad(3 * total, case.inputs, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    assert_gradients_close(torch.autograd.grad(3 * total, case.inputs), first)
    assert_gradients_close(tuple(kept), first)


# heads


def adapted(tiny_model, *, tied: bool, **settings):
    """A tiny model with LoRA on its head and its queries, and a lens on it."""
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama", tied=tied, num_layers=2)
    config = LoraConfig(
        r=3,
        lora_alpha=8,
        target_modules=["lm_head", "q_proj"],
        init_lora_weights=False,
        **{"lora_dropout": 0.0, **settings},
    )
    get_peft_model(model, config)
    return model, LogitLens(model, lens_norm="final", vocab_size=317)


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Model with `tie_word_embeddings=True`"
)
@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@every_tail
def test_a_head_with_lora_gets_the_gradients_of_its_own_module(
    tiny_model, monkeypatch, tail: str, tied: bool, is_frozen: bool
) -> None:
    model, lens = adapted(tiny_model, tied=tied)
    head = model.get_output_embeddings()
    head.base_layer.weight.requires_grad_(not is_frozen)
    generator = torch.Generator().manual_seed(0)
    targets = ragged_targets(generator, torch.float32, vocab=317)
    own_tail = make_tail(tail, generator, torch.float32, vocab=317)
    states = torch.randn(N, 32, generator=generator).requires_grad_()
    inputs = [states, *(one for one in head.parameters() if one.requires_grad)]
    assert len(inputs) == (3 if is_frozen else 4)
    plain = sparse_divergence("jsd", head(states)[:, :317], targets, own_tail).sum()
    wanted = torch.autograd.grad(plain, inputs)
    monkeypatch.setattr(losses_module, "_plain", None)  # the fused way is the only one
    total = sum_losses([states], [Group(N, (Loss("jsd", targets, own_tail, 1.0),))], lens, chunk_rows=10).total
    torch.testing.assert_close(total, plain, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(total, inputs), wanted, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
    torch.testing.assert_close(lens.head(states), head(states)[:, :317], rtol=1e-5, atol=1e-5)
    assert "forward" not in vars(head.base_layer)


def test_lora_on_a_bfloat16_head_is_not_lost(tiny_model) -> None:
    model, lens = adapted(tiny_model, tied=False)
    model.to(torch.bfloat16)
    states = torch.randn(5, 32).bfloat16()
    wanted = model.lm_head(states).float()[:, :317]
    assert (lens.head(states) - wanted).abs().max() < 0.02 * wanted.abs().max()
    model.lm_head.enable_adapters(False)
    assert (lens.head(states) - wanted).abs().max() > 0.05 * wanted.abs().max()


@pytest.mark.parametrize("change", ["merged", "dora", "bias", "other"])
def test_a_head_that_is_more_than_matrices_takes_the_plain_way(tiny_model, change: str) -> None:
    settings: dict[str, dict[str, object]] = {"dora": {"use_dora": True}}
    model, lens = adapted(tiny_model, tied=False, **settings.get(change, {}))
    if change == "merged":
        model.lm_head.merge()
    if change == "bias":
        model.lm_head.lora_bias["default"] = True
        model.lm_head.lora_B["default"].bias = torch.nn.Parameter(torch.randn(320))
    if change == "other":
        model.lm_head = torch.nn.Sequential(model.lm_head)
        model.lm_head.weight = model.lm_head[0].weight
        lens = LogitLens(model, lens_norm="final", vocab_size=317)
    assert lens.plain_head() is None
    targets = ragged_targets(torch.Generator().manual_seed(0), torch.float32, vocab=317)
    states = torch.randn(N, 32).requires_grad_()
    plain = sparse_divergence("jsd", model.lm_head(states)[:, :317], targets, BucketTail()).sum()
    sums = sum_losses([states], [Group(N, (Loss("jsd", targets, BucketTail(), 1.0),))], lens, chunk_rows=10)
    torch.testing.assert_close(sums.total, plain)
    wanted, mine = (torch.autograd.grad(one, states)[0] for one in (plain, sums.total))
    torch.testing.assert_close(mine, wanted)
    assert 0 < sums.low < sums.total.detach() + 1e-4
    assert sums.slack > 0


@pytest.mark.parametrize("divergence", ["akl", "tvd", "ab"])
def test_fused_and_plain_groups_come_back_in_their_order(tiny_model, divergence: str) -> None:
    model = tiny_model("llama", num_layers=2)
    lens = LogitLens(model, lens_norm="final", vocab_size=300)
    targets = ragged_targets(torch.Generator().manual_seed(0), torch.float32, vocab=300)
    states = [torch.randn(N, 32).requires_grad_() for _ in range(3)]
    kinds = (divergence, "jsd", divergence)
    groups = [Group(N, (Loss(kind, targets, BucketTail(), 0.5),)) for kind in kinds]
    sums = sum_losses(states, groups, lens, chunk_rows=10)
    plain = torch.stack(
        [
            sparse_divergence(kind, lens.head(rows), targets, BucketTail()).sum()
            for kind, rows in zip(kinds, states, strict=True)
        ]
    )
    torch.testing.assert_close(sums.each, plain.detach(), rtol=1e-5, atol=1e-5)
    inputs = [*states, model.lm_head.weight]
    wanted = torch.autograd.grad(0.5 * plain.sum(), inputs)
    for mine, theirs in zip(torch.autograd.grad(sums.total, inputs), wanted, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
    assert sums.low[1] > 0
    assert sums.low[0] == sums.low[2] == 0


def test_dropout_of_an_adapter_is_drawn_once_for_value_and_gradient(tiny_model) -> None:
    """With the same seed the total changes by what the gradient says."""
    model, lens = adapted(tiny_model, tied=False, lora_dropout=0.5)
    model.double().train()
    targets = ragged_targets(torch.Generator().manual_seed(0), torch.float64, vocab=317)
    states = torch.randn(N, 32, dtype=torch.float64)
    for kind in ("jsd", "tvd"):

        def total(moved: Tensor, seed: int = 3, kind: str = kind) -> Tensor:
            torch.manual_seed(seed)
            group = Group(N, (Loss(kind, targets, BucketTail(), 1.0),))
            return sum_losses([moved], [group], lens, chunk_rows=10).total

        direction, step = torch.randn_like(states), 1e-5
        at = states.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(total(at), at)
        with torch.no_grad():
            slope = (total(states + step * direction) - total(states - step * direction)) / (2 * step)
            assert math.isclose(slope.item(), (gradient * direction).sum().item(), rel_tol=1e-5)
            assert total(states) != total(states, 4)


def test_a_hook_of_accelerate_on_the_head_is_obeyed(tiny_model) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_model("llama", num_layers=2)
    lens, states = LogitLens(model, lens_norm="final", vocab_size=300), torch.randn(N, 32)
    wanted, seen = lens.head(states), []

    class Watch(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    hooks.add_hook_to_module(model.lm_head, Watch())
    own = model.lm_head.forward
    assert torch.equal(lens.head(states), wanted)
    assert seen == [model.lm_head]
    assert model.lm_head.forward is own
    assert torch.equal(model.lm_head(states)[:, :300], wanted)


@pytest.mark.parametrize("divergence", ["jsd", "tvd"])
def test_weights_that_are_there_only_while_the_head_is_called_are_enough(tiny_model, divergence: str) -> None:
    """Sharding wrappers gather a module's weights in hooks around its call."""
    model = tiny_model("llama", num_layers=2).requires_grad_(False)
    lens, head = LogitLens(model, lens_norm="final", vocab_size=300), model.lm_head
    targets = ragged_targets(torch.Generator().manual_seed(0), torch.float32, vocab=300)
    states = torch.randn(N, 32).requires_grad_()
    groups = [Group(N, (Loss(divergence, targets, BucketTail(), 1.0),))]
    wanted = sum_losses([states], groups, lens, chunk_rows=10).total
    (gradient,) = torch.autograd.grad(wanted, states)
    whole, calls = head.weight.data, []

    def gather(*_) -> None:
        calls.append(head.weight.shape)
        head.weight.data = whole

    def release(*_) -> None:
        head.weight.data = torch.empty(0)

    head.register_forward_pre_hook(gather)
    head.register_forward_hook(release)
    release()
    total = sum_losses([states], groups, lens, chunk_rows=10).total
    assert calls == [(0,)]
    assert total == wanted
    head.weight.data = whole  # gathered again for the way back
    assert torch.equal(torch.autograd.grad(total, states)[0], gradient)

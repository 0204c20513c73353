"""Whatever a step makes lies on the device of its inputs: shown on a second device, which is a pretence of the CPU.

Its tensors say that they are on ``cpu:1`` and hold real ones, so that a step has values and gradients, and any machine
can run it. Where tensors of two devices meet, the pretence raises, as CUDA does.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from distilllens.collate import Batch, collate
from distilllens.config import TrainConfig
from distilllens.deepspeed_config import RunFacts, load_deepspeed_config
from distilllens.divergence import sparse_divergence
from distilllens.fused import Group, Head, Loss, fused_losses
from distilllens.launch import choose_device
from distilllens.lens import LogitLens, check_lens
from distilllens.lens_rows import choose_lens_rows
from distilllens.mixed_batch import Mix, Teaching, Teachings, collate_mixed
from distilllens.mixture import MixedExample
from distilllens.models import require_bfloat16, require_kernel
from distilllens.objective import Gate, Objective, Positions
from distilllens.packing import check_packing, pack
from distilllens.student import Student
from distilllens.tail_sampling import draw_tail
from distilllens.tails import BucketTail, ProfileTail, SampledTail, SketchTail, Tail
from distilllens.targets import TailSamples, split_top_k, unstack_targets
from distilllens.torch_engine import TorchEngine
from distilllens_cache import CachedExample

V, RANK = 320, 3
SECOND = torch.device("cpu", 1)
aten = torch.ops.aten
BETWEEN_DEVICES = {aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default}


class Placed(torch.Tensor):
    """A tensor on the second device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Placed":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=SECOND,
        )
        made.held = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, torch.Tensor], *_: Any) -> "Placed":
        return Placed(parts["held"])

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_there(operator, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.tolist:
            return args[0].detach().held.tolist()
        # What comes back to the CPU is an ordinary tensor again.
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def run_there(operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator on tensors of one device; RuntimeError for two. A number beside them may lie anywhere."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    is_there = any(isinstance(one, Placed) for one in given)
    if is_there and operator not in BETWEEN_DEVICES:
        takes_numbers = torch.Tag.pointwise in operator.tags
        for one in given:
            if not isinstance(one, Placed) and not (takes_numbers and one.ndim == 0):
                raise RuntimeError(f"{operator} of tensors on two devices, {[tuple(each.shape) for each in given]}")
    asked = kwargs.get("device")
    if asked is not None:
        is_there, kwargs = asked == SECOND, kwargs | {"device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map_only(Placed, lambda one: one.held, (args, kwargs))
    result = operator(*inner_args, **inner_kwargs)
    if operator._schema.is_mutable:
        written = [
            kwargs.get(one.name) if one.kwarg_only else args[place]
            for place, one in enumerate(operator._schema.arguments)
            if one.alias_info is not None and one.alias_info.is_write
        ]
        return written[0] if len(operator._schema.returns) == 1 else None
    return tree_map_only(torch.Tensor, Placed, result) if is_there else result


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_there(operator, args, kwargs or {})


class _Constants(TorchFunctionMode):
    """``torch.tensor`` chooses its device out of sight of operators."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if function is torch.tensor else None
        made = function(*args, **kwargs)
        return made if device is None else made.to(device)


@contextmanager
def second_device() -> Iterator[torch.device]:
    """While entered, the machine has the device that is given."""
    with ExitStack() as stack:
        stack.enter_context(_Operators())
        stack.enter_context(_Constants())
        yield SECOND


def test_the_second_device_computes_as_the_first_and_refuses_its_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 4, generator=generator), torch.randn(4, 5, generator=generator)
    wanted = a.clone().requires_grad_()
    (wanted @ b).log_softmax(-1).square().sum().backward()
    with second_device() as there:
        found = a.to(there).requires_grad_()
        (found @ b.to(there)).log_softmax(-1).square().sum().backward()
        assert found.grad is not None
        assert found.grad.device == there
        assert found.grad.tolist() == wanted.grad.tolist()  # type: ignore[union-attr]
        assert torch.tensor([1.0], device=there).device == there
        assert torch.zeros(2).device == torch.device("cpu")
        for mixed in (lambda: found + a, lambda: found @ b, lambda: torch.cat([found, a]), lambda: found[a[:, 0] > 0]):
            with pytest.raises(RuntimeError, match="on two devices"):
                mixed()


def examples(*, final: int = 4, seed: int = 0) -> list[CachedExample]:
    """Examples of many lengths with codes and draws of their tails, at teacher layers 2 and ``final``."""
    random, generator = np.random.default_rng(0), torch.Generator().manual_seed(seed)
    made = []
    for index, length in enumerate((9, 5, 12, 7)):
        positions = np.sort(random.choice(length - 1, size=2 + index % 3, replace=False)).astype(np.uint32)
        ids = random.integers(0, V, length).astype(np.uint32)
        targets = {}
        for layer in (2, final):
            rows, tail = split_top_k(torch.randn(len(positions), V, generator=generator) * 3, 8)
            samples: TailSamples = draw_tail(tail, rows, torch.rand(len(positions), 5, generator=generator).double())
            codes = torch.randint(-8, 8, (len(positions), RANK), generator=generator).to(torch.int8)
            targets[layer] = unstack_targets(dataclasses.replace(rows, codes=codes, samples=samples), [len(positions)])[
                0
            ]
        made.append(CachedExample(index, str(index), ids, positions, targets))
    return made


def tail_of(name: str) -> Tail:
    generator = torch.Generator().manual_seed(1)
    match name:
        case "profile":
            return ProfileTail(torch.randn(V, generator=generator).log_softmax(-1))
        case "sketch":
            return SketchTail(torch.randn(V, RANK, generator=generator) / 4, torch.randn(V, generator=generator), 9.0)
        case "sampled":
            return SampledTail()
    return BucketTail()


PLAIN = Objective(task="fkl", lens_divergence="jsd", pairs=((1, 2), (3, 2)), lens_weight=0.7, kd_ratio=0.6)
OBJECTIVES = {
    "bucket": PLAIN,
    "profile": dataclasses.replace(PLAIN, gate=Gate(2.0, 2.0)),
    "sketch": dataclasses.replace(PLAIN, task="rkl", positions=Positions(0.5)),
    "sampled": dataclasses.replace(PLAIN, task="akl", lens_trains_head=False),
}


def of_one_cache(tail: str) -> Batch:
    """A packed batch whose lens layers read half of the rows."""
    some, packs = pack(examples(), in_one_row=False)
    rows = choose_lens_rows(some, (1, 3), share=0.5, seed=0, step=0)
    return collate(some, {2: tail_of(tail), 4: tail_of(tail)}, lens_rows=rows, packs=packs)


def of_two_caches(mix: Mix, objective: Objective) -> Batch:
    pairs = list(zip(examples(), examples(final=6, seed=5), strict=True))
    some = [
        MixedExample(a.index, a.id, a.token_ids, a.target_positions, {}, {0: a.targets, 1: b.targets})
        if mix != "data"
        else MixedExample(a.index, a.id, a.token_ids, a.target_positions, {}, {n % 2: (a, b)[n % 2].targets})
        for n, (a, b) in enumerate(pairs)
    ]
    each = tuple(
        Teaching(name, 1.0 if mix == "data" else 0.5, objective, {2: tail_of(tail), final: tail_of(tail)})
        for name, tail, final in (("A", "profile", 4), ("B", "sketch", 6))
    )

    def half(own: Any) -> Any:
        return choose_lens_rows(own, (1, 3), share=0.5, seed=0, step=0)

    return collate_mixed(some, Teachings(mix, each), lens_rows=half)


BATCHES: dict[str, tuple[Objective, Callable[[], Batch]]] = {
    **{tail: (objective, lambda tail=tail: of_one_cache(tail)) for tail, objective in OBJECTIVES.items()},
    "data": (PLAIN, lambda: of_two_caches("data", PLAIN)),
    "losses": (PLAIN, lambda: of_two_caches("losses", PLAIN)),
    "probabilities": (PLAIN, lambda: of_two_caches("probabilities", PLAIN)),
}


def build(tiny_model: Callable[..., Any], objective: Objective) -> Student:
    model = tiny_model("llama")
    return Student(model, LogitLens(model, lens_norm="final", vocab_size=V), objective, chunk_rows=4)


def step(student: Student, batch: Batch, device: torch.device, *, bf16: bool) -> tuple[dict[str, float], float]:
    """The sums after an optimizer step on ``device``, and the gradient's norm in it."""
    config = TrainConfig(method="sft", dataset="rows", student="student", output_dir="run", bf16=bf16)  # type: ignore[arg-type]
    engine = TorchEngine(student, config, device)
    batch = batch.to(device)
    engine.backward(engine.forward(batch)["total"] / len(batch.next_ids))
    norm = engine.update(1e-3)
    sums = engine.forward(batch)
    assert {value.device for value in sums.values()} == {device}
    return {name: value.item() for name, value in sums.items()}, norm


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_a_training_step_stays_on_its_device_and_gives_the_same_numbers(tiny_model, name: str, bf16: bool) -> None:
    objective, make = BATCHES[name]
    wanted, norm = step(build(tiny_model, objective), make(), torch.device("cpu"), bf16=bf16)
    with second_device() as there:
        found, same = step(build(tiny_model, objective), make(), there, bf16=bf16)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert same == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("tail", OBJECTIVES)
def test_what_is_measured_and_checked_before_a_run_stays_on_its_device(tiny_model, tail: str) -> None:
    wanted = build(tiny_model, PLAIN)(of_one_cache(tail), measured_pairs=((1, 2),))
    with second_device() as there:
        student = build(tiny_model, PLAIN).to(there).eval()
        with torch.no_grad():
            check_lens(student.model, student.lens)
            check_packing(student.model, student.lens)
            found = student(of_one_cache(tail).to(there), measured_pairs=((1, 2),))
        batch = of_one_cache(tail).to(there)
        own = batch.tails[4].completed(batch.targets[4], V)
        assert sparse_divergence("fkl", own, batch.targets[4], batch.tails[4]).max().item() < 1e-3
        for name, value in wanted.items():
            torch.testing.assert_close(torch.tensor(found[name].tolist()), value.float(), atol=1e-3, rtol=1e-4)


def test_autocast_leaves_a_sketch_in_full_precision() -> None:
    batch = of_one_cache("sketch")
    targets, tail = batch.targets[4], batch.tails[4]
    assert isinstance(tail, SketchTail)
    wanted = tail.shape(targets), tail.shape_at(targets, targets.ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tail.shape(targets), wanted[0])
        assert torch.equal(tail.shape_at(targets, targets.ids), wanted[1])


def test_gradients_asked_for_twice_under_autocast_are_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(11, 16, generator=generator, requires_grad=True)
    head = torch.randn(V, 16, generator=generator).to(torch.bfloat16)
    batch = of_one_cache("bucket")
    targets = batch.targets[4]
    rows = states[: len(targets)]
    loss = Loss("fkl", targets, BucketTail(), 1.0)
    total = fused_losses(rows, Head(head), [Group(len(targets), (loss,))]).total
    with torch.autocast("cpu", torch.bfloat16):
        first, second = (torch.autograd.grad(total, states, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lens_with_large_logits_is_held_to_what_its_number_type_can_tell(tiny_model, dtype: torch.dtype) -> None:
    model = tiny_model("granite", logits_scaling=2.0)
    with torch.no_grad():
        model.lm_head.weight.mul_(40.0)
    model.to(dtype)
    lens = LogitLens(model, lens_norm="final", vocab_size=V)
    check_lens(model, lens)
    lens._scale = 0.45
    with pytest.raises(ValueError, match="differs from the model's own logits"):
        check_lens(model, lens)


def test_a_lens_is_checked_in_the_number_type_of_autocast(tiny_model) -> None:
    model = tiny_model("llama")
    lens = LogitLens(model, lens_norm="final", vocab_size=V)
    with torch.autocast("cpu", torch.bfloat16):
        check_lens(model, lens)
        check_packing(model, lens)


def test_flash_attention_is_refused_where_it_cannot_run() -> None:
    require_kernel("sdpa", torch.device("cpu"), is_16_bit=False, flag="--bf16")
    require_kernel("flash_attention_2", torch.device("cuda", 0), is_16_bit=True, flag="--bf16")
    with pytest.raises(ValueError, match="needs a CUDA device"):
        require_kernel("flash_attention_2", torch.device("cpu"), is_16_bit=True, flag="--bf16")
    with pytest.raises(ValueError, match="in 16 bits only: give --bf16"):
        require_kernel("flash_attention_3", torch.device("cuda", 0), is_16_bit=False, flag="--bf16")


@pytest.mark.parametrize(
    ("asked", "shown", "local_rank", "taken"),
    [("auto", 4, "3", 3), ("cuda", 1, "3", 0), ("cuda:1", 2, "0", 1), ("auto", 2, None, 0)],
)
def test_a_rank_takes_its_gpu_and_tells_torch(monkeypatch, asked: str, shown: int, local_rank, taken: int) -> None:
    told: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: shown)
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert choose_device(asked) == torch.device("cuda", taken)
    assert told == [torch.device("cuda", taken)]


def test_ranks_that_share_a_machine_are_not_all_put_on_one_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="--device cuda:1 puts all ranks of this machine on one GPU"):
        choose_device("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # one rank on each of two machines
    assert choose_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize("can", [True, False])
def test_bfloat16_is_refused_on_a_gpu_that_only_emulates_it(monkeypatch, can: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: can or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    require_bfloat16(torch.device("cpu"), flag="--bf16")
    with (
        nullcontext() if can else pytest.raises(ValueError, match=r"--bf16: Tesla T4 \(compute capability 7\.5\) does")
    ):
        require_bfloat16(torch.device("cuda", 0), flag="--bf16")


def test_deepspeed_stays_on_the_cpu_that_was_asked_for_beside_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    config = TrainConfig(method="sft", dataset="rows", student="s", output_dir="run", device="cpu")  # type: ignore[arg-type]
    load_deepspeed_config(config, RunFacts(1, 32, 4))
    assert os.environ["DS_ACCELERATOR"] == "cpu"

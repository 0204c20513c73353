"""The head and its divergences in one pass: logits of one chunk of rows are alive, and gradients come along.

The same numbers as ``divergence.py``, its plain twin, without an autograd graph over the vocabulary. For a divergence
``D = sum_v g(p_v, q_v)`` of ``q = softmax(z)``, with ``G_v = dD/dq_v``,

    dD/dz_v = q_v (G_v - sum_u q_u G_u),

so a chunk's logits are turned in place into the gradient at them, and two products give the gradients at hidden states
and head. Nothing is computed twice: three products of (rows, D, V), against four with checkpointing.

Dimension key: N rows, D hidden size, K tokens kept, V vocabulary, M losses, P products.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilllens.divergence import jsd_certificate
from distilllens.divergence_spec import DivergenceSpec, parse_divergence
from distilllens.fused_divergences import FUSED, fused_divergence
from distilllens.fused_tiles import FUSED_TAILS, Scratch, tile_loss
from distilllens.tails import Tail
from distilllens.targets import SparseTargets
from distilllens_cache import LOG_FLOOR

TILE_ROWS = 16
"""Rows worked on at a time on a CPU, so that their probabilities stay in its cache; with fewer, threads wait for each
other (`scripts/bench/loss.py`)."""
BLOCK_TOKENS = 8192
"""Rows of a bfloat16 head that are in float32 at a time."""
HAS_WIDE_PRODUCTS = hasattr(torch.ops.aten.mm, "dtype")
"""Whether bfloat16 products can have float32 results (on CUDA, since torch 2.8)."""


@dataclass(frozen=True, eq=False)
class Loss:
    """A divergence from some targets, and its weight in the total."""

    divergence: str
    targets: SparseTargets
    tail: Tail
    weight: float

    @property
    def spec(self) -> DivergenceSpec:
        """The divergence with its parameters."""
        return parse_divergence(self.divergence)


@dataclass(frozen=True, eq=False)
class Group:
    """Consecutive rows of hidden states and the losses of their logits; each loss has a target per row."""

    num_rows: int
    losses: tuple[Loss, ...]
    trains_head: bool = True
    """Whether they have a gradient at the head's own weights."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A low-rank addition to a head's logits: ``reduced(h) @ weight.T``."""

    reduced: Callable[[Tensor], Tensor]
    """States (N, D) -> (N, rank), with a graph of its own."""
    weight: Float[Tensor, "rows rank"]


@dataclass(frozen=True, eq=False)
class Head:
    """Logits are ``softcap * tanh((h @ weight.T + bias) * scale / softcap)``, adapters added before the scale."""

    matrix: Float[Tensor, "rows D"]
    whole_bias: Float[Tensor, " rows"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    """Rows that count; those after them are padding. None: all."""
    adapters: tuple[Adapter, ...] = ()

    @property
    def weight(self) -> Float[Tensor, "V D"]:
        """The matrix without padding."""
        return self.matrix[: self.vocab_size]

    @property
    def bias(self) -> Float[Tensor, " V"] | None:
        """The bias without padding."""
        return None if self.whole_bias is None else self.whole_bias[: self.vocab_size]


class LossSums(NamedTuple):
    """Sums over rows, in nats; M losses in the order of their groups. Only ``total`` has a gradient."""

    total: Float[Tensor, ""]
    """The losses times their weights."""
    each: Float[Tensor, " M"]
    low: Float[Tensor, " M"]
    """Lower bound of the dense divergence (``divergence.jsd_certificate``); 0 for a loss that is not a JSD."""
    slack: Float[Tensor, " M"]
    """``low + slack`` is an upper bound of it; 0 for a loss that is not a JSD."""
    on_support: Float[Tensor, " M"]
    """The student's probability of the kept tokens."""


def is_fused(divergence: str, tail: Tail) -> bool:
    """Whether a divergence with this tail has a fused form."""
    return parse_divergence(divergence).name in FUSED and isinstance(tail, FUSED_TAILS)


def certain_targets(ids: Tensor) -> SparseTargets:
    """Targets that give all mass to ``ids`` (N): forward KL to them, with a bucket, is the cross-entropy."""
    return SparseTargets(
        ids=ids[:, None],
        log_probs=torch.zeros(len(ids), 1, device=ids.device),
        is_kept=torch.ones(len(ids), 1, dtype=torch.bool, device=ids.device),
        log_rest=torch.full((len(ids),), LOG_FLOOR, device=ids.device),
    )


def fused_losses(
    normed: Float[Tensor, "N D"], head: Head, groups: Sequence[Group], *, chunk_rows: int = 128
) -> LossSums:
    """The sums of all losses of all groups.

    The head's gradient is accumulated over all groups in one float32 buffer.
    """
    if (num_rows := sum(group.num_rows for group in groups)) != len(normed):
        raise ValueError(f"the groups have {num_rows} rows and the hidden states {len(normed)}")
    with torch.autocast(normed.device.type, enabled=False):
        factors = [normed.to(head.matrix.dtype), head.matrix]
        for adapter in head.adapters:
            factors += [adapter.reduced(normed).to(adapter.weight.dtype), adapter.weight]
        task = _Task(head.scale, head.softcap, head.weight.shape[0], tuple(groups), chunk_rows, torch.is_grad_enabled())
        total, sums = _Fused.apply(task, head.whole_bias, *factors)  # type: ignore[misc]
    return LossSums(total, *sums.unbind(-1))


class _Task(NamedTuple):
    """What the pass needs besides tensors with gradients."""

    scale: float
    softcap: float | None
    vocab_size: int
    groups: tuple[Group, ...]
    chunk_rows: int
    wants_gradient: bool


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, task: _Task, bias: Tensor | None, *factors: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.task = task
        ctx.save_for_backward(bias, *factors)
        total, sums, ctx.gradients = _pass(task, bias, factors, ctx.needs_input_grad[1:])
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor, _of_sums: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            # Given out before, to be scaled in place: a copy would double the peak. This costs another pass.
            bias, *factors = ctx.saved_tensors
            *_, gradients = _pass(ctx.task, bias, factors, ctx.needs_input_grad[1:])
        given = (None if g is None else g.mul_(of_total).to(d) for g, d in gradients)
        return (None, *given)


Gradients = list[tuple[Tensor | None, torch.dtype]]
"""Of bias and factors, each with the type that it is to have."""


@torch.no_grad()
def _pass(
    task: _Task, bias: Tensor | None, factors: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor, Tensor, Gradients]:
    """The weighted total, the sums (M, 4) of value, low, slack and mass, and the gradients of the total."""
    needed = [need and task.wants_gradient for need in needed]
    work = _Workspace(task, bias, factors, needed)
    num_rows = len(factors[0])
    # A second pass for gradients may be asked for under autocast again.
    with torch.autocast(factors[0].device.type, enabled=False):
        for start in range(0, num_rows, task.chunk_rows):
            work.run(slice(start, min(start + task.chunk_rows, num_rows)))
    weights = torch.tensor([loss.weight for group in task.groups for loss in group.losses], dtype=torch.float64)
    total = (work.sums[:, 0] * weights.to(work.sums.device)).sum()
    return total.to(work.full), work.sums.to(work.full), work.gradients()


class _Running:
    """A loss during the pass."""

    def __init__(self, loss: Loss, number: int, dtype: torch.dtype) -> None:
        divergence = fused_divergence(loss.spec)
        self.unit = -divergence.factor * loss.weight
        """What the gradient that ``run`` leaves is to be multiplied with."""
        self._targets, self._spec, self._number = loss.targets, loss.spec, number
        self._tile = tile_loss(divergence, loss.tail, dtype)

    def run(self, z: Tensor, rows: slice, scratch: Scratch, sums: Tensor) -> None:
        """Add to ``sums``; logits ``z`` of some of the group's rows become their gradient over ``unit``."""
        seen = self._tile.run(z, self._targets[rows], scratch)
        sums[self._number, 0] += seen.value.sum()
        # By the rest, one exp a row, and in float64: the mass of the kept tokens is there already.
        sums[self._number, 3] -= seen.log_q[:, -1].expm1().sum()
        if self._spec.name == "jsd":
            limits = jsd_certificate(seen.log_p, seen.log_q, *self._spec.parameters)
            sums[self._number, 1] += limits.low.sum()
            sums[self._number, 2] += limits.slack.sum()


class _Workspace:
    """Buffers that every chunk uses again, and the gradients they add up to."""

    def __init__(self, task: _Task, bias: Tensor | None, factors: Sequence[Tensor], needed: Sequence[bool]) -> None:
        self._task, self._bias = task, bias
        self._states, self._weights = factors[::2], [weight[: task.vocab_size] for weight in factors[1::2]]
        self._device = self._states[0].device
        self.full = torch.float64 if self._states[0].dtype == torch.float64 else torch.float32
        inputs = [bias, *factors]
        self._of_inputs = [self._zeros(x) if x is not None and n else None for x, n in zip(inputs, needed, strict=True)]
        self._dtypes = [self.full if tensor is None else tensor.dtype for tensor in inputs]
        self._groups: list[tuple[int, list[_Running]]] = []
        number = 0
        for group in task.groups:
            numbered = enumerate(group.losses, number)
            self._groups.append((group.num_rows, [_Running(loss, n, self.full) for n, loss in numbered]))
            number += len(group.losses)
        self.sums = torch.zeros(number, 4, dtype=torch.float64, device=self._device)
        chunk = min(task.chunk_rows, len(self._states[0]))
        self._tile_rows = min(chunk, TILE_ROWS) if self._device.type == "cpu" else chunk
        self._logits = torch.empty(chunk, task.vocab_size, dtype=self.full, device=self._device)
        self._buffers: dict[str, Tensor] = {}

    def gradients(self) -> Gradients:
        """Gradients at bias and factors, where they were needed."""
        return list(zip(self._of_inputs, self._dtypes, strict=True))

    def run(self, rows: slice) -> None:
        """Losses and gradients of one chunk."""
        logits = self._project(rows)
        unit = 0.0
        for tile, of_group, losses in self._tiles(rows):
            own = self._run_tile(logits[tile], of_group, losses)
            # One number for the whole chunk can wait for the products.
            unit = unit or own or 1.0
            if own != unit:
                logits[tile].mul_(own / unit)
        if any(gradient is not None for gradient in self._of_inputs):
            self._add_gradients(logits, rows, unit * self._task.scale)

    def _project(self, rows: slice) -> Tensor:
        logits = self._logits[: rows.stop - rows.start]
        for number, (states, weight) in enumerate(zip(self._states, self._weights, strict=True)):
            for block in self._blocks(weight):
                columns, part = logits[:, block], weight[block].t()
                _add_product(columns, states[rows], part, alpha=self._task.scale, is_first=number == 0)
        if self._bias is not None:
            logits.add_(self._bias[: self._task.vocab_size], alpha=self._task.scale)
        return logits

    def _tiles(self, rows: slice) -> Iterator[tuple[slice, slice, list[_Running]]]:
        """Pieces of a chunk that lie in one group: where in the chunk, where in the group, and its losses."""
        first = 0
        for num_rows, losses in self._groups:
            start, stop = max(rows.start, first), min(rows.stop, first + num_rows)
            for at in range(start, stop, self._tile_rows):
                end = min(at + self._tile_rows, stop)
                yield slice(at - rows.start, end - rows.start), slice(at - first, end - first), losses
            first += num_rows

    def _run_tile(self, z: Tensor, rows: slice, losses: list[_Running]) -> float:
        """Logits ``z`` become the gradient of their losses over the number that is returned."""

        def scratch(name: str) -> Tensor:
            if name not in self._buffers:
                self._buffers[name] = self._logits.new_empty(self._tile_rows, self._task.vocab_size)
            return self._buffers[name][: len(z)]

        slope = _cap(z, self._task.softcap, scratch)
        if len(losses) == 1:
            losses[0].run(z, rows, scratch, self.sums)
            unit = losses[0].unit
        else:
            total, copy = scratch("total").zero_(), scratch("copy")
            for loss in losses:
                loss.run(copy.copy_(z), rows, scratch, self.sums)
                if loss.unit:
                    total.add_(copy, alpha=loss.unit)
            z.copy_(total)
            unit = 1.0
        if slope is not None:
            z.mul_(slope)
        return unit

    def _add_gradients(self, logits: Tensor, rows: slice, alpha: float) -> None:
        """The products that turn the gradient at logits, times ``alpha``, into those at bias and factors."""
        of_bias, *of_factors = self._of_inputs
        if of_bias is not None:
            of_bias[: self._task.vocab_size].add_(logits.sum(0), alpha=alpha)
        pairs = zip(self._states, self._weights, of_factors[::2], of_factors[1::2], strict=True)
        for states, weight, of_states, of_weight in pairs:
            for block in self._blocks(weight):
                if of_states is not None:
                    _add_product(of_states[rows], logits[:, block], weight[block], alpha=alpha)
                if of_weight is not None:
                    _add_product(of_weight[block], logits[:, block].t(), states[rows], alpha=alpha)

    def _blocks(self, weight: Tensor) -> list[slice]:
        """The vocabulary at once, or in blocks where products need temporaries in full precision."""
        size = self._task.vocab_size
        step = size if weight.dtype == self.full else BLOCK_TOKENS
        return [slice(start, min(start + step, size)) for start in range(0, size, step)]

    def _zeros(self, like: Tensor) -> Tensor:
        return torch.zeros(like.shape, dtype=self.full, device=like.device)


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, alpha: float, is_first: bool = False) -> None:
    """Add ``alpha * a @ b`` in the precision of ``out``, in place of what is there if it is the first."""
    if a.dtype == b.dtype == out.dtype:
        torch.addmm(out, a, b, beta=0 if is_first else 1, alpha=alpha, out=out)
        return
    if a.is_cuda and HAS_WIDE_PRODUCTS:
        low = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
        # A bfloat16 result would err by up to 0.03 nats in the logsumexp.
        product = torch.mm(a.to(low), b.to(low), out_dtype=out.dtype)
    else:
        product = a.to(out.dtype) @ b.to(out.dtype)
    torch.mul(product, alpha, out=out) if is_first else out.add_(product, alpha=alpha)


def _cap(z: Tensor, softcap: float | None, scratch: Scratch) -> Tensor | None:
    """Soft-cap logits in place; the slope of that at each, or None without a cap."""
    if softcap is None:
        return None
    # 1 / cosh^2 and not 1 - tanh^2, which loses its digits near the cap.
    slope = torch.cosh(z.div_(softcap), out=scratch("slope")).square_().reciprocal_()
    z.tanh_().mul_(softcap)
    return slope

"""All losses of a step's rows: fused with the head where they have a fused form, else chunk by chunk under autograd.

Dimension key: N rows, D hidden size, M losses.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distilllens.divergence import jsd_certificate, sparse_divergence
from distilllens.fused import Group, Head, Loss, LossSums, fused_losses, is_fused
from distilllens.lens import LogitLens
from distilllens.tails import BucketTail


def sum_losses(normed: Sequence[Tensor], groups: Sequence[Group], lens: LogitLens, *, chunk_rows: int) -> LossSums:
    """The sums of all losses of all groups; ``normed`` are the states that the head reads, (N, D) for each group.

    Groups that are given the same tensor share the head's products.
    """
    ways: dict[tuple[bool, bool], dict[int, list[int]]] = {}
    for number, (states, group) in enumerate(zip(normed, groups, strict=True)):
        is_fast = lens.is_plain and all(is_fused(loss.divergence, loss.tail) for loss in group.losses)
        ways.setdefault((is_fast, group.trains_head), {}).setdefault(id(states), []).append(number)
    totals, sums = [], {}
    for (is_fast, trains_head), by_states in ways.items():
        joined, numbers = [], [number for some in by_states.values() for number in some]
        for first, *others in by_states.values():
            losses = [loss for number in (first, *others) for loss in groups[number].losses]
            joined.append(replace(groups[first], losses=tuple(losses)))
        path = _fused if is_fast else _plain
        found = path([normed[some[0]] for some in by_states.values()], joined, lens, chunk_rows, trains_head)
        totals.append(found.total)
        of_losses = torch.stack([found.each, found.low, found.slack, found.on_support], -1)
        sums |= zip(numbers, of_losses.split([len(groups[n].losses) for n in numbers]), strict=True)
    return LossSums(torch.stack(totals).sum(), *torch.cat([sums[n] for n in range(len(groups))]).unbind(-1))


def _fused(normed: list[Tensor], groups: list[Group], lens: LogitLens, chunk_rows: int, trains_head: bool) -> LossSums:
    found: list[LossSums] = []

    def compute(states: Tensor, head: Head) -> Tensor:
        found.append(fused_losses(states, head, groups, chunk_rows=chunk_rows))
        return found[0].total

    # The total as it leaves the head's modules: gradients have to go back through their hooks.
    total = lens.with_plain_head(torch.cat(normed), compute, trains_head=trains_head)
    return found[0]._replace(total=total)


def _plain(normed: list[Tensor], groups: list[Group], lens: LogitLens, chunk_rows: int, trains_head: bool) -> LossSums:
    sums = []
    for rows, group in zip(normed, groups, strict=True):

        def of_chunk(logits: Tensor, where: slice, group: Group = group) -> Tensor:
            return torch.stack([_sums(loss, logits, where) for loss in group.losses]).flatten()

        sums.append(lens.sum_over_chunks(rows, of_chunk, chunk_rows=chunk_rows, trains_head=trains_head))
    each, *others = torch.cat(sums).view(-1, 4).unbind(-1)
    weights = torch.tensor([loss.weight for group in groups for loss in group.losses]).to(each)
    return LossSums((each * weights).sum(), each.detach(), *(one.detach() for one in others))


def _sums(loss: Loss, logits: Tensor, where: slice) -> Tensor:
    """Value, low, slack and the student's mass on the kept tokens, each summed over a chunk of rows."""
    targets = loss.targets[where]
    value = sparse_divergence(loss.spec, logits, targets, loss.tail).sum()
    with torch.no_grad():
        log_q = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
        seen = BucketTail().outcomes(log_q, targets)
        low = slack = torch.zeros_like(value)
        if loss.spec.name == "jsd":
            limits = jsd_certificate(seen.log_p, seen.log_q, *loss.spec.parameters, counts=seen.counts)
            low, slack = (one.sum().to(value) for one in limits)
        on_support = -seen.log_q[:, -1].expm1().sum()
    return torch.stack([value, low, slack, on_support.to(value)])

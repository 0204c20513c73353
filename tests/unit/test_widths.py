"""How many tokens a target keeps, and that what is not kept is in its rest."""

import pytest
import torch

from distilllens.targets import split_top_k, stack_targets, unstack_targets
from distilllens.widths import Width

PROBS = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.03, 0.01], [0.94, 0.02, 0.01, 0.01, 0.01, 0.01]])


@pytest.mark.parametrize(
    ("width", "counts"),
    [
        (Width(4), [4, 4]),
        (Width(5, min_prob=0.05), [4, 1]),
        (Width(5, min_k=2, min_prob=0.05), [4, 2]),
        (Width(3, min_prob=0.05), [3, 1]),
        (Width(6, top_p=0.79), [2, 1]),
        (Width(6, top_p=0.9001), [4, 1]),
        (Width(6, min_prob=0.2, top_p=0.95), [2, 1]),
    ],
)
def test_a_row_keeps_as_many_tokens_as_its_limits_say(width: Width, counts: list[int]) -> None:
    targets, tail = split_top_k(PROBS.log(), width)
    assert targets.is_kept.sum(-1).tolist() == counts
    for row, count in enumerate(counts):
        left = PROBS[row].sort(descending=True).values[count:]
        assert targets.log_rest[row].exp().item() == pytest.approx(left.sum().item(), abs=1e-6)
        assert sorted(tail[row][tail[row] > 0].tolist()) == pytest.approx(sorted(left.tolist()), abs=1e-6)
        assert (tail[row, targets.ids[row, :count]] == 0).all()


def test_ragged_rows_survive_the_cache_and_back() -> None:
    targets, _ = split_top_k(
        torch.randn(7, 30, generator=torch.Generator().manual_seed(0)) * 3, Width(9, min_prob=0.05)
    )
    again = stack_targets(unstack_targets(targets, [3, 0, 4]))
    assert again.is_kept.sum(-1).tolist() == targets.is_kept.sum(-1).tolist()
    assert again.ids[again.is_kept].tolist() == targets.ids[targets.is_kept].tolist()
    torch.testing.assert_close(again.log_probs[again.is_kept], targets.log_probs[targets.is_kept])


@pytest.mark.parametrize("limits", [(4, 5, 0.0, 1.0), (4, 0, 0.0, 1.0), (4, 1, 1.0, 1.0), (4, 1, 0.0, 0.0)])
def test_limits_that_contradict_each_other_are_refused(limits: tuple[int, int, float, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Width(*limits)

"""Packed rows hold the same examples, and each of them sees itself alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distilllens.collate import collate
from distilllens.lens import LogitLens, rows_at
from distilllens.packing import check_packing, pack
from distilllens_cache import CachedExample

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=12)


def example(index: int, length: int) -> CachedExample:
    random = np.random.default_rng(index)
    positions = np.sort(random.choice(length - 1, size=max(1, length // 2), replace=False)).astype(np.uint32)
    ids = random.integers(0, 300, length).astype(np.uint32)
    return CachedExample(index=index, id=f"row-{index}", token_ids=ids, target_positions=positions, targets={})


@given(lengths=LENGTHS, in_one_row=st.booleans())
def test_every_example_is_packed_once_and_fits(lengths: list[int], in_one_row: bool) -> None:
    packed, packs = pack([example(n, length) for n, length in enumerate(lengths)], in_one_row=in_one_row)
    assert sorted(one.index for one in packed) == list(range(len(lengths)))
    assert [place for row in packs for place in row] == list(range(len(lengths)))
    capacity = sum(lengths) if in_one_row else max(lengths)
    sums = [sum(len(packed[place].token_ids) for place in row) for row in packs]
    assert max(sums) <= capacity
    # No two rows would fit into one.
    assert all(a + b > capacity for n, a in enumerate(sums) for b in sums[n + 1 :])


@given(lengths=LENGTHS)
@settings(max_examples=25)
def test_a_packed_batch_has_the_tokens_and_targets_of_the_examples(lengths: list[int]) -> None:
    packed, packs = pack([example(n, length) for n, length in enumerate(lengths)], in_one_row=False)
    batch = collate(packed, {}, packs=packs)
    assert batch.position_ids is not None
    assert batch.attention_mask.sum() == sum(lengths)
    next_ids = batch.input_ids.roll(-1, 1)[batch.is_target]
    assert torch.equal(next_ids, batch.next_ids)
    assert torch.equal(next_ids, torch.cat([_next(one) for one in packed]))
    positions = torch.cat([torch.from_numpy(one.target_positions.astype(np.int64)) for one in packed])
    assert torch.equal(batch.position_ids[batch.is_target], positions)
    # Padding is a sequence of its own, and not a longer last one.
    starts = (batch.position_ids == 0).sum().item()
    assert starts == len(lengths) + (batch.attention_mask == 0).any(-1).sum().item()


def _next(one: CachedExample) -> torch.Tensor:
    return torch.from_numpy(one.token_ids[one.target_positions.astype(np.int64) + 1].astype(np.int64))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("in_one_row", [False, True])
def test_hidden_states_are_those_of_the_examples_alone(tiny_model, architecture, attention, in_one_row) -> None:
    model = tiny_model(architecture, attn_implementation=attention).eval()
    lens = LogitLens(model, lens_norm="final", vocab_size=320)
    packed, packs = pack([example(n, 3 + 5 * n) for n in range(6)], in_one_row=in_one_row)
    together, apart = collate(packed, {}, packs=packs), collate(packed, {})
    for layer in (2, 4):
        states = [
            rows_at(
                lens.hidden_states(b.input_ids, b.attention_mask, [layer], position_ids=b.position_ids)[layer],
                b.is_target,
            )
            for b in (together, apart)
        ]
        torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)


def test_a_model_whose_sequences_would_see_each_other_is_refused(tiny_model) -> None:
    model = tiny_model("llama").eval()
    lens = LogitLens(model, lens_norm="final", vocab_size=320)
    check_packing(model, lens)
    plain = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **options: plain(*args, **options)
    with pytest.raises(ValueError, match="see each other"):
        check_packing(model, lens)

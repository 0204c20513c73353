"""How close a student is to the teacher of a cache, position by position, without generating."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilllens.batches import pack_by_length
from distilllens.collate import Batch, collate
from distilllens.lens import check_lens
from distilllens.matching import Matching, match_student
from distilllens.objective import Objective
from distilllens.student import Student
from distilllens.tails import Tail, tails_on
from distilllens_cache import CacheReader

MEASURE_TOKENS = 4096
"""Token budget of one batch, padding included."""


def averages(
    forward: Callable[[Batch], dict[str, Tensor]],
    reader: CacheReader,
    *,
    tails: dict[int, Tail],
    device: torch.device,
    limit: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    all_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, float]:
    """Averages over all target positions of a cache, of the sums that ``forward`` gives for a batch.

    ``kl`` and ``reference_loss`` (nats per target), ``lens_jsd/s:t`` and their mean ``lens_jsd`` (nats, at most
    ln 2), ``kept_mass/s:t`` and ``student_mass/s:t`` (the teacher's and the student's probability of the kept tokens;
    ``final`` for the final layer), ``top1_agreement`` (share of positions whose likeliest token is the teacher's),
    ``calibration_error`` (expected calibration error of the likeliest token against the true next one), and
    ``num_targets``. Ranks share the batches; every rank returns the same numbers.

    The certificate: the JSD over the whole vocabulary, which a cache cannot know, lies between ``lens_jsd_low/s:t`` and
    ``lens_jsd_high/s:t``, which follow from the stored masses alone. ``lens_jsd/s:t`` is its estimate by the tail, and
    may lie outside where the tail is wrong.
    """
    size = min(len(reader), limit or len(reader))
    batches = pack_by_length(reader.num_tokens[:size].tolist(), token_budget=MEASURE_TOKENS)
    # Neighbours in a shard are read together.
    batches = sorted(sorted(batch) for batch in batches)
    tails = tails_on(tails, device)
    totals: dict[str, Tensor] = {}
    for start in range(0, len(batches), world_size):
        # Under ZeRO-3 every rank takes part in every forward pass; those without a batch left repeat the last one.
        own = start + rank
        batch = collate([reader[index] for index in batches[min(own, len(batches) - 1)]], tails).to(device)
        for name, value in forward(batch).items():
            counted = value.double() if own < len(batches) else torch.zeros_like(value, dtype=torch.float64)
            totals[name] = totals.get(name, torch.zeros_like(counted)) + counted
    totals = {name: all_sum(value) for name, value in totals.items()}
    count = int(reader.num_targets[:size].sum())
    pairs = [name for name in totals if name.startswith("lens/")]
    result = {"kl": totals["kl"].item() / count}
    of_lens = (name for name in totals if name.startswith("lens"))
    result |= {name.replace("lens", "lens_jsd", 1): totals[name].item() / count for name in of_lens}
    result |= {name: totals[name].item() / count for name in totals if "mass/" in name}
    if pairs:
        result["lens_jsd"] = sum(totals[name].item() for name in pairs) / len(pairs) / count
    return result | {
        "top1_agreement": totals["agrees"].item() / count,
        "calibration_error": (totals["confidence"] - totals["correct"]).abs().sum().item() / count,
        "reference_loss": totals["ce"].item() / count,
        "num_targets": float(count),
    }


def measured_student(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reader: CacheReader,
    *,
    pairs: str | None = None,
    tail: str | None = None,
    allow_mismatch: str | None = None,
) -> tuple[Student, Matching]:
    """A loaded model held against a cache, to be measured; raises what `match_student` does."""
    matching = match_student(model, tokenizer, reader, pairs=pairs, tail=tail, allow_mismatch=allow_mismatch)
    check_lens(model, matching.lens)
    objective = Objective(task="fkl", lens_divergence="jsd", pairs=matching.pairs, lens_weight=1.0, kd_ratio=1.0)
    return Student(model, matching.lens, objective).eval(), matching


def score_against_cache(
    student: Student, matching: Matching, reader: CacheReader, *, limit: int | None = None
) -> dict[str, float]:
    """The ``averages`` of a `measured_student` over the cache that it is matched with."""
    with torch.no_grad():
        return averages(
            lambda batch: student(batch, measured_pairs=matching.pairs),
            reader,
            tails=matching.tails,
            device=student.model.device,
            limit=limit,
        )

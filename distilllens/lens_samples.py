"""The student's lens beside the teacher's in a few examples, as a small file that ``inspect report --run`` draws.

Dimension key: N rows, T tokens listed.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distilllens.collate import Batch, collate
from distilllens.divergence import sparse_divergence
from distilllens.lens import rows_at
from distilllens.matching import Matching
from distilllens.student import Pairs, Student
from distilllens.tails import Tail
from distilllens.text_file import write_text
from distilllens_cache import CachedExample, CacheReader
from distilllens_inspect.readings import read_layer, short
from distilllens_inspect.run_files import SAMPLES, SAMPLES_VERSION

NUM_EXAMPLES = 3
MAX_POSITIONS = 64
"""Target positions of an example, from its first on."""
TOP = 10
"""Tokens listed of a distribution."""


def read_student(student: Student, batch: Batch, *, pairs: Pairs) -> dict[str, Tensor]:
    """What the student says at the first target positions of one example, by ``name/s:t``.

    ``ids`` and ``probabilities`` of the likeliest tokens (N, T), ``next`` (N), the true next token's probability and
    ``rank`` (N, from 1), ``entropy`` (N, nats), and ``jsd`` (N, nats) to the teacher's targets with their tail.
    """
    hidden = student.lens.hidden_states(batch.input_ids, batch.attention_mask, sorted({own for own, _ in pairs}))
    next_ids = batch.next_ids[:MAX_POSITIONS, None]
    found: dict[str, Tensor] = {}
    for own, teacher in pairs:
        logits = student.lens.logits(rows_at(hidden[own], batch.is_target)[:MAX_POSITIONS], own)
        log_q = logits.log_softmax(-1)
        top = log_q.topk(min(TOP, log_q.shape[-1]), dim=-1)
        of_next = log_q.gather(-1, next_ids)
        values = {
            "ids": top.indices,
            "probabilities": top.values.exp(),
            "next": of_next[:, 0].exp(),
            "rank": 1 + (log_q > of_next).sum(-1),
            "entropy": torch.special.entr(log_q.exp()).sum(-1),
            "jsd": sparse_divergence("jsd", logits, batch.targets[teacher][:MAX_POSITIONS], batch.tails[teacher]),
        }
        found |= {f"{name}/{own}:{teacher}": value for name, value in values.items()}
    return found


def sample_lens(
    forward: Callable[..., dict[str, Tensor]],
    reader: CacheReader,
    *,
    pairs: Pairs,
    tails: dict[int, Tail],
    device: torch.device,
) -> list[dict[str, Any]]:
    """Student and teacher in the first examples of a cache that have targets, as JSON. Every rank calls it."""
    numbers = [number for number in range(len(reader)) if reader.num_targets[number]][:NUM_EXAMPLES]
    return [_sample(forward, reader[number], pairs, tails, device) for number in numbers]


def with_final(matching: Matching) -> Pairs:
    """The pairs of a matching and, last, the final layers."""
    return (*matching.pairs, (matching.lens.num_layers, matching.final_layer))


def write_lens_samples(folder: Path, samples: Sequence[dict[str, Any]], *, step: int | None, pairs: Pairs) -> None:
    """Write ``lens_samples.json`` whole or not at all."""
    content = {"format_version": SAMPLES_VERSION, "step": step, "pairs": [list(pair) for pair in pairs]}
    write_text(folder / SAMPLES, json.dumps(content | {"examples": list(samples)}) + "\n")


def _sample(
    forward: Callable[..., dict[str, Tensor]],
    example: CachedExample,
    pairs: Pairs,
    tails: dict[int, Tail],
    device: torch.device,
) -> dict[str, Any]:
    with torch.no_grad():
        batch = collate([example], tails).to(device)
        said = forward(batch, read=partial(read_student, pairs=pairs))
    values: dict[str, list[Any]] = {name: tensor.tolist() for name, tensor in said.items()}
    return {
        "index": example.index,
        "id": example.id,
        "token_ids": example.token_ids.tolist(),
        "positions": example.target_positions[:MAX_POSITIONS].tolist(),
        "num_targets": len(example.target_positions),
        "pairs": [
            {
                "jsd": [short(value) for value in values[f"jsd/{own}:{teacher}"]],
                "teacher": [one.entry(TOP) for one in read_layer(example, teacher)[:MAX_POSITIONS]],
                "student": _entries({name: values[f"{name}/{own}:{teacher}"] for name in NAMES}),
            }
            for own, teacher in pairs
        ],
    }


NAMES = ("ids", "probabilities", "next", "rank", "entropy")


def _entries(values: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The student's numbers in the form of ``Reading.entry``; it kept every token."""
    return [
        {
            "top": [[token, short(probability)] for token, probability in zip(ids, probabilities, strict=True)],
            "rest": short(max(0.0, 1.0 - sum(probabilities))),
            "entropy": round(max(0.0, entropy), 3),
            "next": short(of_next),
            "rank": rank,
        }
        for ids, probabilities, of_next, rank, entropy in zip(*(values[name] for name in NAMES), strict=True)
    ]

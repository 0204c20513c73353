"""A student held against a cache: same vocabulary, the wanted layers, which pairs, which tails."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilllens.layer_maps import check_pairs, derive_pairs, parse_pairs
from distilllens.lens import LogitLens, check_lens, num_layers
from distilllens.tails import BucketTail, ProfileTail, Tail
from distilllens.vocabulary import tokenizer_digest
from distilllens_cache import READER_FIELDS, CacheReader, tail_profile

ALIGNMENT = "alignment"
"""What ``--allow-mismatch`` calls the canary."""


@dataclass(frozen=True)
class Matching:
    """How one student reads one cache."""

    lens: LogitLens
    pairs: tuple[tuple[int, int], ...]
    tails: dict[int, Tail]
    final_layer: int
    tail: str
    mismatches: tuple[str, ...]
    """Mismatches of the cache's identity that the user allowed."""


def match_student(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reader: CacheReader,
    *,
    pairs: str | None = None,
    tail: str | None = None,
    allow_mismatch: str | None = None,
) -> Matching:
    """Check that ``model`` can be trained from or measured against a cache, and settle pairs and tails.

    Raises CacheError or ValueError naming the field: another tokenizer, a vocabulary larger than the student's
    head, a pair outside the model, a layer or a tail profile that the cache doesn't hold.
    """
    identity = reader.manifest.identity
    allowed = split_names(allow_mismatch)
    if unknown := sorted({*allowed} - {*READER_FIELDS, ALIGNMENT}):
        known = ", ".join((*READER_FIELDS, ALIGNMENT))
        raise ValueError(f"--allow-mismatch {unknown[0]} is not a field that is compared: expected some of {known}")
    fields = [name for name in allowed if name in READER_FIELDS]
    mismatches = reader.require(tokenizer_digest=tokenizer_digest(tokenizer), allow_mismatch=fields)
    lens = LogitLens(model, lens_norm=identity.lens_norm, vocab_size=identity.vocab_size)
    check_lens(model, lens)
    if pairs is not None:
        chosen = parse_pairs(pairs)
    else:
        chosen = derive_pairs(
            identity.layers, num_student_layers=num_layers(model), num_teacher_layers=identity.num_layers
        )
    check_pairs(
        chosen,
        num_student_layers=num_layers(model),
        num_teacher_layers=identity.num_layers,
        cached=identity.layers,
    )
    tail = tail or ("bucket" if identity.store_tail == "none" else "profile")
    final_layer = identity.layers[-1]
    tails = load_tails(reader, tail, sorted({final_layer, *(teacher for _, teacher in chosen)}))
    return Matching(lens, chosen, tails, final_layer, tail, tuple(mismatches))


def split_names(text: str | None) -> tuple[str, ...]:
    """The names in a comma separated list."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def load_tails(reader: CacheReader, name: str, layers: list[int]) -> dict[int, Tail]:
    """Tail ``name`` of each of ``layers``, as the cache holds it. ValueError where it doesn't."""
    if name == "bucket":
        return dict.fromkeys(layers, BucketTail())
    sums = reader.tail_sums()
    if missing := [layer for layer in layers if layer not in sums]:
        raise ValueError(
            f"--tail profile needs the cache's tail profile, and it has none for layer {missing[0]} "
            f"(cached with --store-tail {reader.manifest.identity.store_tail}): use --tail bucket, or cache again"
        )
    return {layer: ProfileTail(torch.from_numpy(tail_profile(sums[layer])).log().float()) for layer in layers}

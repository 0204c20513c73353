"""A student held against a cache: same vocabulary, the wanted layers, which pairs, which tails."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilllens.by_layer import TailChoice, parse_tail_choices
from distilllens.layer_maps import Pairs, check_pairs, derive_pairs, equal_shares, parse_pairs, parse_shares
from distilllens.lens import LogitLens, num_layers
from distilllens.tails import BucketTail, ProfileTail, RenormTail, SampledTail, SketchTail, Tail
from distilllens.vocabulary import effective_vocab_size, tokenizer_digest
from distilllens_cache import READER_FIELDS, CacheError, CacheReader, Identity, TailSpec, tail_profile

ALIGNMENT = "alignment"
"""What ``--allow-mismatch`` calls the canary."""
NEED_A_SKETCH = ("rkl", "fkl+rkl", "jeffreys", "akl")
"""Divergences with reverse KL in them, whose gradient a profile bends."""
TEMPERATURE = 1.0
"""At which a student's distribution is read."""
ROW_TAILS = ("sketch", "sampled")
"""Tails that read something stored for each target."""


@dataclass(frozen=True)
class Matching:
    """How one student reads one cache."""

    lens: LogitLens
    pairs: Pairs
    shares: tuple[float, ...]
    """Of each pair in the lens loss; they sum to 1."""
    tails: dict[int, Tail]
    final_layer: int
    tail: str
    """The tails as one text, such as ``final=sketch:64,lens=profile``."""
    mismatches: tuple[str, ...]
    """Mismatches of the cache's identity that the user allowed."""


def match_student(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reader: CacheReader,
    *,
    pairs: str | None = None,
    tail: str | None = None,
    task: str = "fkl",
    lens_divergence: str = "jsd",
    reads_teacher: bool = True,
    allow_mismatch: str | None = None,
) -> Matching:
    """Check that ``model`` can be trained from or measured against a cache, and settle pairs and tails.

    The model is not called: `check_lens` is for where it computes. Without ``reads_teacher`` only the text is read, and
    the teacher's temperature doesn't matter.

    Raises CacheError or ValueError naming the field: another tokenizer, vocabulary or temperature, a pair outside the
    model, a layer or a tail profile that the cache doesn't hold.
    """
    identity = reader.manifest.identity
    allowed = split_names(allow_mismatch)
    if unknown := sorted({*allowed} - {*READER_FIELDS, ALIGNMENT}):
        known = ", ".join((*READER_FIELDS, ALIGNMENT))
        raise ValueError(f"--allow-mismatch {unknown[0]} is not a field that is compared: expected some of {known}")
    fields = [name for name in allowed if name in READER_FIELDS]
    digest = tokenizer_digest(tokenizer)
    if digest != identity.tokenizer_digest and "tokenizer_digest" not in fields:
        raise CacheError(
            f"{reader.folder} has token ids of another tokenizer than the model's (tokenizer_digest "
            f"{identity.tokenizer_digest[:12]}... and {digest[:12]}...): take a model with the teacher's tokenizer, or "
            f"accept and record the difference with --allow-mismatch tokenizer_digest"
        )
    mismatches = reader.require(
        tokenizer_digest=digest,
        vocab_size=effective_vocab_size(model, tokenizer),
        temperature=TEMPERATURE if reads_teacher else None,
        allow_mismatch=fields,
    )
    lens = LogitLens(model, lens_norm=identity.lens_norm, vocab_size=identity.vocab_size)
    if pairs is not None:
        chosen, shares = parse_pairs(pairs), parse_shares(pairs)
    else:
        chosen = derive_pairs(
            identity.layers, num_student_layers=num_layers(model), num_teacher_layers=identity.num_layers
        )
        shares = equal_shares(len(chosen))
    check_pairs(
        chosen,
        num_student_layers=num_layers(model),
        num_teacher_layers=identity.num_layers,
        cached=identity.layers,
    )
    final_layer = identity.layers[-1]
    layers = sorted({final_layer, *(teacher for _, teacher in chosen)})
    choices = choose_tails(identity, tail, layers, task=task, lens_divergence=lens_divergence)
    reader.tail_rows = any(choice.name in ROW_TAILS for choice in choices.values())
    tails = load_tails(reader, choices)
    return Matching(lens, chosen, shares, tails, final_layer, _text(choices), tuple(mismatches))


def split_names(text: str | None) -> tuple[str, ...]:
    """The names in a comma separated list."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def choose_tails(
    identity: Identity, text: str | None, layers: list[int], *, task: str = "fkl", lens_divergence: str = "jsd"
) -> dict[int, TailChoice]:
    """What stands for the rest at each of ``layers``: what ``text`` asks for, else the best stored for the divergence.

    ValueError where the cache doesn't store what is asked for.
    """
    final, lens = (None, None) if text is None else parse_tail_choices(text)
    chosen = {}
    for layer in layers:
        stored, is_final = identity.tail_specs[layer], layer == identity.layers[-1]
        best = _best(stored, task if is_final else lens_divergence)
        choice = (final if is_final else lens) or best
        has = {
            "profile": stored.profile,
            "sketch": stored.sketch is not None and (choice.rank or 1) <= stored.sketch.rank,
            "sampled": stored.draws is not None,
        }
        if not has.get(choice.name, True):
            raise ValueError(
                f"--tail {choice} needs a cache that stores it, and at layer {layer} this one stores {stored}: choose "
                f"--tail {best}, or cache again with another --store-tail"
            )
        chosen[layer] = choice
    return chosen


def _best(stored: TailSpec, divergence: str) -> TailChoice:
    """What carries the dense gradient best: a sketch where reverse KL weighs the student's own tail."""
    if stored.sketch is not None and (divergence.partition(":")[0] in NEED_A_SKETCH or not stored.profile):
        return TailChoice("sketch")
    if stored.profile:
        return TailChoice("profile")
    return TailChoice("bucket" if stored.draws is None else "sampled")


def load_tails(reader: CacheReader, choices: dict[int, TailChoice]) -> dict[int, Tail]:
    """The tail chosen for each layer, as the cache holds it."""
    names = {choice.name for choice in choices.values()}
    sums = reader.tail_sums() if "profile" in names else {}
    sketches = reader.sketches() if "sketch" in names else {}

    def tail(layer: int, choice: TailChoice) -> Tail:
        match choice.name:
            case "profile":
                return ProfileTail(torch.from_numpy(tail_profile(sums[layer])).log().float())
            case "sketch":
                sketch = sketches[layer]
                basis = torch.from_numpy(sketch.basis[:, : choice.rank].astype(np.float32))
                return SketchTail(basis, torch.from_numpy(sketch.offset.copy()), sketch.softcap)
            case "sampled":
                return SampledTail()
            case "renorm":
                return RenormTail()
            case _:
                return BucketTail()

    return {layer: tail(layer, choice) for layer, choice in choices.items()}


def _text(choices: dict[int, TailChoice]) -> str:
    final, lens = choices[max(choices)], {str(choice) for layer, choice in choices.items() if layer != max(choices)}
    return str(final) if lens <= {str(final)} else f"final={final},lens={'/'.join(sorted(lens))}"

"""The two ways a cache is read: the trainer's, and `verify`. What a damaged one must come to."""

import hashlib
from pathlib import Path

import numpy as np

from distilllens_cache import CachedExample, CacheError, CacheReader, Identity, layout, verify_cache
from faultlab.outcome import Outcome


def digest_of(folder: Path) -> str:
    """SHA-256 of everything that training takes from a cache, read the way that training does."""
    reader = CacheReader(folder)
    digest = hashlib.sha256(repr((reader.ids, len(reader))).encode())
    for record in reader.manifest.tokenizer_files:
        digest.update((reader.tokenizer_folder.parent / record.name).read_bytes())
    for layer, sums in reader.tail_sums().items():
        digest.update(b"%d" % layer + sums.tobytes())
    for layer, sketch in reader.sketches().items():
        digest.update(repr((layer, sketch.softcap)).encode() + sketch.basis.tobytes() + sketch.offset.tobytes())
    for place in range(len(reader)):
        _add_example(digest, reader[place])
    return digest.hexdigest()


def _add_example(digest, example: CachedExample) -> None:
    digest.update(example.token_ids.tobytes() + example.target_positions.tobytes())
    for targets in example.targets.values():
        arrays = [targets.counts, targets.ids, targets.log_probs, targets.log_rest]
        if targets.codes is not None:
            arrays.append(targets.codes)
        if targets.samples is not None:
            samples = targets.samples
            arrays += [samples.counts, samples.ids, samples.draws, samples.log_probs]
        for array in arrays:
            digest.update(repr(array.shape).encode() + array.tobytes())


def is_for_training(name: str) -> bool:
    """Whether a reader that trains opens the file called ``name``; the rest is for writers and `verify`."""
    if name == layout.PLAN or name.endswith((".tails.arrow", ".projection.arrow")):
        return False
    return not (name.startswith((f"{layout.SHARDS}/", f"{layout.SKETCHES}/")) and name.endswith(".json"))


def judge(folder: Path, damaged: list[str], sound: str) -> Outcome:
    """A cache with some damaged files must be refused by both readers, each naming a file that is.

    ``sound`` is what `digest_of` gives for the undamaged one. Where training reads none of the damaged
    files it must get exactly that.
    """
    for_training = [name for name in damaged if is_for_training(name)]
    try:
        found = digest_of(folder)
    except CacheError as error:
        if not any(name in str(error) for name in for_training):
            return Outcome("not named", f"{damaged} damaged, the reader says: {error}")
    else:
        if for_training or found != sound:
            return Outcome("silent", f"{damaged} damaged, the reader did not notice")
    named = {problem.file for problem in verify_cache(folder).problems}
    if missed := [name for name in damaged if name not in named]:
        return Outcome("silent" if not named else "not named", f"{missed} damaged, verify names {sorted(named)}")
    return Outcome("refused")


def judge_hostile(folder: Path, sound: str) -> Outcome:
    """A cache whose digests were made to fit must be refused with a `CacheError`, or hold targets that are possible.

    Both readers must agree as far as they read the same.
    """
    problems = verify_cache(folder).problems
    try:
        found = digest_of(folder)
    except CacheError as error:
        if not problems:
            return Outcome("disagree", f"verify finds it sound, the reader says: {error}")
        return Outcome("refused")
    if found == sound:
        return Outcome("refused by verify" if problems else "accepted, the same targets")
    reader = CacheReader(folder)
    if what := next(filter(None, (nonsense(example, reader.manifest.identity) for example in reader)), ""):
        return Outcome("nonsense", what)
    return Outcome("refused by verify" if problems else "accepted, possible targets")


def nonsense(example: CachedExample, identity: Identity) -> str:
    """What is impossible about an example; empty if nothing is. Shares no code with the reader."""
    tokens, positions = example.token_ids.tolist(), example.target_positions.tolist()
    if any(token >= identity.vocab_size for token in tokens):
        return "a token outside the vocabulary"
    if positions != sorted(set(positions)) or (positions and positions[-1] > len(tokens) - 2):
        return f"positions {positions} of {len(tokens)} tokens"
    for layer, targets in example.targets.items():
        if len(targets.counts) != len(positions) or len(targets.log_rest) != len(positions):
            return f"layer {layer}: {len(targets.counts)} rows for {len(positions)} positions"
        at = 0
        for count, log_rest in zip(targets.counts.tolist(), targets.log_rest.tolist(), strict=True):
            ids = targets.ids[at : at + count].tolist()
            log_probs = targets.log_probs[at : at + count].astype(np.float64)
            at += count
            if not 1 <= count <= identity.top_k[layer] or len(ids) != count or len(set(ids)) != count:
                return f"layer {layer}: {count} ids {ids}"
            if max(ids) >= identity.vocab_size:
                return f"layer {layer}: id {max(ids)}"
            mass = float(np.exp(log_probs).sum() + np.exp(log_rest))
            if not np.isfinite([*log_probs, log_rest]).all() or (log_probs > 0).any() or not 0.98 < mass < 1.02:
                return f"layer {layer}: log-probabilities {log_probs.tolist()} and {log_rest}"
        if at != len(targets.ids) or at != len(targets.log_probs):
            return f"layer {layer}: {at} ids counted, {len(targets.ids)} stored"
    return ""

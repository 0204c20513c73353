"""Tail sums: the probability of each token where it was not kept, summed in fixed point over targets."""

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from distilllens_cache.arrow_file import from_arrow, to_arrow
from distilllens_cache.errors import CacheError
from distilllens_cache.manifest import Identity

FIXED_POINT = 2**32
"""A probability of 1 in a tail sum. Whole numbers add up to the same bytes in any order."""


def tail_profile(sums: ArrayLike, uniform: float = 1e-3) -> NDArray[np.float64]:
    """(V,) what stands for a layer's rest: the mean tail, with ``uniform`` of it spread evenly.

    Sums to 1 and is nowhere 0. Without any tail it is uniform.
    """
    mass = np.asarray(sums, dtype=np.float64)
    total = mass.sum()
    if mass.ndim != 1 or not mass.size or (mass < 0).any() or not 0 < uniform <= 1:
        raise ValueError("tail sums are one list of numbers that are not negative, and 0 < uniform <= 1")
    even = np.full(mass.shape, 1 / mass.size)
    profile = even if total == 0 else (1 - uniform) * (mass / total) + uniform * even
    return profile / profile.sum()


def encode_tails(tails: dict[int, NDArray[np.int64]], identity: Identity, *, num_targets: int, name: str) -> memoryview:
    """The file of some tail sums, after their meaning was checked."""
    check_tails(tails, identity, num_targets=num_targets, name=name)
    columns = [pa.array(np.ascontiguousarray(tails[layer]), pa.int64()) for layer in identity.profile_layers]
    return to_arrow(pa.RecordBatch.from_arrays(columns, schema=_schema(identity)))


def decode_tails(data: bytes, identity: Identity, *, num_targets: int, name: str) -> dict[int, NDArray[np.int64]]:
    """Tail sums by layer, (V,) each and read-only, from a file that has the digest of its record."""
    batch = from_arrow(
        data,
        _schema(identity),
        num_rows=identity.vocab_size,
        name=name,
        max_bytes=len(identity.profile_layers) * (8 * identity.vocab_size + 256),
    )
    tails = {layer: batch.column(number).to_numpy() for number, layer in enumerate(identity.profile_layers)}
    check_tails(tails, identity, num_targets=num_targets, name=name)
    return tails


def check_tails(tails: dict[int, NDArray[np.int64]], identity: Identity, *, num_targets: int, name: str) -> None:
    """Refuse tail sums of other layers or sizes, and sums that so many targets cannot have."""
    layers = list(identity.profile_layers)
    if sorted(tails) != layers:
        raise CacheError(f"{name} has tail sums of the layers {sorted(tails)}; expected are {layers}.")
    most = num_targets * (FIXED_POINT + identity.vocab_size)
    for layer, sums in tails.items():
        if sums.shape != (identity.vocab_size,) or sums.dtype != np.int64:
            raise CacheError(
                f"{name}, layer {layer}: the tail sums are {sums.dtype} {sums.shape}; "
                f"expected is int64 ({identity.vocab_size},)."
            )
        if int(sums.min()) < 0 or int(sums.max()) > most or sums.sum(dtype=np.float64) > most * (1 + 1e-9):
            raise CacheError(f"{name}, layer {layer}: {num_targets} targets cannot have these tail sums.")


def add_tails(total: dict[int, NDArray[np.int64]], part: dict[int, NDArray[np.int64]], *, name: str) -> None:
    """Add ``part`` to ``total`` in place."""
    for layer, sums in part.items():
        if layer not in total:
            total[layer] = np.zeros_like(sums)
        if int(total[layer].max()) > np.iinfo(np.int64).max - int(sums.max()):
            raise CacheError(f"{name}, layer {layer}: the tail sums of all shards together do not fit 64 bits.")
        total[layer] += sums


def _schema(identity: Identity) -> pa.Schema:
    return pa.schema([pa.field(f"layer_{layer}", pa.int64(), nullable=False) for layer in identity.profile_layers])

"""How good the shuffle of a run is: by shards and windows, against a full shuffle of every epoch.

    python scripts/bench/shuffle.py --num-shards 256 --examples-per-shard 256 --batch-size 32

Four measures, each the mean over some epochs:

- displacement: how far an example moves from its place in the plan, as a share of the epoch. 1/3 for a full shuffle.
- neighbours: the share of examples after which the next one comes from the same shard.
- meeting again: how likely two examples of one batch are to share a batch in the next epoch.
- spread of a batch: the variance of the mean over a batch, against a full shuffle's, of a property that is the same
  for all examples of a shard (the worst case: rows sorted by topic), and of one that has nothing to do with shards.
"""

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from distilllens_cache import Order

Epoch = Callable[[int], NDArray[np.int64]]


def measure(epoch: Epoch, shard_of: NDArray[np.int64], *, batch_size: int, epochs: int) -> dict[str, float]:
    """The measures of one way to shuffle; variances are absolute."""
    size, random = len(shard_of), np.random.default_rng(0)
    by_shard = random.normal(size=int(shard_of[-1]) + 1)[shard_of]
    by_example = random.normal(size=size)
    found: dict[str, list[float]] = {}
    for number in range(epochs):
        order, following = epoch(number), epoch(number + 1)
        batch_in_next = np.empty(size, np.int64)
        batch_in_next[following] = np.arange(size) // batch_size
        batches = order[: size - size % batch_size].reshape(-1, batch_size)
        together = np.sort(batch_in_next[batches], axis=1)
        pairs = batch_size * (batch_size - 1) / 2
        # Runs of equal numbers in a sorted row are examples that meet again; a run of n has n (n - 1) / 2 pairs.
        met = sum((together[:, lag:] == together[:, :-lag]).sum() for lag in range(1, batch_size))
        for name, value in {
            "displacement": np.abs(order - np.arange(size)).mean() / size,
            "neighbours": (np.diff(shard_of[order]) == 0).mean(),
            "meeting again": met / (pairs * len(batches)),
            "spread, sorted by shard": by_shard[batches].mean(1).var(),
            "spread, unrelated": by_example[batches].mean(1).var(),
        }.items():
            found.setdefault(name, []).append(float(value))
    return {name: float(np.mean(values)) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-shards", type=int, default=256)
    parser.add_argument("--examples-per-shard", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shard_of = np.repeat(np.arange(arguments.num_shards), arguments.examples_per_shard)
    order = Order(shard_of, seed=arguments.seed)
    ways: dict[str, Epoch] = {
        "this order": lambda number: order.epoch(number).indices,
        "full shuffle": lambda number: np.random.default_rng((arguments.seed, number)).permutation(len(shard_of)),
        "shards only": lambda number: np.concatenate(
            [np.flatnonzero(shard_of == s) for s in np.random.default_rng(number).permutation(arguments.num_shards)]
        ),
    }
    settings = {"batch_size": arguments.batch_size, "epochs": arguments.epochs}
    results = {way: measure(epoch, shard_of, **settings) for way, epoch in ways.items()}
    print(f"{len(shard_of)} examples in {arguments.num_shards} shards, batches of {arguments.batch_size}")
    print(f"{'':<26}" + "".join(f"{way:>14}" for way in ways))
    for name in results["this order"]:
        # Variances as multiples of the full shuffle's.
        unit = results["full shuffle"][name] if name.startswith("spread") else 1.0
        print(f"{name:<26}" + "".join(f"{results[way][name] / unit:>14.4g}" for way in ways))


if __name__ == "__main__":
    main()

"""Which examples share a shard, and which rank writes which shards."""

from collections.abc import Sequence

from distilllens_cache.targets import PlannedExample


def plan_shards(
    examples: Sequence[PlannedExample],
    *,
    examples_per_shard: int,
    bytes_per_target: float,
    max_shard_bytes: int = 64 << 20,
) -> list[range]:
    """Consecutive ranges of at most ``examples_per_shard`` examples and about ``max_shard_bytes`` each.

    ``bytes_per_target`` is what one target position costs at all layers together. It must follow from the
    config alone, or a resumed run would plan other shards. An example larger than a shard gets one of its
    own.
    """
    if examples_per_shard < 1 or bytes_per_target < 0 or max_shard_bytes < 1:
        raise ValueError("examples_per_shard and max_shard_bytes must be at least 1, bytes_per_target at least 0")
    shards: list[range] = []
    first, size = 0, 0.0
    for place, example in enumerate(examples):
        more = 4 * example.num_tokens + bytes_per_target * example.num_targets
        if place > first and (place - first == examples_per_shard or size + more > max_shard_bytes):
            shards.append(range(first, place))
            first, size = place, 0.0
        size += more
    if examples:
        shards.append(range(first, len(examples)))
    return shards


def share_shards(num_tokens: dict[int, int], world_size: int) -> list[list[int]]:
    """The shards of each rank, ascending: a partition of ``num_tokens``, tokens by number of the shard.

    The longest shard goes to the rank with the fewest tokens so far, and so on: no rank has more than another by
    more tokens than its smallest shard holds.
    """
    loads, shares = [0] * world_size, [[] for _ in range(world_size)]
    for number in sorted(num_tokens, key=lambda number: (-num_tokens[number], number)):
        rank = loads.index(min(loads))
        loads[rank] += num_tokens[number]
        shares[rank].append(number)
    return [sorted(share) for share in shares]

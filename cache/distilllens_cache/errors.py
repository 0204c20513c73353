"""The one exception of the cache."""

REPAIR = "Copy the cache again, or repair it: `distilllens cache-teacher --repair` with the same config."
"""What to do about a damaged file."""


class CacheError(ValueError):
    """A cache that cannot be used or written: what was found, what was expected, and what to do."""

"""The one exception of the cache."""

REPAIR = "Copy the cache again, or run `distilllens cache-teacher` again with the same config to repair it."
"""What to do about a damaged file."""


class CacheError(ValueError):
    """A cache that cannot be used or written: what was found, what was expected, and what to do."""

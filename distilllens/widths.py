"""How many tokens of a distribution are kept: a fixed number, or as many as matter."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Width:
    """The likeliest ``max_k`` tokens, or fewer: at least ``min_k``, and beyond those only what both limits let in."""

    max_k: int
    min_k: int = 1
    min_prob: float = 0.0
    """A token less likely than this is left to the rest."""
    top_p: float = 1.0
    """Tokens after those that together have this probability are left to the rest."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_k <= self.max_k:
            raise ValueError(f"min-k is {self.min_k}: expected 1 to max-k, {self.max_k}")
        if not 0 <= self.min_prob < 1 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"min-prob is {self.min_prob:g} and top-p is {self.top_p:g}: expected 0 <= min-prob < 1, 0 < top-p <= 1"
            )

    @property
    def is_fixed(self) -> bool:
        """Whether every row keeps the same number."""
        return self.min_k == self.max_k or (self.min_prob == 0 and self.top_p == 1)

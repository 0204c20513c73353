"""How narrow a pruned student becomes: the settings of a config that width pruning reads."""

from distilllens.run_config import PositiveInt, RunConfig


class WidthConfig(RunConfig):
    """Sizes of a pruned model; those that are not given stay."""

    hidden_size: PositiveInt | None = None
    """Hidden channels to keep, those of the largest weights in what writes and reads them."""
    num_attention_heads: PositiveInt | None = None
    """Attention heads of each layer to keep, those of the largest values and outputs; heads keep their size."""
    num_key_value_heads: PositiveInt | None = None
    """Groups of key and value heads of each layer to keep."""
    intermediate_size: PositiveInt | None = None
    """MLP columns of each layer to keep, those of the largest weights."""

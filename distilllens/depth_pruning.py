"""A model with some of another model's blocks: which ones, and the same weights in a shallower model."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

_NOT_PER_LAYER = ("architectures", "keys_to_ignore_at_inference")


def spread_layers(num_kept: int, num_layers: int) -> tuple[int, ...]:
    """``num_kept`` of the layers 1..``num_layers``, evenly spread, the first and the last among them.

    Layer i of n is round(1 + (i - 1) (N - 1) / (n - 1)), halves upwards: 10 of 30 are 1, 4, 7, 11, 14, 17,
    20, 24, 27, 30. One layer is the first, which reads the embeddings.
    """
    if not 1 <= num_kept <= num_layers:
        raise ValueError(
            f"--layers {num_kept}: the model has {num_layers} layers; give a number from 1 to {num_layers}"
        )
    if num_kept == 1:
        return (1,)
    steps = num_kept - 1
    return tuple(1 + (2 * i * (num_layers - 1) + steps) // (2 * steps) for i in range(num_kept))


def check_kept(keep: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """``keep`` as it is, or ValueError: empty, not ascending, or a layer that the model doesn't have."""
    kept = tuple(keep)
    listed = ",".join(map(str, kept))
    if not kept:
        raise ValueError("--keep names no layer: give layers counted from 1, such as 1,4,7")
    if absent := [layer for layer in kept if not 1 <= layer <= num_layers]:
        raise ValueError(
            f"--keep {listed}: there is no layer {absent[0]}; layers are counted from 1 to {num_layers}, the "
            "model's last"
        )
    if any(left >= right for left, right in pairwise(kept)):
        raise ValueError(f"--keep {listed}: give each layer once and in ascending order")
    return kept


def prune_depth(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A new model of the layers ``kept`` (1-based) of ``model``, renumbered; all else of it stays.

    A shallower model is built from the config and filled by name, so whatever a block derives from its number
    (its place in the KV cache, its kind of attention) is right by construction. Raises ValueError where that
    can't be done: no list of blocks, or blocks whose kind follows from their number alone.
    """
    config = prune_config(model.config, kept)
    path = blocks_path(model)
    number = {str(layer - 1): str(index) for index, layer in enumerate(kept)}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in cast(nn.Module, model).state_dict().items():
        if not name.startswith(f"{path}."):
            state[name] = tensor
            continue
        old, _, rest = name.removeprefix(f"{path}.").partition(".")
        if old in number:
            state[f"{path}.{number[old]}.{rest}"] = tensor
    with torch.random.fork_rng(devices=[]):  # the fresh weights are all overwritten; nobody's random state moves
        pruned = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=model.dtype))
    try:
        cast(nn.Module, pruned).load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"{type(model).__name__} can't be pruned to layers {','.join(map(str, kept))}: its blocks differ "
            f"by their number ({' '.join(str(error).split())[:200]}); keep another set of layers"
        ) from None
    pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned.eval()


def prune_config(config: PreTrainedConfig, kept: Sequence[int]) -> PreTrainedConfig:
    """``config`` for the layers ``kept``; lists with one entry per layer (`layer_types`) are cut as well."""
    num_layers = config.num_hidden_layers
    settings = config.to_dict()
    for name, value in settings.items():
        if isinstance(value, list | tuple) and len(value) == num_layers and _is_per_layer(name):
            settings[name] = [value[layer - 1] for layer in kept]
    settings[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    return type(config).from_dict(settings)


def _is_per_layer(name: str) -> bool:
    return name not in _NOT_PER_LAYER and "token_id" not in name


def blocks_path(model: PreTrainedModel) -> str:
    """Name of the module that lists the model's blocks, such as ``model.layers``."""
    num_layers = model.config.num_hidden_layers
    modules = cast(Any, model).named_modules()
    lists = [name for name, part in modules if isinstance(part, nn.ModuleList) and len(part) == num_layers]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outermost) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(outermost)} lists of {num_layers} blocks, expected one: depth "
            "pruning works for decoders with one stack of blocks"
        )
    return outermost[0]

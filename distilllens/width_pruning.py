"""A model with some of another model's attention heads, MLP columns and hidden channels, at the same weights.

What is kept follows from the weights alone, so no data is read. ``|.|`` is the Frobenius norm, ``g`` the gain of the
norm before a matrix that reads the hidden state; biases don't count.

- A query head weighs |O V g|: O are its columns of the output projection, V its group's values. A group of key and
  value heads weighs the sum of squares of the query heads that it would keep.
- An MLP column weighs the product of the norms of its rows in what reads (gate and up), times g, and of its column in
  what writes (down).
- A hidden channel, the same one in all layers, weighs the product of two sums over matrices: of its share in the
  squares of what writes to it, and of its share in the squares of what reads it, times g.

What is kept stays in its order, and heads keep their size. Sources: the scores of Minitron (Muralidharan et al. 2024,
arXiv 2407.14679) with norms of weights in place of those of activations; LLM-Pruner (Ma et al. 2023).

Dimension key: D hidden size, M MLP columns, H query heads, G key and value heads, S head size.
"""

import copy
import re
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

State = dict[str, Tensor]


@dataclass(frozen=True)
class Width:
    """Sizes of a model across its blocks; of a request, None is what stays."""

    hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None

    def __bool__(self) -> bool:
        return any(size is not None for size in vars(self).values())


@dataclass(frozen=True)
class _Layout:
    """Where the parts of a block are in a kind of model, by the end of a weight's name."""

    axes: dict[str, tuple[str | None, ...]]
    """Meaning of each axis of a weight: writes, reads or hidden (D), mlp (M), heads (H S), groups (G S), qkv (3 H S);
    None for an axis that stays."""
    norm_before: dict[str, str]
    """For each matrix that reads the hidden state, the gain before it."""
    mlp_size: str
    """Name of M in the config."""

    def axes_of(self, name: str) -> tuple[str | None, ...]:
        """What the axes of the weight ``name`` mean."""
        return next(axes for end, axes in self.axes.items() if f".{name}".endswith(f".{end}"))


def _llama() -> _Layout:
    axes: dict[str, tuple[str | None, ...]] = {
        "embed_tokens.weight": (None, "writes"),
        "lm_head.weight": (None, "reads"),
        "norm.weight": ("hidden",),
        "input_layernorm.weight": ("hidden",),
        "post_attention_layernorm.weight": ("hidden",),
        "q_norm.weight": (None,),
        "k_norm.weight": (None,),
    }
    for part, out, into in (
        ("self_attn.q_proj", "heads", "reads"), ("self_attn.k_proj", "groups", "reads"),
        ("self_attn.v_proj", "groups", "reads"), ("self_attn.o_proj", "writes", "heads"),
        ("mlp.gate_proj", "mlp", "reads"), ("mlp.up_proj", "mlp", "reads"), ("mlp.down_proj", "writes", "mlp"),
    ):  # fmt: skip
        axes |= {f"{part}.weight": (out, into), f"{part}.bias": ("hidden" if out == "writes" else out,)}
    norms = {f"self_attn.{part}_proj.weight": "input_layernorm.weight" for part in "qkv"}
    norms |= {f"mlp.{part}_proj.weight": "post_attention_layernorm.weight" for part in ("gate", "up")}
    return _Layout(axes, norms | {"lm_head.weight": "model.norm.weight"}, "intermediate_size")


def _gpt2() -> _Layout:
    axes: dict[str, tuple[str | None, ...]] = {
        "wte.weight": (None, "writes"),
        "wpe.weight": (None, "writes"),
        "lm_head.weight": (None, "reads"),
    }
    axes |= {f"{norm}.{part}": ("hidden",) for norm in ("ln_1", "ln_2", "ln_f") for part in ("weight", "bias")}
    for part, into, out in (
        ("attn.c_attn", "reads", "qkv"), ("attn.c_proj", "heads", "writes"),
        ("mlp.c_fc", "reads", "mlp"), ("mlp.c_proj", "mlp", "writes"),
    ):  # fmt: skip
        axes |= {f"{part}.weight": (into, out), f"{part}.bias": ("hidden" if out == "writes" else out,)}
    norms = {
        "attn.c_attn.weight": "ln_1.weight",
        "mlp.c_fc.weight": "ln_2.weight",
        "lm_head.weight": "transformer.ln_f.weight",
    }
    return _Layout(axes, norms, "n_inner")


LAYOUTS = {**dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _llama()), "gpt2": _gpt2()}
"""Kinds of models that can be pruned in width, by the ``model_type`` of their config."""
_BLOCK = re.compile(r"^(.*\.(?:layers|h)\.\d+)\.")


def width_of(config: PreTrainedConfig) -> Width:
    """The sizes of a model of ``config``. ValueError where its kind cannot be pruned in width."""
    if config.model_type not in LAYOUTS:
        raise ValueError(
            f"a model of type {config.model_type} can't be pruned in width, only {', '.join(LAYOUTS)}: prune its depth "
            "with --layers or --keep"
        )
    heads, layout = int(config.num_attention_heads), LAYOUTS[config.model_type]
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    return Width(int(config.hidden_size), heads, groups, getattr(config, layout.mlp_size) or 4 * config.hidden_size)


def check_width(asked: Width, config: PreTrainedConfig) -> Width:
    """All sizes of the model that ``asked`` makes of one of ``config``. ValueError for sizes that it cannot have."""
    own = width_of(config)
    for name, size in vars(asked).items():
        largest = getattr(own, name)
        if size is not None and not 1 <= size <= largest:
            raise ValueError(f"--{name.replace('_', '-')} {size}: the model has {largest}; give a number from 1 to it")
    assert own.num_attention_heads is not None
    assert own.num_key_value_heads is not None
    in_group = own.num_attention_heads // own.num_key_value_heads
    heads, groups = asked.num_attention_heads, asked.num_key_value_heads
    if groups is None:
        groups = heads if in_group == 1 and heads is not None else own.num_key_value_heads
    if heads is None:
        heads = groups * in_group
    if heads % groups or heads // groups > in_group:
        raise ValueError(
            f"{heads} attention heads cannot share {groups} key and value heads: the model has {in_group} to each; "
            f"give --num-attention-heads and --num-key-value-heads with a whole ratio of at most {in_group}"
        )
    hidden = asked.hidden_size or own.hidden_size
    if config.model_type == "gpt2" and hidden != heads * _head_size(config):
        raise ValueError(
            f"--hidden-size {hidden} and --num-attention-heads {heads}: heads of this kind of model have size hidden "
            f"size / heads, and keep their size {_head_size(config)}; give --hidden-size "
            f"{heads * _head_size(config)} with {heads} heads"
        )
    assert hidden is not None
    if hidden % heads:
        raise ValueError(
            f"a hidden size of {hidden} is no multiple of {heads} attention heads, which transformers asks for: choose "
            "--hidden-size or --num-attention-heads accordingly"
        )
    return Width(hidden, heads, groups, asked.intermediate_size or own.intermediate_size)


def prune_width(model: PreTrainedModel, asked: Width) -> PreTrainedModel:
    """A new model with the heads, columns and channels of ``model`` that weigh most. ValueError as `check_width`."""
    width, layout = check_width(asked, model.config), LAYOUTS[model.config.model_type]
    state, size = cast(nn.Module, model).state_dict(), _head_size(model.config)
    hidden = _top(_channel_weights(state, layout), width.hidden_size)
    by_block: dict[str, dict[str, Tensor]] = {}
    pruned_state: State = {}
    for name, tensor in state.items():
        kept = {"writes": hidden, "reads": hidden, "hidden": hidden}
        if found := _BLOCK.match(name):
            block = found[1]
            if block not in by_block:
                by_block[block] = _kept_of_block(_Block(state, layout, block, size), width)
            kept |= by_block[block]
        for axis, meaning in enumerate(layout.axes_of(name)):
            if meaning is not None:
                tensor = tensor.index_select(axis, kept[meaning].to(tensor.device))
        pruned_state[name] = tensor
    config = _narrow_config(model.config, width, layout)
    with torch.random.fork_rng(devices=[]):  # the fresh weights are all overwritten; nobody's random state moves
        pruned = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=model.dtype))
    cast(nn.Module, pruned).load_state_dict(pruned_state, strict=True)
    pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned.eval()


class _Block:
    """A block's matrices in float32, one orientation for all kinds of models."""

    def __init__(self, state: State, layout: _Layout, block: str, head_size: int) -> None:
        self.head_size = head_size

        def matrix(end: str, *, first: str) -> Tensor:
            """A matrix with the axis that means ``first`` in front."""
            weight = _as_read(state, layout, f"{block}.{end}")
            return weight if layout.axes[end][0] == first else weight.T

        if "attn.c_attn.weight" in layout.axes:
            self.values = matrix("attn.c_attn.weight", first="qkv").chunk(3)[2]
            self.output = matrix("attn.c_proj.weight", first="heads")
            self.mlp_reads = [matrix("mlp.c_fc.weight", first="mlp")]
            self.mlp_writes = matrix("mlp.c_proj.weight", first="mlp")
        else:
            self.values = matrix("self_attn.v_proj.weight", first="groups")
            self.output = matrix("self_attn.o_proj.weight", first="heads")
            self.mlp_reads = [matrix(f"mlp.{part}_proj.weight", first="mlp") for part in ("gate", "up")]
            self.mlp_writes = matrix("mlp.down_proj.weight", first="mlp")

    def head_weights(self) -> Tensor:
        """|O V g| squared of each query head, by group: (G, H / G)."""
        values_GSD = self.values.unflatten(0, (-1, self.head_size))
        output_GHSD = self.output.unflatten(0, (len(values_GSD), -1, self.head_size))
        # |O V|^2 = tr(O^T O V V^T), of which both are S x S.
        read_GSS = values_GSD @ values_GSD.mT
        written_GHSS = output_GHSD @ output_GHSD.mT
        return (written_GHSS * read_GSS[:, None]).sum((-1, -2))

    def column_weights(self) -> Tensor:
        """Weight of each MLP column: (M,)."""
        weights = self.mlp_writes.norm(dim=1)
        for reads in self.mlp_reads:
            weights = weights * reads.norm(dim=1)
        return weights


def _kept_of_block(block: _Block, width: Width) -> dict[str, Tensor]:
    assert width.num_attention_heads is not None
    assert width.num_key_value_heads is not None
    weights = block.head_weights()
    in_group, size = weights.shape[1], block.head_size
    best = weights.topk(width.num_attention_heads // width.num_key_value_heads, dim=1)
    groups = _top(best.values.sum(1), width.num_key_value_heads)
    heads = (groups[:, None] * in_group + best.indices[groups].sort(1).values).flatten()
    of_heads, of_groups = ((one[:, None] * size + torch.arange(size)).flatten() for one in (heads, groups))
    qkv = torch.cat([of_heads + part * weights.numel() * size for part in range(3)])
    columns = _top(block.column_weights(), width.intermediate_size)
    return {"heads": of_heads, "groups": of_groups, "qkv": qkv, "mlp": columns}


def _channel_weights(state: State, layout: _Layout) -> Tensor:
    sums: dict[str, list[Tensor]] = {"writes": [], "reads": []}
    for name in state:
        for axis, meaning in enumerate(layout.axes_of(name)):
            if meaning in sums:
                squares = _as_read(state, layout, name).square().sum(1 - axis)
                sums[meaning].append(squares / squares.sum().clamp_min(1e-30))
    written, read = (torch.stack(found).sum(0) for found in sums.values())
    return written * read


def _as_read(state: State, layout: _Layout, name: str) -> Tensor:
    """The matrix ``name`` in float32, times the gain before it where it reads the hidden state."""
    weight, axes = state[name].float(), layout.axes_of(name)
    if "reads" not in axes:
        return weight
    end = next(end for end in layout.norm_before if name.endswith(end))
    gain = state[name.removesuffix(end) + layout.norm_before[end]].float()
    return weight * (gain[:, None] if axes[0] == "reads" else gain)


def _top(weights: Tensor, count: int | None) -> Tensor:
    """Places of the ``count`` largest, ascending; of equal ones the first."""
    return weights.sort(descending=True, stable=True).indices[:count].sort().values.cpu()


def _head_size(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _narrow_config(config: PreTrainedConfig, width: Width, layout: _Layout) -> PreTrainedConfig:
    settings, names = config.to_dict(), config.attribute_map
    sizes = {name: size for name, size in vars(width).items() if name != "intermediate_size"}
    sizes[layout.mlp_size] = width.intermediate_size
    if config.model_type == "gpt2":
        del sizes["num_key_value_heads"]
    else:
        sizes["head_dim"] = _head_size(config)
    return type(config).from_dict(settings | {names.get(name, name): size for name, size in sizes.items()})

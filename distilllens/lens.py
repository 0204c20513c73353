"""The logit lens: a hidden state of any layer read as logits over the vocabulary.

Dimension key: B batch, T tokens, N rows, D hidden size, V effective vocabulary.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from distilllens.chunked import ChunkLosses, sum_over_chunks
from distilllens.fused import Adapter, Head

LARGEST_GAP = {torch.bfloat16: 0.03, torch.float16: 0.004}
"""By number type, how far the lens may lie from the model's own logits at the last layer, relative to the largest of
them; 1e-4 in wider ones."""
FINAL_NORM_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "layer_norm", "ln_out")
"""What the decoders of transformers call the norm before the head."""


class LogitLens(nn.Module):
    """Reads a hidden state as logits over the vocabulary: ``head(final_norm(h))``, the model's own last step.

    The norm's statistics are taken from ``h`` itself. Bias, soft-cap and logit scale of the model belong to the
    head. Rows of the head beyond the effective vocabulary (padding of the matrix) are left out before any
    softmax. With ``lens_norm="none"`` the lens layers skip the norm, as the released code of DistillLens does;
    the final layer never does.

    Source: nostalgebraist, "interpreting GPT: the logit lens", 2020.
    """

    def __init__(self, model: PreTrainedModel, *, lens_norm: str, vocab_size: int) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(
                f"{type(model).__name__} has no head over the vocabulary: a causal language model is needed"
            )
        if vocab_size > head.weight.shape[0]:
            raise ValueError(f"the head has {head.weight.shape[0]} rows, fewer than the vocabulary's {vocab_size}")
        # Held without registering: they are the model's own modules, and may be wrapped or sharded there.
        self._modules_of_model = (decoder_of(model), head)
        self.lens_norm = lens_norm
        self.vocab_size = vocab_size
        self.num_layers: int = num_layers(model)
        config = model.config.get_text_config()
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._scale = _logit_scale(config)

    def hidden_states(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Tensor | None,
        layers: Iterable[int],
        *,
        position_ids: Int[Tensor, "B T"] | None = None,
    ) -> dict[int, Float[Tensor, "B T D"]]:
        """Outputs of the blocks ``layers`` (1..N); the last one's is already normed, as transformers returns it.

        With ``position_ids`` each sequence of a packed row starts where they start anew, and sees itself alone. Padding
        is then one more sequence: transformers looks for them only where there is no ``attention_mask``.
        """
        decoder, _ = self._modules_of_model
        wanted = tuple(layers)
        inner = any(layer < self.num_layers for layer in wanted)
        output = decoder(
            input_ids=input_ids,
            attention_mask=attention_mask if position_ids is None else None,
            position_ids=position_ids,
            use_cache=False,
            output_hidden_states=inner,
            return_dict=True,
        )
        return {
            layer: output.last_hidden_state if layer == self.num_layers else output.hidden_states[layer]
            for layer in wanted
        }

    def normed(self, hidden: Float[Tensor, "*rows D"], layer: int) -> Float[Tensor, "*rows D"]:
        """What the head reads at ``layer``. The final layer's state comes normed and is never normed twice."""
        if layer == self.num_layers or self.lens_norm == "none":
            return hidden
        return self._norm()(hidden)

    def head(self, normed: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        """Logits over the effective vocabulary in float32 (float64 for a float64 model), from normed states."""
        rows = normed.reshape(-1, normed.shape[-1])
        logits = self.with_plain_head(rows, logits_of) if self.is_plain else self._logits_of_module(rows)
        return logits.reshape(*normed.shape[:-1], self.vocab_size)

    def sum_over_chunks(
        self, normed: Float[Tensor, "N D"], losses: ChunkLosses, *, chunk_rows: int, trains_head: bool = True
    ) -> Float[Tensor, " M"]:
        """``chunked.sum_over_chunks`` of the head, in one call of its modules where they are plain.

        Ranks that share a sharded head then gather it equally often, however many rows each has.
        """
        if not self.is_plain:
            assert trains_head, "only a plain head can be frozen"
            return sum_over_chunks(self._logits_of_module, normed, losses, chunk_rows=chunk_rows)

        def compute(states: Tensor, head: Head) -> Tensor:
            return sum_over_chunks(lambda rows: logits_of(rows, head), states, losses, chunk_rows=chunk_rows)

        return self.with_plain_head(normed, compute, trains_head=trains_head)

    @property
    def is_plain(self) -> bool:
        """Whether the head is a matrix with a bias, scale and soft-cap, with or without LoRA adapters."""
        return plain_parts(self._modules_of_model[1]) is not None

    def plain_head(self) -> Head | None:
        """The head as matrices; None where it is more than that. Weights that ZeRO-3 shards are empty in it."""
        parts = plain_parts(self._modules_of_model[1])
        return None if parts is None else self._head_of(parts)

    def matrix_head(self) -> Head | None:
        """The plain head where no adapter belongs to it: one matrix."""
        head = self.plain_head()
        return None if head is None or head.adapters else head

    def loaded_head(self) -> Head | None:
        """``matrix_head`` with its weights at hand, also where accelerate offloads them between two calls."""
        head = self.matrix_head()
        if head is None or not head.weight.is_meta:
            return head
        found: list[Head] = []

        def keep(states: Tensor, inner: Head) -> Tensor:
            bias = None if inner.whole_bias is None else inner.whole_bias.detach().clone()
            found.append(replace(inner, matrix=inner.matrix.detach().clone(), whole_bias=bias))
            return states

        self.with_plain_head(torch.zeros(1, head.weight.shape[1], dtype=head.weight.dtype), keep)
        return found[0]

    @property
    def device(self) -> torch.device:
        """Where the head computes."""
        return execution_device(self._modules_of_model[1])

    def with_plain_head(
        self, normed: Float[Tensor, "N D"], compute: Callable[[Tensor, Head], Tensor], *, trains_head: bool = True
    ) -> Tensor:
        """``compute(normed, plain head)``, run as the forward pass of the head's own modules.

        Wrappers that gather a module's weights when it is called, as ZeRO-3 does, gather them for ``compute``, and
        again when gradients go back through what it returns. Without ``trains_head`` gradients reach the states, and
        nothing of the head.
        """
        parts = plain_parts(self._modules_of_model[1])
        assert parts is not None, "only a plain head has matrices"

        def innermost(states: Tensor) -> Tensor:
            head = self._head_of(parts)
            return compute(states, head if trains_head else _frozen(head, parts))

        return _within([parts.linear, *(one.up for one in parts.adapters)], innermost)(normed)

    def _head_of(self, parts: "PlainParts") -> Head:
        linear, adapters = parts.linear, tuple(Adapter(one.reduced, one.up.weight) for one in parts.adapters)
        return Head(linear.weight, linear.bias, self._scale, self._softcap, self.vocab_size, adapters)

    def logits(self, hidden: Float[Tensor, "*rows D"], layer: int) -> Float[Tensor, "*rows V"]:
        """Logits over the effective vocabulary of states that left block ``layer``."""
        return self.head(self.normed(hidden, layer))

    def _logits_of_module(self, normed: Tensor) -> Tensor:
        """Logits of a head that only its own module can compute."""
        _, head = self._modules_of_model
        with torch.autocast(normed.device.type, enabled=False):
            logits = head(normed.to(cast(Tensor, head.weight).dtype))[..., : self.vocab_size]
        return _scaled(logits if logits.dtype == torch.float64 else logits.float(), self._scale, self._softcap)

    def _norm(self) -> nn.Module:
        decoder, _ = self._modules_of_model
        return final_norm_of(decoder)


@torch.no_grad()
def check_lens(model: PreTrainedModel, lens: LogitLens) -> None:
    """Raise ValueError unless the lens at the final layer gives the model's own logits, and its norm is the last one.

    This finds an architecture whose last step the lens doesn't know: a logit scale, a second norm, another head. The
    model is called where it lies and in the number type that it computes in, autocast included.
    """
    ids = torch.arange(min(8, lens.vocab_size), device=execution_device(model.get_input_embeddings()))[None]
    own = model(input_ids=ids, use_cache=False).logits[0, :, : lens.vocab_size].float()
    seen: list[Tensor] = []
    norm = final_norm_of(decoder_of(model))
    handle = norm.register_forward_hook(lambda *call: seen.append(cast(Tensor, call[-1])))
    try:
        hidden = lens.hidden_states(ids, None, [lens.num_layers])[lens.num_layers][0]
    finally:
        handle.remove()
    if not seen or not torch.equal(seen[-1][0].to(hidden.device), hidden):
        raise ValueError(
            f"{type(model).__name__}: the norm found is not the one before the head; report the architecture"
        )
    gap = (lens.logits(hidden, lens.num_layers).float().cpu() - own.cpu()).abs().max().item()
    if gap > LARGEST_GAP.get(computing_dtype(model), 1e-4) * max(1.0, own.abs().max().item()):
        raise ValueError(
            f"{type(model).__name__}: the logit lens at the last layer differs from the model's own logits by "
            f"{gap:.3g}, so its head has a step the lens doesn't know; report the architecture"
        )


def decoder_of(model: PreTrainedModel) -> Any:
    """The stack of blocks under the head, with its embeddings and final norm."""
    decoder = model.base_model
    # OPT and its kin wrap the decoder once more.
    return getattr(decoder, "decoder", decoder)


def final_norm_of(decoder: nn.Module) -> nn.Module:
    """The norm that a decoder applies after its last block."""
    for name in FINAL_NORM_NAMES:
        norm = getattr(decoder, name, None)
        if isinstance(norm, nn.Module):
            return norm
    known = ", ".join(FINAL_NORM_NAMES)
    raise ValueError(
        f"{type(decoder).__name__} has no final norm under a known name ({known}): use --lens-norm none, or "
        f"report the architecture"
    )


def execution_device(module: nn.Module) -> torch.device:
    """Where ``module`` computes; its weights may lie elsewhere between two calls, where accelerate offloads them."""
    hook: Any = getattr(module, "_hf_hook", None)
    place = getattr(hook, "execution_device", None)
    return next(module.parameters()).device if place is None else torch.device(place)


def computing_dtype(model: PreTrainedModel) -> torch.dtype:
    """The number type of the model's matrix products, here: that of autocast where it is on, else its weights'."""
    kind = execution_device(model.get_input_embeddings()).type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


def num_layers(model: PreTrainedModel) -> int:
    """Number of blocks of a model."""
    return int(model.config.get_text_config().num_hidden_layers)


def _logit_scale(config: Any) -> float:
    """Factor on the logits: Cohere multiplies by ``logit_scale``, Granite divides by ``logits_scaling``."""
    factor = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    return float(factor) / float(getattr(config, "logits_scaling", None) or 1.0)


def rows_at(hidden: Float[Tensor, "B T D"], is_target: Bool[Tensor, "B T"]) -> Float[Tensor, "N D"]:
    """States at the target positions: example after example, position after position."""
    return hidden[is_target]


def logits_of(normed: Float[Tensor, "N D"], head: Head) -> Float[Tensor, "N V"]:
    """Logits of a plain head, in float32 at least: bfloat16 ones err by up to 0.03 nats in the logsumexp."""
    with torch.autocast(normed.device.type, enabled=False):
        dtype = head.matrix.dtype
        full = dtype if dtype == torch.float64 else torch.float32
        bias = None if head.whole_bias is None else head.whole_bias.to(full)
        logits = functional.linear(normed.to(dtype).to(full), head.matrix.to(full), bias)
        for adapter in head.adapters:
            logits = logits + functional.linear(adapter.reduced(normed).to(full), adapter.weight.to(full))
        return _scaled(logits[:, : head.vocab_size], head.scale, head.softcap)


def _scaled(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = logits * scale if scale != 1.0 else logits
    return softcap * torch.tanh(logits / softcap) if softcap else logits


class _Adapter(NamedTuple):
    """One of LoRA's, as modules."""

    down: nn.Linear
    dropout: nn.Module
    scaling: float
    up: nn.Linear

    def reduced(self, normed: Tensor) -> Tensor:
        return self.down(self.dropout(normed.to(self.down.weight.dtype))) * self.scaling

    def reduced_by_frozen(self, normed: Tensor) -> Tensor:
        """``reduced``, without a gradient at ``down``, in the call that gathers its weight."""

        def product(states: Tensor) -> Tensor:
            return functional.linear(states, self.down.weight.detach())

        return _within([self.down], product)(self.dropout(normed.to(self.down.weight.dtype))) * self.scaling


class PlainParts(NamedTuple):
    """A head as modules whose products add up to its logits."""

    linear: nn.Linear
    adapters: tuple[_Adapter, ...] = ()


def plain_parts(head: nn.Module) -> PlainParts | None:
    """What a head consists of; None where it is anything but a linear layer, bare or under peft's LoRA.

    Merged adapters, DoRA and other variants, and adapters with a bias work only through the module.
    """
    if type(head) is nn.Linear:
        return PlainParts(head)
    peft = sys.modules.get("peft.tuners.lora")
    if peft is None or type(head) is not peft.Linear:
        return None
    lora = cast(Any, head)
    linear = lora.get_base_layer()
    names = [] if lora.disable_adapters else [name for name in lora.active_adapters if name in lora.lora_A]
    is_more = lora.merged or any(name in lora.lora_variant or lora.lora_bias[name] for name in names)
    if is_more or type(linear) is not nn.Linear:
        return None
    return PlainParts(
        linear,
        tuple(
            _Adapter(lora.lora_A[name], lora.lora_dropout[name], float(lora.scaling[name]), lora.lora_B[name])
            for name in names
        ),
    )


def _frozen(head: Head, parts: PlainParts) -> Head:
    """The same head without gradients at its weights."""
    adapters = tuple(Adapter(one.reduced_by_frozen, one.up.weight.detach()) for one in parts.adapters)
    bias = None if head.whole_bias is None else head.whole_bias.detach()
    return replace(head, matrix=head.matrix.detach(), whole_bias=bias, adapters=adapters)


def _within(modules: Sequence[nn.Module], compute: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``compute``, to be called inside the calls of all ``modules``."""
    if not modules:
        return compute
    outer, inner = modules[0], _within(modules[1:], compute)
    # accelerate, which spreads and offloads models, keeps a module's own forward there and calls it from its own.
    name = "_old_forward" if "_old_forward" in vars(outer) else "forward"

    def call(states: Tensor) -> Tensor:
        own = vars(outer).get(name)
        setattr(outer, name, inner)
        try:
            return outer(states)
        finally:
            delattr(outer, name) if own is None else setattr(outer, name, own)

    return call

"""The logit lens: a hidden state of any layer read as logits over the vocabulary.

Dimension key: B batch, T tokens, N rows, D hidden size, V effective vocabulary.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from distilllens.fused import Head

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
        self, input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None, layers: Iterable[int]
    ) -> dict[int, Float[Tensor, "B T D"]]:
        """Outputs of the blocks ``layers`` (1..N); the last one's is already normed, as transformers returns it."""
        decoder, _ = self._modules_of_model
        wanted = tuple(layers)
        inner = any(layer < self.num_layers for layer in wanted)
        output = decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
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
        _, head = self._modules_of_model
        with torch.autocast(normed.device.type, enabled=False):
            logits = _in_full_precision(head, normed)[..., : self.vocab_size]
        logits = logits * self._scale if self._scale != 1.0 else logits
        return self._softcap * torch.tanh(logits / self._softcap) if self._softcap else logits

    def plain_head(self) -> Head | None:
        """The head as a matrix with a bias, scale and soft-cap; None where it is more than that.

        Adapters on the head and ZeRO-3's sharded weights work only through the module.
        """
        _, head = self._modules_of_model
        if type(head) is not nn.Linear or hasattr(head.weight, "ds_id"):
            return None
        is_whole = head.weight.shape[0] == self.vocab_size
        weight, bias = head.weight, head.bias
        if not is_whole:
            weight, bias = weight[: self.vocab_size], None if bias is None else bias[: self.vocab_size]
        return Head(weight, bias, self._scale, self._softcap)

    def logits(self, hidden: Float[Tensor, "*rows D"], layer: int) -> Float[Tensor, "*rows V"]:
        """Logits over the effective vocabulary of states that left block ``layer``."""
        return self.head(self.normed(hidden, layer))

    def _norm(self) -> nn.Module:
        decoder, _ = self._modules_of_model
        return final_norm_of(decoder)


@torch.no_grad()
def check_lens(model: PreTrainedModel, lens: LogitLens) -> None:
    """Raise ValueError unless the lens at the final layer gives the model's own logits, and its norm is the last one.

    This finds an architecture whose last step the lens doesn't know: a logit scale, a second norm, another head.
    """
    ids = torch.arange(min(8, lens.vocab_size), device=model.device)[None]
    seen: list[Tensor] = []
    norm = final_norm_of(decoder_of(model))
    handle = norm.register_forward_hook(lambda *call: seen.append(cast(Tensor, call[-1])))
    try:
        own = model(input_ids=ids, use_cache=False).logits[0, :, : lens.vocab_size].float()
    finally:
        handle.remove()
    hidden = lens.hidden_states(ids, None, [lens.num_layers])[lens.num_layers][0]
    if not seen or not torch.equal(seen[-1][0], hidden):
        raise ValueError(
            f"{type(model).__name__}: the norm found is not the one before the head; report the architecture"
        )
    gap = (lens.logits(hidden, lens.num_layers).float() - own).abs().max().item()
    if gap > (1e-3 if hidden.dtype == torch.float32 else 0.25):
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


def num_layers(model: PreTrainedModel) -> int:
    """Number of blocks of a model."""
    return int(model.config.get_text_config().num_hidden_layers)


def _logit_scale(config: Any) -> float:
    """Factor on the logits: Cohere multiplies by ``logit_scale``, Granite divides by ``logits_scaling``."""
    factor = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    return float(factor) / float(getattr(config, "logits_scaling", None) or 1.0)


def _in_full_precision(head: nn.Module, normed: Tensor) -> Tensor:
    """The head's logits in float32 at least; bfloat16 ones err by up to 0.03 nats in the logsumexp."""
    weight = cast(Tensor, head.weight)
    if weight.dtype in (torch.float32, torch.float64):
        # Through the module itself, so that wrappers which gather or adapt its weight are at work.
        return head(normed.to(weight.dtype))
    bias = getattr(head, "bias", None)
    return functional.linear(normed.float(), weight.float(), None if bias is None else cast(Tensor, bias).float())


def rows_at(hidden: Float[Tensor, "B T D"], is_target: Bool[Tensor, "B T"]) -> Float[Tensor, "N D"]:
    """States at the target positions: example after example, position after position."""
    return hidden[is_target]

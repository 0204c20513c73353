"""LoRA students: adapters added to a model or trained on, saved as PEFT folders, merged when asked."""

import json
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from distilllens.config import LoraConfig
from distilllens.model_source import WHEEL, short_cause, source_kind
from distilllens.models import BASE_FILE, adapter_base, load_adapter
from distilllens.quiet import quiet_libraries
from distilllens.weights_digest import weights_digest


class LoraAdapter:
    """The adapters in a model, beside the model: what is trained and saved of a LoRA student."""

    def __init__(self, model: Any, base_digest: str) -> None:
        self._model = model.eval()  # as models are loaded: new adapters come with their dropout on
        self.base_digest = base_digest
        """``weights_digest`` of the base."""

    @property
    def model(self) -> PreTrainedModel:
        """The model itself, with adapters in the place of some of its modules."""
        return self._model.get_base_model()

    def state_dict(self, *, keep_vars: bool = False) -> dict[str, torch.Tensor]:
        """The adapters' weights, without those of the base."""
        weights = self._model.state_dict(keep_vars=keep_vars)
        return {name: weight for name, weight in weights.items() if "lora_" in name}

    def save_pretrained(self, folder: Path, *, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write a PEFT folder, with ``state_dict`` in place of its own if given, and which base belongs to it."""
        self._model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state_dict)
        (folder / BASE_FILE).write_text(json.dumps({"weights_digest": self.base_digest}) + "\n", encoding="utf-8")


def add_adapter(
    model: PreTrainedModel, config: LoraConfig, *, source: str, revision: str | None, seed: int
) -> LoraAdapter:
    """New adapters in ``model``, which was loaded from ``source``; all other weights are frozen.

    Raises ValueError where peft is missing, or for modules that the model does not have.
    """
    try:
        import peft
    except ImportError:
        raise ValueError("--lora-r needs peft: pip install 'distilllens[lora]'") from None
    targets = config.lora_target_modules
    assert config.lora_r is not None
    settings = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=config.lora_r,
        lora_alpha=cast(int, config.lora_alpha),
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ("all-linear",) else None if targets is None else list(targets),
    )
    # The same first weights on every rank.
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings(), quiet_libraries():
            warnings.simplefilter("ignore", FutureWarning)
            adapted = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ValueError(f"{source} cannot get LoRA adapters: {short_cause(error)} (--lora-target-modules)") from None
    kept = adapted.peft_config["default"]
    # A folder of this machine by its whole path: the adapter lies elsewhere.
    is_name = source_kind(source) == "hub" or source.startswith(WHEEL)
    kept.base_model_name_or_path = source if is_name else str(Path(source).resolve())
    kept.revision = revision
    return LoraAdapter(adapted, weights_digest(source, revision))


def continue_adapter(folder: Path, *, name: str, attn_implementation: str) -> LoraAdapter:
    """The adapters in a PEFT folder with the base that they name, to be trained on; errors call it ``name``.

    Raises ValueError where either cannot be loaded, where the base is not the one that they were trained on, and for
    adapters that are not LoRA.
    """
    adapted = load_adapter(folder, attn_implementation=attn_implementation, is_trainable=True, name=name)
    kind = adapted.peft_config["default"].peft_type
    if kind != "LORA":
        raise ValueError(f"{name} holds an adapter of the kind {kind}; only LoRA adapters can be trained on")
    return LoraAdapter(adapted, weights_digest(*adapter_base(folder)))

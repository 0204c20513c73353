"""The vocabulary: which ids are real, whether two tokenizers are the same, and the files that carry one."""

import hashlib
import json
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FROM_TEXT_TO_IDS = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model")
_SPECIAL = ("bos_token", "eos_token", "unk_token")
_OF_THIS_MACHINE = frozenset(
    "name_or_path _name_or_path is_local local_files_only cache_dir _commit_hash token tokenizer_file "
    "vocab_file merges_file gguf_file special_tokens_map_file chat_template_file".split()
)


def num_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """1 + the largest token id, added tokens included. Ids below it may have holes."""
    return 1 + max(tokenizer.get_vocab().values())


def effective_vocab_size(model: PreTrainedModel | int, tokenizer: PreTrainedTokenizerBase) -> int:
    """V_eff = min(rows of the head, 1 + largest token id): rows beyond it are padding and never looked at.

    ``model`` is a model, or the number of rows of its head.
    """
    rows = model if isinstance(model, int) else head_rows(model)
    return min(rows, num_token_ids(tokenizer))


def head_rows(model: PreTrainedModel) -> int:
    """Rows of the model's head, padding included."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no head over the vocabulary: a causal language model is needed")
    return int(head.weight.shape[0])


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of everything that decides which ids a text becomes.

    Ids, merges, added tokens, normalizer, pre-tokenizer, post-processor, and the ids of bos, eos and unk. Not
    the chat template (which has its own digest), the decoder, truncation and padding; not the pad token
    either: rows are masked by length, and tools often set one.
    """
    backend = json.loads(_backend(tokenizer).to_str())
    parts: dict[str, Any] = {name: _said(backend.get(name)) for name in _FROM_TEXT_TO_IDS}
    parts["special"] = {name: _token_id(tokenizer, name) for name in _SPECIAL}
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template: same tokenizer, same bytes.

    The model's name, local paths, truncation and padding are left out.
    """
    folder = Path(folder)
    _backend(tokenizer)
    tokenizer.save_pretrained(folder)
    config_file, backend_file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name not in _OF_THIS_MACHINE}
    config_file.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    backend = json.loads(backend_file.read_text(encoding="utf-8"))
    # Written always: a call with truncation=True anywhere before would otherwise end up in these bytes.
    backend |= {"truncation": None, "padding": None}
    backend_file.write_text(json.dumps(backend, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def require_matching_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str | Path) -> None:
    """ValueError when ``tokenizer`` is surely not that of ``model``, which came from ``source``.

    It is not when it has ids that the model has no embedding for, or so few that most rows of the embedding
    would be padding (real models are padded by less than 2 percent).
    """
    rows = int(cast(Any, model.get_input_embeddings()).weight.shape[0])
    ids = num_token_ids(tokenizer)
    if ids > rows:
        raise ValueError(
            f"the tokenizer does not match {source}: it has ids up to {ids - 1}, the model has embeddings "
            f"for {rows} ids; give the tokenizer the model was trained with (--tokenizer)"
        )
    if 2 * ids < rows:
        raise ValueError(
            f"the tokenizer does not match {source}: it has {ids} ids, fewer than half of the model's "
            f"{rows}; give the tokenizer the model was trained with (--tokenizer)"
        )


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no tokenizer.json, which a cache carries with it: convert it to "
            "a fast tokenizer (AutoTokenizer.from_pretrained(...).save_pretrained(...) of a recent "
            "transformers)"
        )
    return backend


def _said(value: Any) -> Any:
    """``value`` without fields that say nothing: a library that adds an unused one then changes no digest."""
    if isinstance(value, dict):  # by identity: 0 == False, and 0 is a token id
        return {key: _said(part) for key, part in value.items() if not (part is None or part is False or part == "")}
    return [_said(part) for part in value] if isinstance(value, list) else value


def _token_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    token = getattr(tokenizer, name, None)
    return None if token is None else cast(int, tokenizer.convert_tokens_to_ids(str(token)))

"""Models and tokenizers from .gguf files: unpacked, and with the text split as the model was trained."""

import copy
import io
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from distilllens.quiet import quiet_libraries

logger = logging.getLogger(__name__)

DIGITS_ALONE = frozenset(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"))
"""Values of `tokenizer.ggml.pre` whose models see every digit alone and the rest as GPT-2 does (llama.cpp).

transformers splits them as GPT-2 only, which changes the ids wherever blanks or line breaks stand before a
digit: a numbered list after an empty line, for one.
"""

AS_GPT2 = frozenset(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"))
"""Values of `tokenizer.ggml.pre` for which GPT-2's splitting, transformers' fallback, is right."""

_FIXED_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a GGUF file describes, chat template included. ValueError for a damaged file."""
    header = read_gguf_header(path)
    with quiet_libraries():
        # Not AutoTokenizer: it parses the whole file a second time (seconds) to find this same class.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)
    if header.get("tokenizer.ggml.model") == "gpt2":
        _split_as_trained(tokenizer, str(header.get("tokenizer.ggml.pre", "default")))
    return cast(PreTrainedTokenizerBase, tokenizer)


def _split_as_trained(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    if name in DIGITS_ALONE:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and name not in AS_GPT2:
        # transformers knows this name no better than we do: had it, there would be a Split before ByteLevel.
        logger.warning(
            "the GGUF file splits text by rule %r, which is not known here: GPT-2's is used, and some texts "
            "may get other ids than in training; --tokenizer takes the original tokenizer's folder",
            name,
        )


def load_gguf_model(
    path: Path, *, dtype: torch.dtype, attn_implementation: str
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of a GGUF file as an ordinary one in ``dtype``, and what transformers says of its loading."""
    read_gguf_header(path)
    # Versions that know GgufConfig leave weights packed where a kernel for that is installed; older ones never do.
    known = hasattr(transformers, "GgufConfig")
    unpack: dict[str, Any] = {"quantization_config": transformers.GgufConfig(dequantize=True)} if known else {}
    with quiet_libraries():
        packed, info = cast(
            tuple[PreTrainedModel, dict[str, Any]],
            AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=dtype, output_loading_info=True, **unpack
            ),
        )
        config = copy.deepcopy(packed.config)
        # The weights are unpacked by now, but transformers goes on calling the model quantized and refuses
        # to save it: hence a second model, of the same weights and a config that doesn't say so.
        vars(config).pop("quantization_config", None)
        model = type(packed).from_pretrained(
            cast(str, None),
            config=config,
            state_dict=packed.state_dict(),
            dtype=dtype,
            attn_implementation=attn_implementation,
        )
    model.generation_config = packed.generation_config
    return model, info


def read_gguf_header(path: Path) -> dict[str, Any]:
    """Single values of a GGUF file's metadata, no arrays. ValueError for another or a cut file."""
    try:
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ValueError(f"{path} is not a GGUF file: it doesn't start with the letters GGUF")
            version, _, num_values = _unpack(stream, "IQQ")
            if version not in (2, 3):
                raise ValueError(f"{path} is of GGUF version {version}: 2 and 3 can be read")
            return dict(item for item in _metadata(stream, num_values) if item[1] is not None)
    except (struct.error, UnicodeDecodeError, KeyError):
        raise ValueError(f"{path} is damaged or cut off within its header: get the file again") from None


def _metadata(stream: BinaryIO, num_values: int) -> Iterator[tuple[str, Any]]:
    for _ in range(num_values):
        name = _string(stream)
        (kind,) = _unpack(stream, "I")
        yield name, _value(stream, kind)


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(stream)
    if kind != _ARRAY:
        return _unpack(stream, _FIXED_FORMATS[kind])[0]
    element, count = _unpack(stream, "IQ")
    if element == _STRING:
        for _ in range(count):
            _string(stream)
    else:
        stream.seek(count * struct.calcsize(f"<{_FIXED_FORMATS[element]}"), io.SEEK_CUR)
    return None


def _string(stream: BinaryIO) -> str:
    (length,) = _unpack(stream, "Q")
    if length > 2**24:  # no name or template is that long: these are other bytes
        raise KeyError(length)
    return stream.read(length).decode("utf-8")


def _unpack(stream: BinaryIO, layout: str) -> tuple[Any, ...]:
    layout = f"<{layout}"
    return struct.unpack(layout, stream.read(struct.calcsize(layout)))

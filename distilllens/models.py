"""Models and tokenizers, from wherever they are: one call each, and one sentence when it fails."""

import contextlib
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from distilllens.device_map import parse_device_map
from distilllens.gguf_file import load_gguf_model, load_gguf_tokenizer
from distilllens.model_source import local_path, short_cause, source_kind
from distilllens.quiet import quiet_libraries
from distilllens.weights_digest import weights_digest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "*.tiktoken",
    "tekken.json",
)
BASE_FILE = "base_digest.json"
"""In our adapter folders: the digest of the base's weights."""
_NOT_THE_FUNCTION = frozenset(
    "_name_or_path transformers_version dtype torch_dtype architectures use_cache _attn_implementation "
    "_attn_implementation_internal output_attentions output_hidden_states".split()
)
"""Of a config: where it lies, what wrote it, how it is run."""

logger = logging.getLogger(__name__)


def load_tokenizer(source: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, adapter folder (else its base's), .gguf file or hub id.

    Raises ValueError where there is none.
    """
    path = local_path(source, revision=revision, weights=False)
    kind = source_kind(path)
    if kind == "gguf":
        with _loading(source, "a tokenizer"):
            return load_gguf_tokenizer(path)
    if not any(next(path.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        if kind == "adapter":
            base, base_revision = adapter_base(path)
            return load_tokenizer(base, revision=base_revision)
        raise ValueError(f"{source} has no tokenizer: expected tokenizer.json in it; found {_listing(path)}")
    with _loading(source, "a tokenizer"), quiet_libraries():
        return cast(
            PreTrainedTokenizerBase,
            AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False),
        )


def load_model(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    attn_implementation: str = "sdpa",
    device_map: str | None = None,
) -> PreTrainedModel:
    """The causal language model at ``source`` in evaluation mode: whole, unpacked, adapters merged.

    ``dtype`` is one of DTYPES or auto (the one it was saved in; float32 for GGUF), ``device`` cpu, cuda,
    cuda:N or auto. ``device_map`` (see `parse_device_map`) spreads a folder or hub model over devices in place of
    ``device``.

    Raises ValueError: no model there, weights missing or damaged, the hub out of reach, no such device.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known: expected {', '.join(DTYPES)} or auto")
    place = pick_device(device)
    path = local_path(source, revision=revision)
    kind = source_kind(path)
    if kind == "gguf":
        if device_map is not None:
            raise ValueError(f"{source} is a GGUF file, which loads onto one device: drop the device map")
        with _loading(source, "a model"):
            model, info = load_gguf_model(
                path, dtype=DTYPES.get(dtype, torch.float32), attn_implementation=attn_implementation
            )
        _require_all_weights(info, source)
    elif kind == "adapter":
        adapted = load_adapter(
            path, dtype=dtype, attn_implementation=attn_implementation, device_map=device_map, name=source
        )
        model = cast(PreTrainedModel, adapted.merge_and_unload())
    else:
        model = _load_folder(path, source, dtype, attn_implementation, device_map)
    model.eval()
    return model if device_map is not None else cast(PreTrainedModel, cast(torch.nn.Module, model).to(place))


def pick_device(device: str) -> torch.device:
    """The torch device that ``device`` (auto, cpu, cuda, cuda:N) means here; ValueError for none."""
    num_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda" if num_cuda else "cpu")
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ValueError(f"device {device!r} is not known: expected auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(number or 0) >= num_cuda:
        raise ValueError(
            f"--device {device}: this machine has {num_cuda or 'no'} CUDA "
            f"device{'s' if num_cuda != 1 else ''} that torch {torch.__version__} can use; give --device "
            "auto or cpu"
        )
    return torch.device(device)


def require_kernel(attn_implementation: str, device: torch.device, *, is_16_bit: bool, flag: str) -> None:
    """ValueError where FlashAttention is asked for and cannot run; ``flag`` asks for 16 bits."""
    if not attn_implementation.startswith("flash_attention"):
        return
    if device.type == "cpu":
        raise ValueError(
            f"--attn-implementation {attn_implementation} needs a CUDA device, and this is a CPU: take sdpa"
        )
    if not is_16_bit:
        raise ValueError(f"--attn-implementation {attn_implementation} computes in 16 bits only: give {flag}, or sdpa")


def require_bfloat16(device: torch.device, *, flag: str) -> None:
    """ValueError on a CUDA device that computes bfloat16 by detours only, slower than float32; ``flag`` asks for it."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        major, minor = torch.cuda.get_device_capability(device)
        raise ValueError(
            f"{flag}: {torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) does not compute in "
            f"bfloat16, which comes with 8.0: drop {flag}"
        )


def config_digest(model: PreTrainedModel) -> str:
    """sha256 (hex) of the settings that shape what a model computes: not its name, dtype or kernels."""
    canonical = json.dumps(_shaping(model.config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _shaping(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _shaping(part) for key, part in value.items() if key not in _NOT_THE_FUNCTION}
    return [_shaping(part) for part in value] if isinstance(value, list | tuple) else value


def _load_folder(
    path: Path, source: str | Path, dtype: str, attn_implementation: str, device_map: str | None
) -> PreTrainedModel:
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{source} has no config.json: expected a model folder as save_pretrained writes it "
            f"(config.json, model.safetensors, tokenizer.json); found {_listing(path)}"
        )
    with _loading(source, "a model"), quiet_libraries():
        model, info = cast(
            tuple[PreTrainedModel, dict[str, Any]],
            AutoModelForCausalLM.from_pretrained(
                str(path),
                dtype=DTYPES.get(dtype, "auto"),
                attn_implementation=attn_implementation,
                device_map=None if device_map is None else parse_device_map(device_map),
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            ),
        )
    _require_all_weights(info, source)
    return model


def _require_all_weights(info: dict[str, Any], source: str | Path) -> None:
    # transformers fills a missing weight with random numbers and only warns.
    if missing := sorted(info.get("missing_keys") or ()):
        raise ValueError(
            f"{source} lacks {len(missing)} of the weights that its config asks for, such as {missing[0]}: "
            f"the files don't belong together, or one is missing"
        )
    if unexpected := sorted(info.get("unexpected_keys") or ()):
        logger.warning(
            "%s holds %d weights its config has no place for, such as %s",
            source,
            len(unexpected),
            unexpected[0],
        )


def load_adapter(
    path: str | Path,
    *,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
    device_map: str | None = None,
    is_trainable: bool = False,
    name: str | Path | None = None,
) -> Any:
    """The adapters in a PEFT folder on the base that they name, unmerged, as a ``peft.PeftModel``.

    ``name`` is what errors call the folder. Raises ValueError where peft is missing, where base or adapters cannot be
    loaded, or where they don't belong together.
    """
    path, source = Path(path), name or path
    try:
        from peft import PeftModel, get_peft_model_state_dict
        from peft.utils import load_peft_weights
    except ImportError:
        raise ValueError(f"{source} is a PEFT adapter: pip install 'distilllens[lora]' to load it") from None
    base, base_revision = adapter_base(path)
    _require_base(path, source, base, base_revision)
    try:
        model = load_model(
            base,
            revision=base_revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            device_map=device_map,
        )
    except ValueError as error:
        raise ValueError(f"{source} is an adapter of {base}, which can't be loaded: {error}") from None
    with _loading(source, "an adapter"), warnings.catch_warnings(), quiet_libraries():
        # An adapter of another model, or a cut one, is otherwise merged in part with no more than a warning.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapted = PeftModel.from_pretrained(model, str(path), is_trainable=is_trainable)
        held, placed = (
            load_peft_weights(str(path), device="cpu"),
            get_peft_model_state_dict(adapted, save_embedding_layers=False),
        )
    # Weights of modules that the model lacks are left out without a word.
    if homeless := sorted(name for name in held if "lora_" in name and name not in placed):
        raise ValueError(
            f"{source} is an adapter for another base: {base} has no module for {len(homeless)} of its weights, such "
            f"as {homeless[0]}"
        )
    return adapted


def _require_base(path: Path, source: str | Path, base: str, revision: str | None) -> None:
    """Raise ValueError where the base is not the one that the adapter was trained on, if the folder says which."""
    if not (path / BASE_FILE).is_file():
        return
    try:
        digest = weights_digest(base, revision)
    except ValueError:
        return  # loading it says why
    with _loading(source, "an adapter"):
        expected = json.loads((path / BASE_FILE).read_text(encoding="utf-8"))["weights_digest"]
    if digest != expected:
        raise ValueError(
            f"{source} is an adapter for another base: {base} has other weights now (sha256 {digest[:12]}...) than "
            f"those it was trained on ({expected[:12]}...); set base_model_name_or_path in its adapter_config.json to "
            f"the model that has them"
        )


def adapter_base(path: Path) -> tuple[str, str | None]:
    """Base model of a PEFT folder and its revision. ValueError where it names none."""
    with _loading(path, "an adapter"):
        settings = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not base or Path(base).resolve() == path.resolve():
        raise ValueError(
            f"{path / 'adapter_config.json'} names no base model: set base_model_name_or_path to the folder "
            "or hub id that the adapter was trained on"
        )
    return str(base), settings.get("revision")


@contextlib.contextmanager
def _loading(source: str | Path, what: str) -> Iterator[None]:
    """Turns whatever a library raises about ``source`` into one sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except ImportError as error:
        hint = " (pip install 'distilllens[demo]' for .gguf files)" if str(source).endswith(".gguf") else ""
        raise ValueError(f"{source}: a package is missing to load it as {what}{hint}: {short_cause(error)}") from None
    except Exception as error:  # OSError, SafetensorError, KeyError, RuntimeError, ...: any file can be damaged
        raise ValueError(f"{source} could not be loaded as {what}: {short_cause(error)}") from None


def _listing(path: Path, most: int = 8) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) + more) or "nothing"

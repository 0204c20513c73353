"""Command: a smaller model as an ordinary folder, made of a part of a larger one or from nothing."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from distilllens.config import NewStudentConfig
from distilllens.depth_pruning import check_kept, prune_depth, spread_layers
from distilllens.model_source import short_cause
from distilllens.models import load_model, load_tokenizer
from distilllens.quiet import quiet_libraries
from distilllens.vocabulary import require_matching_tokenizer, save_tokenizer
from distilllens.width_pruning import Width, check_width, prune_width

_OF_A_MODEL_FOLDER = tuple(
    "config.json generation_config.json model*.safetensors model.safetensors.index.json "
    "tokenizer*.json vocab.json merges.txt special_tokens_map.json added_tokens.json "
    "chat_template.* additional_chat_templates".split()
)


@dataclass(frozen=True)
class NewStudent:
    """What was made, as a sentence when printed."""

    folder: Path
    layers: tuple[int, ...] | None
    """Layers of the source that were kept, 1-based; None for fresh weights."""
    source: str | None
    num_source_layers: int | None
    num_layers: int
    width: Width
    """Sizes that were asked for."""
    num_parameters: int
    """Tied weights counted once."""
    dtype: str

    def __str__(self) -> str:
        size = f"{self.num_parameters:,} parameters in {self.dtype}"
        if self.layers is None:
            return f"{self.folder}: {self.num_layers} layers of fresh weights, {size}"
        kept = ", ".join(map(str, self.layers))
        layers = f"{self.num_layers} of the {self.num_source_layers} layers of {self.source} ({kept})"
        widths = "".join(f", {name.replace('_', ' ')} {n}" for name, n in vars(self.width).items() if n is not None)
        return f"{self.folder}: {layers}{widths}, {size}"


def run_new_student(config: NewStudentConfig) -> NewStudent:
    """Write the student that ``config`` describes to its output folder, whole or not at all.

    Raises ValueError for a request that can't be met and for an output folder that holds something else.
    """
    width = Width(**{field.name: getattr(config, field.name) for field in fields(Width)})
    _check_request(config, width)
    _check_output(config)
    if config.config_file is not None:
        tokenizer = load_tokenizer(config.tokenizer or str(config.from_model), revision=_tokenizer_revision(config))
        model = fresh_model(config.config_file, tokenizer, seed=config.seed)
        kept = num_source_layers = None
    else:
        source = str(config.from_model)
        teacher = load_model(source, revision=config.revision, dtype="auto")
        tokenizer = load_tokenizer(config.tokenizer or source, revision=_tokenizer_revision(config))
        require_matching_tokenizer(teacher, tokenizer, source)
        num_source_layers = int(teacher.config.num_hidden_layers)
        if config.keep is not None:
            kept = check_kept(config.keep, num_source_layers)
        else:
            kept = spread_layers(num_source_layers if config.layers is None else config.layers, num_source_layers)
        if width:
            check_width(width, teacher.config)
        model = prune_depth(teacher, kept)
        if width:
            model = prune_width(model, width)
    with _new_folder(config.output_dir) as folder, quiet_libraries():
        model.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
    return NewStudent(
        folder=config.output_dir,
        layers=kept,
        source=config.from_model,
        num_source_layers=num_source_layers,
        num_layers=int(model.config.num_hidden_layers),
        width=width,
        num_parameters=sum(parameter.numel() for parameter in cast(torch.nn.Module, model).parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def fresh_model(config_file: Path, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """A model of ``config_file`` with random weights that depend on ``seed`` only, fitted to ``tokenizer``.

    Bos, eos and pad ids come from the tokenizer: a config written by hand often still has another model's.
    """
    if not config_file.is_file():
        raise ValueError(f"{config_file} is not a file: --config takes a model's config.json")
    try:
        config = AutoConfig.from_pretrained(str(config_file), trust_remote_code=False)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(tokenizer, name) is not None:
                setattr(config, name, getattr(tokenizer, name))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            dtype = config.dtype or torch.float32
            model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=dtype))
    except Exception as error:  # a hand-written config fails in as many ways as there are architectures
        raise ValueError(f"{config_file} doesn't describe a causal language model: {short_cause(error)}") from None
    require_matching_tokenizer(model, tokenizer, config_file)
    return model.eval()


def _check_request(config: NewStudentConfig, width: Width) -> None:
    ways = {"--layers": config.layers, "--keep": config.keep, "--config": config.config_file}
    given = [flag for flag, value in ways.items() if value is not None]
    sizes = [f"--{name.replace('_', '-')}" for name, size in vars(width).items() if size is not None]
    if len(given) > 1 or not (given or sizes):
        raise ValueError(
            f"{' and '.join(given) or 'none of --layers, --keep, --config and a width such as --hidden-size'} given: a "
            "student is made in one way, --from MODEL with --layers N or --keep 1,4,7 and with widths or without, or "
            "--config config.json for fresh weights"
        )
    if config.config_file is not None and sizes:
        raise ValueError(f"{sizes[0]} prunes a model, --config has sizes of its own: drop one of them")
    given += sizes
    if config.config_file is None and config.from_model is None:
        raise ValueError(f"{given[0]} needs the model to prune: give --from MODEL")
    if config.config_file is not None and config.from_model is None and config.tokenizer is None:
        raise ValueError(
            "--config gives a model without a tokenizer: give --tokenizer FOLDER, or --from MODEL for its own"
        )


def _tokenizer_revision(config: NewStudentConfig) -> str | None:
    return None if config.tokenizer else config.revision


def _check_output(config: NewStudentConfig) -> None:
    folder = config.output_dir
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: --output-dir takes a new folder")
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    if not entries:
        return
    for source in (config.from_model, config.tokenizer):
        if source is not None and Path(source).resolve() == folder.resolve():
            raise ValueError(f"{folder} is where the student would be made from: give another --output-dir")
    if not config.overwrite:
        raise ValueError(f"{folder} is not empty: give another --output-dir, or --overwrite to replace the model in it")
    strange = [entry.name for entry in entries if not any(entry.match(pattern) for pattern in _OF_A_MODEL_FOLDER)]
    if strange or not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds more than a model ({', '.join(strange[:3]) or 'it has no config.json'}): "
            "--overwrite replaces a model folder only; give another --output-dir"
        )


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write in that takes ``folder``'s place when everything went well, and is gone when not."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    replaced = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-replaced")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        if folder.is_dir():
            folder.rename(replaced)
        unfinished.rename(folder)
    except BaseException:
        if replaced.is_dir() and not folder.is_dir():
            replaced.rename(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)

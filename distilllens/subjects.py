"""The models under test with their rows, and everything that decides what an evaluation of them gives."""

import hashlib
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from distilllens import __version__
from distilllens.config import EvaluateConfig
from distilllens.data import Examples, Prompt, Prompts, load_configured, prompt_and_references, row_settings
from distilllens.launch import is_distributed
from distilllens.matching import TEMPERATURE
from distilllens.model_source import local_path
from distilllens.models import load_tokenizer
from distilllens.rouge import ROUGE_SETTINGS
from distilllens.vocabulary import tokenizer_digest
from distilllens.weights_digest import weights_digest
from distilllens_cache import CacheReader

NOT_SETTINGS = {"output_dir", "overwrite", "batch_size", "device", "spool_dir", "spool_bytes"}
"""Keys of the config that neither predictions nor scores depend on."""

PACKAGES = ("torch", "transformers", "tokenizers", "rouge-score", "nltk")


@dataclass(frozen=True)
class Subject:
    """One model under test: its tokenizer, and the rows as that tokenizer writes them."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts | None
    examples: Examples | None

    @property
    def rows(self) -> Sequence[Prompt]:
        """Rows to generate for, in the order of the dataset."""
        return self.prompts.prompts if self.prompts is not None else ()


def check_request(config: EvaluateConfig) -> None:
    """Raise ValueError for what can be seen to be wrong without opening anything."""
    if is_distributed():
        raise ValueError("evaluate runs in one process: start it without torchrun or deepspeed")
    for name, values in (("--model", config.model), ("--seeds", config.seeds)):
        if not values:
            raise ValueError(f"{name} is empty: give at least one")
        if repeated := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
            raise ValueError(f"{name} has {repeated[0]} more than once: each is measured once")


def open_subject(name: str, config: EvaluateConfig) -> Subject:
    """The model called ``name`` without its weights, and its rows; stderr tells which it cannot use."""
    tokenizer = load_tokenizer(name, revision=config.revision)
    prompts, examples = _rows(config, tokenizer) if config.dataset is not None else (None, None)
    if examples is not None and (report := examples.report()):
        print(f"{name}: {report}", file=sys.stderr, flush=True)
    return Subject(name, tokenizer, prompts, examples)


def _rows(config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Prompts, Examples]:
    assert config.dataset is not None
    prompts = prompt_and_references(config.dataset, tokenizer, **row_settings(config))
    return prompts, load_configured(config, config.dataset, tokenizer)


def evaluation_settings(config: EvaluateConfig, subjects: Sequence[Subject], device: torch.device) -> dict[str, Any]:
    """Everything that decides predictions and scores, as JSON.

    Raises CacheError when a model's tokenizer is not that of the cache.
    """
    run = {name: value for name, value in config.model_dump(mode="json").items() if name not in NOT_SETTINGS}
    models = {
        subject.name: {
            "weights": weights_digest(subject.name, config.revision),
            "config": _config_digest(subject.name, config.revision),
            "tokenizer": tokenizer_digest(subject.tokenizer),
            "rows": _rows_digest(subject),
        }
        for subject in subjects
    }
    return run | {
        "seeds": seeds_of(config),
        "device": device.type,
        "models": models,
        "cache_digest": _cache_digest(config, subjects),
        "rouge": ROUGE_SETTINGS,
        "versions": {
            "distilllens": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
    }


def _config_digest(source: str, revision: str | None) -> str | None:
    """Digest of the files that shape a model besides its weights: a GGUF file has none."""
    path = local_path(source, revision=revision, weights=False)
    files = [path / name for name in ("config.json", "generation_config.json")]
    content = [file.read_text(encoding="utf-8") if file.is_file() else None for file in files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest() if any(content) else None


def _rows_digest(subject: Subject) -> str:
    examples = subject.examples.digest if subject.examples is not None else None
    return hashlib.sha256(json.dumps([subject.rows, examples]).encode()).hexdigest()


def _cache_digest(config: EvaluateConfig, subjects: Sequence[Subject]) -> str | None:
    """The cache's digest, after every model's tokenizer was held against it: before any of them is run."""
    if config.cache is None:
        return None
    reader = CacheReader(config.cache_folder(config.cache))
    allowed = tuple(part.strip() for part in (config.allow_mismatch or "").split(",") if part.strip())
    for subject in subjects:
        digest = tokenizer_digest(subject.tokenizer)
        reader.require(tokenizer_digest=digest, temperature=TEMPERATURE, allow_mismatch=allowed)
    return reader.digest


def seeds_of(config: EvaluateConfig) -> list[int]:
    """Seeds to generate under: one where the text is greedy, since it would be the same under all."""
    return list(config.seeds if config.do_sample else config.seeds[:1])


def ends_of_references(subject: Subject) -> frozenset[int]:
    """Special tokens that responses were taught to end with, such as a chat's end of turn that is no EOS."""
    tokenizer = subject.tokenizer
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    examples = subject.examples.examples if subject.examples is not None else []
    return frozenset({one.token_ids[-1] for one in examples if one.is_target[-2]} & special)

"""What a training run is made of: student, cache, objective, opened and checked before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilllens.batches import WINDOW_SHARDS, ExampleSource
from distilllens.config import TrainConfig
from distilllens.console import say
from distilllens.data import Example, load_configured
from distilllens.lens import LogitLens, check_lens
from distilllens.matching import ALIGNMENT, Matching, match_student, split_names
from distilllens.models import load_model, load_tokenizer
from distilllens.packing import check_packing
from distilllens.self_check import check_alignment
from distilllens.student import Objective, Pairs, Student
from distilllens.tails import Tail
from distilllens.vocabulary import effective_vocab_size, require_matching_tokenizer
from distilllens_cache import CachedExample, CacheReader

RESUME_IGNORES = {
    "output_dir", "overwrite", "resume_from_checkpoint", "local_rank", "logging_steps", "eval_steps", "save_steps",
    "save_total_limit", "deepspeed", "device", "attn_implementation", "loss_chunk_rows", "gradient_checkpointing",
    "student", "cache", "eval_cache", "max_steps", "num_train_epochs",
}  # fmt: skip
"""Settings that a resumed run may change; the cache is compared by its digest, the length by its steps."""


class TokenizedRows:
    """Rows of a dataset as a source of examples without targets of a teacher, for ``--method sft``."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples
        self.num_targets = np.array([example.num_targets for example in examples])
        self.shard_of = np.zeros(len(examples), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> CachedExample:
        example = self.examples[index]
        return CachedExample(
            index=index,
            id=example.id,
            token_ids=np.array(example.token_ids, dtype=np.uint32),
            target_positions=np.flatnonzero(example.is_target).astype(np.uint32),
            targets={},
        )


@dataclass(frozen=True)
class Evaluation:
    """Held-out rows of a teacher, and how the student is matched with them."""

    reader: CacheReader
    matching: Matching


@dataclass(frozen=True)
class TrainingRun:
    """What a run is made of, once everything has been opened and checked."""

    config: TrainConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    student: Student
    source: ExampleSource
    tails: dict[int, Tail]
    """What stands for the rest at the teacher layers that the loss reads."""
    evaluation: Evaluation | None
    identity: dict[str, Any]
    """What a resumed run must share with this one."""


def open_run(config: TrainConfig, *, start_from: Path | None) -> TrainingRun:
    """Open student and data and check that they belong together; nothing is written.

    ``start_from`` is the checkpoint whose weights the student has, when a run is resumed.
    """
    source = str(start_from or config.student)
    revision = None if start_from else config.student_revision
    model = load_model(source, revision=revision, attn_implementation=config.attn_implementation)
    tokenizer = load_tokenizer(source, revision=revision)
    require_matching_tokenizer(model, tokenizer, source)
    if config.gradient_checkpointing:
        # The older name warns in the versions that have the newer one.
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    evaluation = _open_evaluation(config, model, tokenizer)
    open_source = _from_cache if config.cache is not None else _from_rows
    examples, lens, objective, tails, resolved = open_source(config, model, tokenizer)
    asked = {name: value for name, value in config.model_dump(mode="json").items() if name not in RESUME_IGNORES}
    identity = asked | resolved
    if config.packing:
        check_packing(model, lens)
    if evaluation is not None:
        identity["eval_cache"] = evaluation.reader.digest
    student = Student(model, lens, objective, chunk_rows=config.loss_chunk_rows)
    return TrainingRun(config, model, tokenizer, student, examples, tails, evaluation, identity)


Opened = tuple[ExampleSource, LogitLens, Objective, dict[int, Tail], dict[str, Any]]


def _from_cache(config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Opened:
    assert config.cache is not None
    reader = CacheReader(config.cache, shards_in_memory=WINDOW_SHARDS + 1)
    losses = {} if config.task == "ce" else {"task": config.task}
    matching = _match(config, model, tokenizer, reader, lens_divergence=config.lens_divergence, **losses)
    objective = _objective(config, matching.pairs)
    if config.method == "distilllens":
        say(check_alignment(reader, is_allowed=ALIGNMENT in split_names(config.allow_mismatch)))
    tails = {layer: matching.tails[layer] for layer in objective.teacher_layers(matching.final_layer)}
    identity = {
        "cache": reader.digest,
        "pairs": [list(pair) for pair in objective.pairs],
        "tail": matching.tail,
        "mismatches": list(matching.mismatches),
    }
    return reader, matching.lens, objective, tails, identity


def _from_rows(config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Opened:
    assert config.dataset is not None
    examples = load_configured(config, config.dataset, tokenizer)
    say(examples.report())
    lens = LogitLens(model, lens_norm="final", vocab_size=effective_vocab_size(model, tokenizer))
    check_lens(model, lens)
    return (
        TokenizedRows(examples.examples),
        lens,
        _objective(config, ()),
        {},
        {"dataset_digest": examples.digest},
    )


def _open_evaluation(
    config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Evaluation | None:
    if config.eval_cache is None:
        return None
    reader = CacheReader(config.eval_cache)
    # What is reported is forward KL and JSD, whatever the loss.
    return Evaluation(reader, _match(config, model, tokenizer, reader))


def _match(
    config: TrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reader: CacheReader,
    **losses: str,
) -> Matching:
    return match_student(
        model, tokenizer, reader, pairs=config.pairs, tail=config.tail, allow_mismatch=config.allow_mismatch, **losses
    )


def _objective(config: TrainConfig, pairs: Pairs) -> Objective:
    is_distillation = config.method == "distilllens"
    return Objective(
        task=config.task if is_distillation else "ce",
        lens_divergence=config.lens_divergence,
        pairs=pairs if is_distillation else (),
        lens_weight=config.lens_weight,
        kd_ratio=config.kd_ratio if is_distillation else 0.0,
    )

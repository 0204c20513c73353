"""What a training run is made of: student, cache, objective, opened and checked before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilllens.adapters import LoraAdapter, add_adapter, continue_adapter
from distilllens.batches import ExampleSource
from distilllens.by_layer import parse_gate
from distilllens.checkpoint import Saved
from distilllens.collate import Batch, collate
from distilllens.config import TrainConfig
from distilllens.console import say
from distilllens.data import Example, load_configured
from distilllens.layer_maps import Pairs
from distilllens.lens import LogitLens
from distilllens.lens_rows import LensRows, choose_lens_rows
from distilllens.matching import ALIGNMENT, Matching, match_student, split_names
from distilllens.mixed_batch import Teaching, Teachings, collate_mixed
from distilllens.mixture import DataMixture, MixedExample
from distilllens.model_source import local_path, source_kind
from distilllens.models import adapter_base, load_model, load_tokenizer
from distilllens.objective import Gate, Objective, Positions
from distilllens.packing import pack, wants_one_row
from distilllens.self_check import check_alignment
from distilllens.several_caches import check_teachings, match_each, open_caches
from distilllens.student import Student
from distilllens.tails import Tail, tails_on
from distilllens.vocabulary import effective_vocab_size, require_matching_tokenizer
from distilllens_cache import CachedExample, CacheReader

RESUME_IGNORES = {
    "output_dir", "overwrite", "resume_from_checkpoint", "logging_steps", "eval_steps", "save_steps",
    "save_total_limit", "deepspeed", "device", "attn_implementation", "loss_chunk_rows", "gradient_checkpointing",
    "student", "student_revision", "dataset", "cache", "cache_weights", "mix", "eval_cache", "spool_dir", "spool_bytes",
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "log_example_ids",
    "lora_merge", "dry_run", "report_to", "run_name", "metric_for_best_model", "load_best_model_at_end",
    "early_stopping_patience", "early_stopping_threshold", "max_loss_ratio",
}  # fmt: skip
"""Settings that a resumed run may change; caches are compared by digest and weight, the length by its steps, and the
sizes of batches by the examples of a step."""


class TokenizedRows:
    """Rows of a dataset as a source of examples without targets of a teacher, for ``--method sft``."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples
        self.num_tokens = np.array([example.num_tokens for example in examples])
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

    def read_shard(self, number: int) -> "TokenizedRows":
        """All rows are one shard, made into examples one at a time."""
        return self


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
    adapter: LoraAdapter | None
    """Of a LoRA student: what is trained in ``model``, and saved of it."""
    tokenizer: PreTrainedTokenizerBase
    student: Student
    source: ExampleSource | DataMixture
    tails: dict[int, Tail]
    """What stands for the rest at the teacher layers that the loss reads; empty where there are several caches."""
    evaluation: Evaluation | None
    identity: dict[str, Any]
    """What a resumed run must share with this one."""
    teachings: Teachings | None = None
    """What the loss reads of each cache, where there are several."""

    @property
    def reads_targets(self) -> bool:
        """Whether the loss reads anything that a teacher said."""
        return bool(self.tails) or any(one.tails for one in (self.teachings.each if self.teachings else ()))

    def batch(self, examples: Sequence[CachedExample], step: int) -> Batch:
        """The batch of some of a step's examples."""
        config, layers, packs = self.config, self.student.objective.lens_layers, None
        if config.packing:
            examples, packs = pack(examples, in_one_row=wants_one_row(self.model))

        def lens_rows(some: Sequence[CachedExample]) -> LensRows:
            return choose_lens_rows(some, layers, share=config.lens_rows, seed=config.seed, step=step)

        if self.teachings is None:
            return collate(examples, self.tails, lens_rows=lens_rows(examples), packs=packs)
        return collate_mixed(cast(Sequence[MixedExample], examples), self.teachings, lens_rows=lens_rows, packs=packs)

    def on(self, device: torch.device) -> "TrainingRun":
        """This run with what all its batches share on ``device``, where it is then moved once."""
        teachings = self.teachings
        if teachings is not None:
            each = tuple(replace(one, tails=tails_on(one.tails, device)) for one in teachings.each)
            teachings = replace(teachings, each=each)
        return replace(self, tails=tails_on(self.tails, device), teachings=teachings)

    @property
    def saved(self) -> Saved:
        """What checkpoints and the output folder hold."""
        return self.model if self.adapter is None else self.adapter


def open_run(config: TrainConfig, *, start_from: Path | None) -> TrainingRun:
    """Open student and data and check that they belong together; nothing is written, and the student is not called.

    ``start_from`` is the checkpoint whose weights the student has, when a run is resumed.
    """
    source = str(start_from or config.student)
    revision = None if start_from else config.student_revision
    model, adapter = _open_model(config, source, revision, is_resumed=start_from is not None)
    tokenizer = load_tokenizer(source, revision=revision)
    require_matching_tokenizer(model, tokenizer, source)
    if config.gradient_checkpointing:
        # The older name warns in the versions that have the newer one.
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    evaluation = _open_evaluation(config, model, tokenizer)
    open_source = (_from_rows, _from_cache, _from_caches)[min(len(config.cache), 2)]
    opened = open_source(config, model, tokenizer)
    asked = {name: value for name, value in config.model_dump(mode="json").items() if name not in RESUME_IGNORES}
    identity = asked | opened.identity
    if adapter is not None:
        identity["lora_base"] = adapter.base_digest
    lens = _lens_of(opened, evaluation)
    if evaluation is not None:
        identity["eval_cache"] = evaluation.reader.digest
        if more := [text for text in evaluation.matching.mismatches if text not in identity.get("mismatches", ())]:
            identity["mismatches"] = [*identity.get("mismatches", ()), *more]
    student = Student(model, lens, opened.objective, chunk_rows=config.loss_chunk_rows)
    return TrainingRun(
        config, model, adapter, tokenizer, student, opened.source, opened.tails, evaluation, identity, opened.teachings
    )


def _open_model(
    config: TrainConfig, source: str, revision: str | None, *, is_resumed: bool
) -> tuple[PreTrainedModel, LoraAdapter | None]:
    path = local_path(source, revision=revision)
    is_adapter = source_kind(path) == "adapter"
    if is_adapter and config.lora_r is not None and not is_resumed:
        raise ValueError(
            f"--student {source} is an adapter with a rank of its own: drop --lora-r to train it on, or give its base"
        )
    if config.lora_merge and config.lora_r is None and not is_adapter:
        raise ValueError(f"--lora-merge: {source} is no adapter and gets none; drop it, or give --lora-r")
    if is_adapter:
        adapter = continue_adapter(path, name=source, attn_implementation=config.attn_implementation)
        if not is_resumed:
            base, _ = adapter_base(path)
            say(f"{source} is a LoRA adapter of {base}: it is trained on, and the weights of its base stay as they are")
        return adapter.model, adapter
    model = load_model(source, revision=revision, attn_implementation=config.attn_implementation)
    if config.lora_r is None:
        return model, None
    adapter = add_adapter(model, config, source=source, revision=revision, seed=config.seed)
    return adapter.model, adapter


@dataclass(frozen=True)
class _Opened:
    """Data of a run, and how the student learns from it."""

    source: ExampleSource | DataMixture
    lens: LogitLens
    objective: Objective
    tails: dict[int, Tail]
    identity: dict[str, Any]
    teachings: Teachings | None = None


def _from_cache(config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> _Opened:
    (location,) = config.cache
    reader = CacheReader(config.cache_folder(location))
    matching = _match_for_loss(config, model, tokenizer, reader)
    objective = _objective_for(config, model, matching)
    if config.method != "sft":
        say(check_alignment(reader, is_allowed=ALIGNMENT in split_names(config.allow_mismatch)))
    identity = {
        "cache": reader.digest,
        "pairs": _pairs_and_shares(matching),
        "tail": matching.tail,
        "mismatches": list(matching.mismatches),
    }
    return _Opened(reader, matching.lens, objective, _tails_read(objective, matching), identity)


def _from_caches(config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> _Opened:
    caches = open_caches(config)
    matchings = match_each(caches, lambda reader: _match_for_loss(config, model, tokenizer, reader))
    teachings, identities = [], []
    for name, reader, weight, matching in zip(caches.names, caches.readers, caches.weights, matchings, strict=True):
        objective = _objective_for(config, model, matching)
        in_loss = 1.0 if caches.mix == "data" else weight
        teachings.append(Teaching(name, in_loss, objective, _tails_read(objective, matching)))
        pairs = _pairs_and_shares(matching)
        identities.append({"digest": reader.digest, "weight": weight, "pairs": pairs, "tail": matching.tail})
    check_teachings(caches, matchings, teachings)
    if config.method != "sft":
        for name, reader in zip(caches.names, caches.readers, strict=True):
            sentence = check_alignment(reader, is_allowed=ALIGNMENT in split_names(config.allow_mismatch))
            say(f"{name}: {sentence}")
    identity = {
        "caches": identities,
        "mix": caches.mix,
        "tail": "; ".join(f"{name}: {one.tail}" for name, one in zip(caches.names, matchings, strict=True)),
        "mismatches": [text for one in matchings for text in one.mismatches],
    }
    pairs = tuple(dict.fromkeys(pair for one in matchings for pair in one.pairs))
    # The layers that any teacher is matched at; each teaching has weights of its own.
    objective = replace(teachings[0].objective, pairs=pairs, shares=())
    each = Teachings(caches.mix, tuple(teachings))
    return _Opened(caches.source, matchings[0].lens, objective, {}, identity, each)


def _pairs_and_shares(matching: Matching) -> list[list[float]]:
    return [[*pair, share] for pair, share in zip(matching.pairs, matching.shares, strict=True)]


def _tails_read(objective: Objective, matching: Matching) -> dict[int, Tail]:
    return {layer: matching.tails[layer] for layer in objective.teacher_layers(matching.final_layer)}


def _objective_for(config: TrainConfig, model: PreTrainedModel, matching: Matching) -> Objective:
    objective = objective_of(config, matching.pairs, matching.shares)
    if not (objective.lens_trains_head or matching.lens.is_plain):
        raise ValueError(
            f"--lens-head-grad off needs a head that is a matrix, bare or under LoRA, and "
            f"{config.student} has a {type(model.get_output_embeddings()).__name__}: drop it"
        )
    return objective


def _from_rows(config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> _Opened:
    assert config.dataset is not None
    examples = load_configured(config, config.dataset, tokenizer)
    say(examples.report())
    lens = LogitLens(model, lens_norm="final", vocab_size=effective_vocab_size(model, tokenizer))
    return _Opened(
        TokenizedRows(examples.examples),
        lens,
        objective_of(config),
        {},
        {"dataset_digest": examples.digest},
    )


def _open_evaluation(
    config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Evaluation | None:
    if config.eval_cache is None:
        return None
    reader = CacheReader(config.cache_folder(config.eval_cache))
    # What is reported is forward KL and JSD, whatever the loss.
    return Evaluation(reader, _match(config, model, tokenizer, reader))


def _lens_of(opened: _Opened, evaluation: Evaluation | None) -> LogitLens:
    """The student's one lens: where the loss reads no lens layer, that of the held-out rows.

    ValueError where the loss and the held-out rows need different ones.
    """
    if evaluation is None:
        return opened.lens
    own, measured = opened.lens, evaluation.matching.lens
    compared = ("vocab_size", "lens_norm") if opened.objective.lens_pairs else ("vocab_size",)
    for name in compared:
        if getattr(own, name) != getattr(measured, name):
            raise ValueError(
                f"--eval-cache {evaluation.reader.folder} has {name} {getattr(measured, name)!r}, and what is trained "
                f"on has {getattr(own, name)!r}: cache the held-out rows as those"
            )
    return measured


def _match_for_loss(
    config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reader: CacheReader
) -> Matching:
    losses = {} if config.task == "ce" else {"task": config.task}
    reads_teacher = config.kd_ratio > 0 and (config.task != "ce" or config.lens_weight > 0)
    return _match(
        config,
        model,
        tokenizer,
        reader,
        lens_divergence=config.lens_divergence,
        reads_teacher=reads_teacher,
        **losses,
    )


def _match(
    config: TrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reader: CacheReader,
    **losses: Any,
) -> Matching:
    return match_student(
        model, tokenizer, reader, pairs=config.pairs, tail=config.tail, allow_mismatch=config.allow_mismatch, **losses
    )


def objective_of(config: TrainConfig, pairs: Pairs = (), shares: tuple[float, ...] = ()) -> Objective:
    """The objective that a config describes for some pairs."""
    final, lens = parse_gate(config.entropy_gate)
    return Objective(
        task=config.task,
        lens_divergence=config.lens_divergence,
        pairs=pairs,
        shares=shares,
        lens_weight=config.lens_weight,
        kd_ratio=config.kd_ratio,
        gate=Gate(final, lens),
        positions=Positions(config.positions_share, config.positions_by),
        lens_trains_head=config.lens_head_grad == "on",
    )

"""command: students measured by what they write (ROUGE-L) and by how close they are to a teacher's cache."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from distilllens import predictions as files
from distilllens.config import EvaluateConfig, save_config
from distilllens.data import Prompt
from distilllens.generate import Sampling, check_positions, end_tokens, generate
from distilllens.lens_samples import sample_lens, with_final, write_lens_samples
from distilllens.models import load_model, pick_device, require_kernel
from distilllens.predictions import EvaluationFolder, Key, Prediction, check_folder, write_json
from distilllens.reference_loss import sum_of_losses
from distilllens.results import (
    EvaluateResults,
    ModelScores,
    ReferenceLoss,
    WrittenText,
    references_score,
    results_table,
    rouge_score,
)
from distilllens.rouge import RougeL
from distilllens.subjects import (
    Subject,
    check_request,
    ends_of_references,
    evaluation_settings,
    open_subject,
    seeds_of,
)
from distilllens.teacher_forced import measured_student, score_against_cache
from distilllens.vocabulary import effective_vocab_size, require_matching_tokenizer
from distilllens_cache import CacheReader


def run_evaluate(config: EvaluateConfig) -> EvaluateResults:
    """Measure all models of ``config``; prints a table and keeps results.json and predictions.jsonl.

    A stopped evaluation continues where it was when it is started again with the same settings. Raises
    ValueError for whatever a user can have got wrong.
    """
    device = pick_device(config.device)
    is_16_bit = config.dtype != "float32"
    require_kernel(config.attn_implementation, device, is_16_bit=is_16_bit, flag="--dtype bfloat16")
    check_request(config)
    check_folder(config.output_dir)
    subjects = [open_subject(name, config) for name in config.model]
    settings = evaluation_settings(config, subjects, device)
    folder = EvaluationFolder(config.output_dir, settings, overwrite=config.overwrite)
    results = _finished(folder)
    if results is not None:
        _say(f"{folder.path} is finished, nothing was run again; --overwrite begins anew.")
    else:
        save_config(config, folder.path / files.RESOLVED)
        results = _measure(config, subjects, folder)
        write_json(folder.path / files.RESULTS, results.model_dump(mode="json"))
        _say(f"Results are in {folder.path / files.RESULTS}")
    _print(results)
    return results


def _finished(folder: EvaluationFolder) -> EvaluateResults | None:
    """Results of an earlier run with the same settings; none where they were damaged since."""
    content = folder.results()
    try:
        results = EvaluateResults.model_validate_json(content) if content is not None else None
    except ValidationError:
        _say(f"{folder.path / files.RESULTS} is damaged: it is made again from the predictions.")
        return None
    return results if results is not None and results.settings_digest == folder.digest else None


def _measure(config: EvaluateConfig, subjects: Sequence[Subject], folder: EvaluationFolder) -> EvaluateResults:
    plan = [
        [(subject.name, seed, row.id) for row in rows]
        for subject in subjects
        for seed in seeds_of(config)
        for rows in _batches(subject, config)
    ]
    done = folder.resume(plan)
    if done:
        _say(f"Continuing: {len(done)} of {sum(map(len, plan))} predictions are there")
    models = []
    for subject in subjects:
        models.append(_measure_model(config, subject, folder, [one for one in done if one.model == subject.name]))
    return EvaluateResults(
        settings=folder.settings, settings_digest=folder.digest, batch_size=config.batch_size, models=models
    )


def _measure_model(
    config: EvaluateConfig, subject: Subject, folder: EvaluationFolder, done: list[Prediction]
) -> ModelScores:
    model = load_model(
        subject.name,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        attn_implementation=config.attn_implementation,
    )
    require_matching_tokenizer(model, subject.tokenizer, subject.name)
    with _memory_explained(config):
        # What is quick and can still be refused comes before what takes hours.
        teacher_forced = _teacher_forced(config, subject, model, folder)
        references = _references(subject, model)
        predictions = [*done, *_write(config, subject, model, folder, {_key(one) for one in done})]
    if subject.prompts is None:
        return ModelScores(model=subject.name, teacher_forced=teacher_forced)
    return ModelScores(
        model=subject.name,
        num_rows=len(subject.rows),
        unusable=dict(subject.prompts.refused),
        written=_written(predictions, seeds_of(config)),
        references=references,
        teacher_forced=teacher_forced,
    )


def _teacher_forced(
    config: EvaluateConfig, subject: Subject, model: PreTrainedModel, folder: EvaluationFolder
) -> dict[str, float | None]:
    """Scores against the cache; of a single model, which a run is, also its lens beside the teacher's, in a file."""
    if config.cache is None:
        return {}
    reader = CacheReader(config.cache_folder(config.cache))
    choices = {"pairs": config.pairs, "tail": config.tail, "allow_mismatch": config.allow_mismatch}
    student, matching = measured_student(model, subject.tokenizer, reader, **choices)
    scores = score_against_cache(student, matching, reader, limit=config.limit)
    if len(config.model) == 1:
        pairs = with_final(matching)
        samples = sample_lens(student, reader, pairs=pairs, tails=matching.tails, device=model.device)
        write_lens_samples(folder.path, samples, step=None, pairs=pairs)
    return {name: value if abs(value) < float("inf") else None for name, value in scores.items()}


def _references(subject: Subject, model: PreTrainedModel) -> ReferenceLoss | None:
    if subject.examples is None:
        return None
    examples = subject.examples
    vocab_size = effective_vocab_size(model, subject.tokenizer)
    return references_score(
        sum_of_losses(model, examples.examples, vocab_size=vocab_size),
        num_targets=examples.num_targets,
        num_rows=len(examples.examples),
    )


def _write(
    config: EvaluateConfig, subject: Subject, model: PreTrainedModel, folder: EvaluationFolder, done: set[Key]
) -> list[Prediction]:
    """Generate and score what is not ``done`` yet, each batch kept on disk before the next."""
    if subject.prompts is None:
        return []
    sampling, rouge, predictions = _sampling(config), RougeL(), []
    ends = end_tokens(model, subject.tokenizer) | ends_of_references(subject)
    vocab_size = effective_vocab_size(model, subject.tokenizer)
    check_positions(model, subject.rows, sampling)
    num_rows = len(subject.rows) * len(seeds_of(config))
    with _progress(subject.name, num_rows, len(done)) as advance:
        for seed in seeds_of(config):
            for rows in _batches(subject, config):
                if (subject.name, seed, rows[0].id) in done:
                    continue
                written = generate(
                    model, subject.tokenizer, rows, sampling, seed=seed, vocab_size=vocab_size, ends=ends
                )
                batch = [
                    Prediction(
                        id=row.id,
                        model=subject.name,
                        seed=seed,
                        prompt=str(subject.tokenizer.decode(list(row.token_ids))),
                        references=row.references,
                        prediction=one.text,
                        rouge_l=rouge.score(one.text, row.references),
                        num_tokens=len(one.token_ids),
                        ended=one.ended,
                    )
                    for row, one in zip(rows, written, strict=True)
                ]
                folder.append(batch)
                predictions += batch
                advance(len(batch), sum(one.num_tokens for one in batch))
    return predictions


def _written(predictions: Sequence[Prediction], seeds: Sequence[int]) -> WrittenText:
    count = len(predictions)
    return WrittenText(
        num_predictions=count,
        rouge_l=rouge_score({seed: [one.rouge_l for one in predictions if one.seed == seed] for seed in seeds}),
        num_tokens=sum(one.num_tokens for one in predictions) / count,
        ended=sum(one.ended for one in predictions) / count,
    )


def _sampling(config: EvaluateConfig) -> Sampling:
    return Sampling(
        max_new_tokens=config.max_new_tokens,
        do_sample=config.do_sample,
        temperature=config.sampling_temperature,
        top_p=config.top_p,
        top_k=config.sampling_top_k,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
    )


def _batches(subject: Subject, config: EvaluateConfig) -> list[Sequence[Prompt]]:
    size = config.batch_size
    return [subject.rows[start : start + size] for start in range(0, len(subject.rows), size)]


def _key(prediction: Prediction) -> Key:
    return prediction.model, prediction.seed, prediction.id


@contextmanager
def _memory_explained(config: EvaluateConfig) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"out of GPU memory ({str(error).splitlines()[0]}). Lower --batch-size, now {config.batch_size}, "
            f"and run the same command again: it keeps the predictions that are there."
        ) from None


@contextmanager
def _progress(name: str, num_rows: int, num_done: int) -> Iterator[Any]:
    console = Console(stderr=True)
    started, tokens = time.monotonic(), 0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} answers  {task.fields[rate]:.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(name, total=num_rows, completed=num_done, rate=0.0)

        def advance(rows: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            bar.update(task, advance=rows, rate=tokens / max(time.monotonic() - started, 1e-9))

        yield advance


def _print(results: EvaluateResults) -> None:
    # Piped into a file there is no width to keep to.
    width = None if sys.stdout.isatty() else 48 + 32 * len(results.models)
    Console(width=width).print(results_table(results))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

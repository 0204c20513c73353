"""Sequence-level distillation (Kim and Rush 2016): the teacher writes the responses that its cache is made of."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilllens.config import CacheTeacherConfig
from distilllens.console import say
from distilllens.data import Examples, Prompts, examples_digest, make_example
from distilllens.free_space import space_for
from distilllens.generate import Generation, Sampling, end_tokens, generate
from distilllens.launch import is_distributed
from distilllens.predictions import append_lines, differing, settings_digest
from distilllens.text_file import write_text
from distilllens_cache import WriterLock, holding

ANEW = "Use --overwrite to begin anew, or another --output-dir."


class Response(BaseModel):
    """One line of the file after the first, which holds the settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    text: str
    """The response, special tokens left out."""
    token_ids: tuple[int, ...]
    """Its tokens, with the end token where the teacher wrote one."""
    ended: bool


def responses_file(output_dir: Path) -> Path:
    """Where the responses of the cache in ``output_dir`` are kept: beside it."""
    return output_dir.with_name(f"{output_dir.name}.generated.jsonl")


def generated_examples(
    config: CacheTeacherConfig,
    prompts: Prompts,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    teacher_digest: str,
    vocab_size: int,
    bytes_per_target: float,
) -> Examples:
    """The prompts, each with what the teacher writes after it; what is written already is read.

    A response is a function of teacher, prompt, settings and (seed, row id) alone. Before the teacher writes any:
    ValueError where the file is of other settings, or damaged, or where it is to be written by several ranks;
    `NoSpaceError` where not even one token a response has room in the cache; `CacheError` where another run is at work.
    """
    file = responses_file(config.folder)
    settings = _settings(config, prompts, teacher_digest)
    found = [] if config.overwrite else _read(file, settings, prompts)
    num_missing = len(prompts) - len(found)
    if not num_missing:
        return _examples(config, prompts, found)
    if is_distributed():
        raise ValueError(
            "--generate: one process writes the responses. Run the same command without the launcher until the teacher "
            "pass begins, then with it and without --overwrite"
        )
    if config.dry_run or config.repair:
        raise ValueError(
            f"{num_missing} of {len(prompts)} responses are still to be written to {file}: run the same command "
            f"without --{'dry-run' if config.dry_run else 'repair'} first"
        )
    num_targets = sum(len(response.token_ids) for response in found) + num_missing
    space_for(config.folder).require(round(num_targets * bytes_per_target))
    with holding(config.folder) as lock:
        found = [] if config.overwrite else _read(file, settings, prompts)  # another run may have been faster
        _write(file, config, prompts, found, settings, lock, model=model, tokenizer=tokenizer, vocab_size=vocab_size)
    return _examples(config, prompts, found)


def _write(
    file: Path,
    config: CacheTeacherConfig,
    prompts: Prompts,
    found: list[Response],
    settings: dict[str, Any],
    lock: WriterLock,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
) -> None:
    """Have the teacher write what ``found`` lacks, and add it there and to the file."""
    missing = prompts.prompts[len(found) :]
    say(f"The teacher writes {len(missing)} responses to {file}")
    _begin(file, settings, found)
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        do_sample=config.do_sample,
        temperature=config.sampling_temperature,
        top_p=config.sampling_top_p,
        top_k=config.sampling_top_k,
    )
    ends, size = end_tokens(model, tokenizer), config.generate_batch_size
    for start in range(0, len(missing), size):
        some = missing[start : start + size]
        written = generate(model, tokenizer, some, sampling, seed=config.seed, vocab_size=vocab_size, ends=ends)
        new = [_response(prompt.id, generation) for prompt, generation in zip(some, written, strict=True)]
        lock.require_held()
        append_lines(file, new)
        found += new
        say(f"{len(found)} of {len(prompts)} responses")


def _response(id: str, generation: Generation) -> Response:
    end = () if generation.end_id is None else (generation.end_id,)
    return Response(
        id=id, text=generation.text, token_ids=(*generation.token_ids, *end), ended=generation.end_id is not None
    )


def _examples(config: CacheTeacherConfig, prompts: Prompts, responses: list[Response]) -> Examples:
    loaded = Examples(prompts.dataset, prompts.layout, prompts.template, prompts.num_rows)
    loaded.refused, loaded.first_refused = prompts.refused, prompts.first_refused
    for prompt, response in zip(prompts.prompts, responses, strict=True):
        token_ids = (*prompt.token_ids, *response.token_ids)
        is_supervised = (False,) * len(prompt.token_ids) + (True,) * len(response.token_ids)
        example = make_example(prompt.id, token_ids[: config.max_length], is_supervised[: config.max_length])
        loaded.examples.append(example)
        loaded.num_truncated += len(token_ids) > config.max_length or not response.ended
    loaded.digest = examples_digest(loaded.examples)
    return loaded


def _settings(config: CacheTeacherConfig, prompts: Prompts, teacher_digest: str) -> dict[str, Any]:
    """All that decides the responses."""
    names = ("max_new_tokens", "do_sample", "sampling_temperature", "sampling_top_p", "sampling_top_k", "seed", "dtype")
    texts = json.dumps([[prompt.id, list(map(int, prompt.token_ids))] for prompt in prompts.prompts])
    return {
        **{name: getattr(config, name) for name in names},
        "teacher_digest": teacher_digest,
        "prompts_digest": hashlib.sha256(texts.encode()).hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _begin(file: Path, settings: dict[str, Any], found: list[Response]) -> None:
    """Write the settings and the responses that are kept; a line that was cut short is left out."""
    file.parent.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"settings": settings, "settings_digest": settings_digest(settings)})
    write_text(file, "".join(f"{line}\n" for line in (header, *(one.model_dump_json() for one in found))))


def _read(file: Path, settings: dict[str, Any], prompts: Prompts) -> list[Response]:
    """The responses that are there; a line that was cut short is none."""
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    lines = [line for line in lines if line.endswith(b"\n")]
    if not lines:
        return []
    try:
        there = json.loads(lines[0])["settings"]
        found = [Response.model_validate_json(line) for line in lines[1:]]
    except (ValueError, KeyError, TypeError, ValidationError):
        raise ValueError(f"{file} is no file of responses, or damaged. {ANEW}") from None
    if differences := differing(there, settings):
        raise ValueError(f"{file} holds responses of other settings:\n{differences}\n{ANEW}")
    if [response.id for response in found] != [prompt.id for prompt in prompts.prompts[: len(found)]]:
        raise ValueError(f"{file} holds responses of other rows. {ANEW}")
    return found

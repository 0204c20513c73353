"""What a model writes after each prompt: batched, and the same whatever the batch.

A row's sample is a function of the model, its prompt, the settings and (seed, row id) alone.
``model.generate`` draws all rows of a batch from one generator, so that a sample would depend on its
neighbours. Here each row has its own, and a token is drawn as ``argmax(log p - log E)`` with E
exponential, as ``torch.multinomial`` draws it. Two batch sizes give the same text up to rounding in the
model's own arithmetic.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from distilllens.data import Prompt
from distilllens.lens import execution_device


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults sample from the model as it is."""

    max_new_tokens: int = 512
    do_sample: bool = True
    """False: the likeliest token; then the temperature, top-p, top-k and the seed mean nothing."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: among all tokens."""
    no_repeat_ngram_size: int = 0
    """N-grams of this size occur once in prompt and answer together; 0: as often as the model likes."""


@dataclass(frozen=True)
class Generation:
    """What a model wrote after one prompt."""

    text: str
    """Decoded new tokens, special ones skipped."""
    token_ids: tuple[int, ...]
    """New tokens up to the end token, which is not among them."""
    end_id: int | None
    """The end token, where the model ended the text itself, before ``max_new_tokens``."""

    @property
    def ended(self) -> bool:
        """Whether the model ended the text itself."""
        return self.end_id is not None


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a text: the tokenizer's EOS, and those of the model's generation_config (end of turn)."""
    own: Any = getattr(model.generation_config, "eos_token_id", None)
    return frozenset({*_ids(tokenizer.eos_token_id), *_ids(own)})


def _ids(value: Any) -> list[int]:
    """transformers writes one id, several, or none in the same place."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [int(value)]


@torch.no_grad()  # no inference_mode: a model that is trained on must not keep tensors of it
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    seed: int,
    vocab_size: int,
    ends: frozenset[int],
) -> list[Generation]:
    """Continue all ``prompts`` as one batch. A row's samples are decided by its id and the seed.

    Only ids below ``vocab_size`` (the effective vocabulary) are ever written. Sampling defaults that a model
    brings along in its ``generation_config`` are not used: two models are compared under the same settings.

    Raises ValueError when a prompt and ``max_new_tokens`` do not fit the model's positions.
    """
    check_positions(model, prompts, sampling)
    width = max(len(prompt.token_ids) for prompt in prompts)
    padding = [width - len(prompt.token_ids) for prompt in prompts]
    # Padding is known by its place and never by its id: the id may be that of the end token.
    pad = next(iter([*_ids(tokenizer.pad_token_id), *sorted(ends)]), 0)
    rows = [[pad] * left + list(prompt.token_ids) for prompt, left in zip(prompts, padding, strict=True)]
    device = execution_device(model.get_input_embeddings())
    ids_BT = torch.tensor(rows)
    mask_BT = torch.arange(width) >= torch.tensor(padding)[:, None]
    with _without_own_defaults(model):
        output_BT = model.generate(  # pyright: ignore[reportCallIssue]
            ids_BT.to(device),
            attention_mask=mask_BT.long().to(device),
            logits_processor=_processors(prompts, padding, sampling, seed, vocab_size),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,  # the last processor has drawn already
                eos_token_id=sorted(ends) or None,
                pad_token_id=pad,
            ),
        )
    return [_ending(row, ends, tokenizer) for row in output_BT[:, width:].tolist()]


def check_positions(model: PreTrainedModel, prompts: Sequence[Prompt], sampling: Sampling) -> None:
    """Raise ValueError when the longest prompt with all its new tokens does not fit the model's positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if limit is not None and longest + sampling.max_new_tokens > limit:
        raise ValueError(
            f"the longest prompt has {longest} tokens, and with {sampling.max_new_tokens} new ones they "
            f"exceed the {limit} positions of the model. Lower --max-new-tokens or --max-prompt-length."
        )


def row_generator(seed: int, row: str, device: torch.device) -> torch.Generator:
    """The random numbers of one row under one seed."""
    digest = hashlib.sha256(f"{seed}\n{row}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _processors(
    prompts: Sequence[Prompt],
    padding: Sequence[int],
    sampling: Sampling,
    seed: int,
    vocab_size: int,
) -> LogitsProcessorList:
    processors = LogitsProcessorList([_KnownTokensOnly(vocab_size)])
    if sampling.no_repeat_ngram_size > 0:
        processors.append(_NoRepeatNGram(sampling.no_repeat_ngram_size, padding))
    if not sampling.do_sample:
        return processors
    # Order and conditions of transformers' own sampling.
    if sampling.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        processors.append(TopPLogitsWarper(sampling.top_p))
    processors.append(_Draw(seed, [prompt.id for prompt in prompts]))
    return processors


class _KnownTokensOnly(LogitsProcessor):
    """Heads are padded with rows that stand for no token."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        scores[:, self._vocab_size :] = -torch.inf
        return scores


class _NoRepeatNGram(LogitsProcessor):
    """transformers' processor, a row at a time without its padding: that would count as text."""

    def __init__(self, size: int, padding: Sequence[int]) -> None:
        self._processor = NoRepeatNGramLogitsProcessor(size)
        self._padding = padding

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        rows = [
            self._processor(ids[None, left:], row[None])  # pyright: ignore[reportArgumentType]
            for ids, row, left in zip(input_ids, scores, self._padding, strict=True)
        ]
        return torch.cat(rows)


class _Draw(LogitsProcessor):
    """Perturbs scores so that the largest is a sample, each row with its own random numbers."""

    def __init__(self, seed: int, rows: Sequence[str]) -> None:
        self._seed, self._rows = seed, rows
        self._generators: list[torch.Generator] = []

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        # Of the scores' own device, which is the head's: a model may be spread over several.
        self._generators = self._generators or [row_generator(self._seed, row, scores.device) for row in self._rows]
        noise_BV = torch.empty_like(scores)
        for row, generator in zip(noise_BV, self._generators, strict=True):
            row.exponential_(generator=generator)
        # An exponential that rounds to 0 must not lift a forbidden token (-inf) to NaN.
        return scores - noise_BV.clamp_min(torch.finfo(noise_BV.dtype).tiny).log()


@contextmanager
def _without_own_defaults(model: PreTrainedModel) -> Iterator[None]:
    """``generate`` takes what it isn't told (a repetition penalty) from the model's generation_config."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _ending(new_ids: list[int], ends: frozenset[int], tokenizer: PreTrainedTokenizerBase) -> Generation:
    end = next((position for position, token in enumerate(new_ids) if token in ends), None)
    kept = new_ids[:end]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    assert isinstance(text, str)
    return Generation(text=text, token_ids=tuple(kept), end_id=None if end is None else new_ids[end])

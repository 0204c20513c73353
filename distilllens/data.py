"""Rows of a dataset -> tokenized examples, each with the mask of its targets and a digest."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import PurePath
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from distilllens.config import DatasetConfig
from distilllens.encoder import Encoder, tokenize
from distilllens.records import ColumnNames, Layout, Reason, Unusable
from distilllens.rows import Rows, open_rows
from distilllens.template import Rendered, Template, resolve_template
from distilllens_cache import example_digest

ROWS_AT_A_TIME = 256
"""Rows rendered and tokenized together: the tokenizer works on their texts in parallel."""


@dataclass(frozen=True, slots=True)
class Example:
    """L tokens. ``is_target[t]``: position t predicts token t+1, which is supervised. The last never is.

    Plain tuples, which compare and hash; the integers are shared between the examples of one dataset, so that
    a token costs 16 bytes.
    """

    id: str
    token_ids: tuple[int, ...]
    is_target: tuple[bool, ...]
    digest: str
    """SHA-256 over token ids and mask, see ``distilllens_cache.example_digest``."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_targets(self) -> int:
        return sum(self.is_target)

    @property
    def target_positions(self) -> tuple[int, ...]:
        return _positions(self.is_target)


def shifted_mask(is_supervised: Sequence[bool]) -> tuple[bool, ...]:
    """Which positions predict a supervised token: the mask of tokens, moved one to the left.

    The only place where this shift is made. Nothing predicts the first token, and the last position predicts
    nothing.
    """
    return (*is_supervised[1:], False) if is_supervised else ()


def make_example(id: str, token_ids: Sequence[int], is_supervised: Sequence[bool]) -> Example:
    """The example of these tokens, of which some are to be learnt."""
    assert len(token_ids) == len(is_supervised)
    is_target = shifted_mask(is_supervised)
    return Example(id, tuple(token_ids), is_target, example_digest(token_ids, _positions(is_target)))


def _positions(is_target: Sequence[bool]) -> tuple[int, ...]:
    return tuple(position for position, target in enumerate(is_target) if target)


@dataclass
class Loaded:
    """What became of the rows of a dataset: how they were read, and which are not used."""

    dataset: str
    layout: str
    """Columns that were read, such as "prompt, completion"."""
    template: Template
    num_rows: int
    refused: Counter[str] = field(default_factory=Counter)
    """Rows that are not used, by reason."""
    first_refused: dict[str, str] = field(default_factory=dict)
    """The first row refused for each reason."""

    def refuse(self, id: str, why: Unusable) -> None:
        """Counts a row that is not used."""
        self.refused[str(why.reason)] += 1
        self.first_refused.setdefault(str(why.reason), f"row {id}" + (f", {why.detail}" if why.detail else ""))

    def report(self) -> str:
        """One sentence per reason why rows are not used, one a line; empty where all are."""
        return "\n".join(
            f"{count} of {self.num_rows} rows are not used: {reason} (first: {self.first_refused[reason]})."
            for reason, count in self.refused.most_common()
        )

    def check_usable(self, num_usable: int) -> None:
        """ValueError, with all reasons, where no row is left."""
        if num_usable == 0:
            how = f"columns {self.layout}; template {self.template.name}"
            raise ValueError(f"{self.dataset}: no row can be used ({how}).\n{self.report()}")


@dataclass
class Examples(Loaded):
    """The examples of a dataset, in its order."""

    examples: list[Example] = field(default_factory=list)
    num_truncated: int = 0
    """Examples whose end was cut off to fit the limit."""
    num_endless: int = 0
    """Examples that do not end with an end token, though nothing was cut off."""
    digest: str = ""
    """SHA-256 over the examples' digests, in order."""

    @property
    def num_tokens(self) -> int:
        return sum(example.num_tokens for example in self.examples)

    @property
    def num_targets(self) -> int:
        return sum(example.num_targets for example in self.examples)

    @property
    def largest_token_id(self) -> int:
        """To be compared with a model's vocabulary."""
        return max(max(example.token_ids) for example in self.examples)

    def report(self) -> str:
        """One sentence per reason why rows are not used or not whole, one a line; empty where all are."""
        lines = [Loaded.report(self)] if self.refused else []
        if self.num_truncated:
            lines.append(f"{self.num_truncated} of {self.num_rows} rows are cut off at the longest length.")
        if self.num_endless:
            lines.append(
                f"{self.num_endless} of {self.num_rows} rows do not end with an end token, because the "
                f"template writes none: a student will not learn to stop."
            )
        return "\n".join(lines)


class Prompt(NamedTuple):
    """What a model is given to continue, and the texts it is compared with."""

    id: str
    token_ids: tuple[int, ...]
    references: list[str]


@dataclass
class Prompts(Loaded):
    """The prompts of a dataset, in its order; iterating gives ``(id, token_ids, references)``."""

    prompts: list[Prompt] = field(default_factory=list)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    def __len__(self) -> int:
        return len(self.prompts)


def load_examples(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "auto",
    columns: ColumnNames | None = None,
    max_length: int = 512,
    max_prompt_length: int | None = None,
    limit: int | None = None,
    split: str | None = None,
    revision: str | None = None,
) -> Examples:
    """The first ``limit`` rows of a dataset as examples of at most ``max_length`` tokens.

    A longer example loses its end: its first tokens and their targets are exactly those of the whole. A row
    whose prompt has more than ``max_prompt_length`` tokens, special tokens included, is not used, nor is one
    that leaves no target; both are counted by reason. Raises ValueError where the dataset or the template
    cannot be read, and where no row is left.
    """
    rows, layout, resolved = _open(dataset, tokenizer, template, columns, limit, split, revision)
    if layout.is_text and template not in ("auto", "none"):
        raise ValueError(
            f"{dataset} is plain text (column {layout.names['text']}), without the prompt and response that "
            f"template {template} puts together: use --template none, or name other columns"
        )
    encoder = Encoder(tokenizer)
    loaded = Examples(dataset, str(layout), resolved, len(rows))
    for id, rendered, tokens in _rendered(rows, layout, encoder, loaded, prompts_only=False):
        try:
            token_ids, is_supervised = tokenize(rendered, tokens, encoder)
            if not rendered.is_text:
                _check_prompt(is_supervised.index(True), max_prompt_length, max_length)
            example = make_example(id, encoder.shared(token_ids[:max_length]), is_supervised[:max_length])
            if not example.num_targets:
                raise Unusable(Reason.NO_TARGET, f"within {max_length} tokens")
        except Unusable as why:
            loaded.refuse(id, why)
            continue
        loaded.examples.append(example)
        loaded.num_truncated += len(token_ids) > max_length
        loaded.num_endless += len(token_ids) <= max_length and token_ids[-1] not in encoder.ends
    loaded.check_usable(len(loaded.examples))
    loaded.digest = examples_digest(loaded.examples)
    return loaded


def load_configured(config: DatasetConfig, dataset: str, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """``load_examples`` of ``dataset`` with the template, columns and limits of a run."""
    return load_examples(dataset, tokenizer, max_length=config.max_length, **row_settings(config))


def row_settings(config: DatasetConfig) -> dict[str, Any]:
    """How a run reads rows, as ``load_examples`` and ``prompt_and_references`` take it."""
    return {
        "template": config.template,
        "columns": ColumnNames(**config.columns()),
        "max_prompt_length": config.max_prompt_length,
        "limit": config.limit,
        "split": config.split,
        "revision": config.dataset_revision,
    }


def examples_digest(examples: Iterable[Example]) -> str:
    """SHA-256 over the digests of examples, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(bytes.fromhex(example.digest))
    return digest.hexdigest()


def with_rows_after(first: Examples, more: Examples) -> Examples:
    """The examples of two datasets, one after the other, as those of the first.

    Where an id of the second occurs in the first, all of the second get the dataset's name in front.
    """
    taken = {example.id for example in first.examples}
    after = more.examples
    if any(example.id in taken for example in after):
        name = PurePath(more.dataset).name
        after = [replace(example, id=f"{name}:{example.id}") for example in after]
    examples = [*first.examples, *after]
    return replace(
        first,
        num_rows=first.num_rows + more.num_rows,
        refused=first.refused + more.refused,
        first_refused=more.first_refused | first.first_refused,
        examples=examples,
        num_truncated=first.num_truncated + more.num_truncated,
        num_endless=first.num_endless + more.num_endless,
        digest=examples_digest(examples),
    )


def load_prompts(config: DatasetConfig, dataset: str, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """``prompt_and_references`` of ``dataset`` with the template, columns and limits of a run."""
    return prompt_and_references(dataset, tokenizer, max_length=config.max_length, **row_settings(config))


def prompt_and_references(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "auto",
    columns: ColumnNames | None = None,
    max_prompt_length: int | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    split: str | None = None,
    revision: str | None = None,
) -> Prompts:
    """The first ``limit`` rows of a dataset as prompts: the very tokens that come before the last response in
    ``load_examples``, with all references of that response. Prompts that leave no room in ``max_length`` are not used.

    Raises ValueError as ``load_examples`` does, and for plain text, which has no prompts.
    """
    rows, layout, resolved = _open(dataset, tokenizer, template, columns, limit, split, revision)
    if layout.is_text:
        raise ValueError(
            f"{dataset} is plain text (column {layout.names['text']}), without prompts and references: "
            f"give rows with messages, prompt and completion, or instruction and output"
        )
    encoder = Encoder(tokenizer)
    loaded = Prompts(dataset, str(layout), resolved, len(rows))
    for id, rendered, tokens in _rendered(rows, layout, encoder, loaded, prompts_only=True):
        try:
            token_ids = tokens[rendered.prompt]
            if not rendered.has_specials:
                token_ids = encoder.begin(token_ids)
            _check_prompt(len(token_ids), max_prompt_length, max_length)
            if not token_ids:
                raise Unusable(Reason.EMPTY_PROMPT)
            if not rendered.references[0].strip():
                raise Unusable(Reason.EMPTY_RESPONSE)
        except Unusable as why:
            loaded.refuse(id, why)
            continue
        loaded.prompts.append(Prompt(id, tuple(encoder.shared(token_ids)), list(rendered.references)))
    loaded.check_usable(len(loaded.prompts))
    return loaded


def _open(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    columns: ColumnNames | None,
    limit: int | None,
    split: str | None,
    revision: str | None,
) -> tuple[Rows, Layout, Template]:
    resolved = resolve_template(template, tokenizer)
    rows = open_rows(dataset, split=split, revision=revision, limit=limit)
    return rows, (columns or ColumnNames()).recognise(rows.columns, dataset=dataset), resolved


def _rendered(
    rows: Rows, layout: Layout, encoder: Encoder, loaded: Loaded, *, prompts_only: bool
) -> Iterator[tuple[str, Rendered, Mapping[str, list[int]]]]:
    """Each row that has a text, with the token ids of that text and of the beginnings that matter."""
    iterator = iter(rows)
    while chunk := list(islice(iterator, ROWS_AT_A_TIME)):
        rendered: list[tuple[str, Rendered]] = []
        for id, row in chunk:
            try:
                rendered.append((id, loaded.template.render(layout.read(row))))
            except Unusable as why:
                loaded.refuse(id, why)
        tokens = encoder.encode(
            text for _, one in rendered for text in ((one.prompt,) if prompts_only else one.beginnings)
        )
        for id, one in rendered:
            yield id, one, tokens


def _check_prompt(num_tokens: int, max_prompt_length: int | None, max_length: int | None) -> None:
    if max_prompt_length is not None and num_tokens > max_prompt_length:
        raise Unusable(Reason.LONG_PROMPT, f"{num_tokens} tokens, at most {max_prompt_length} are allowed")
    if max_length is not None and num_tokens >= max_length:
        raise Unusable(Reason.LONG_PROMPT, f"{num_tokens} tokens leave no room in {max_length} tokens")

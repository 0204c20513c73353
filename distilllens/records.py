"""What a row says, whatever its columns are called: text, an instruction with its response, or a chat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

Message = dict[str, Any]


class Reason(StrEnum):
    """Why a row is not used."""

    EMPTY_RESPONSE = "empty response"
    EMPTY_TEXT = "empty text"
    EMPTY_PROMPT = "empty prompt"
    LONG_PROMPT = "prompt over the limit"
    NOT_STRINGS = "cells that are not strings"
    NOT_UNICODE = "text that is not valid Unicode"
    NOT_MESSAGES = "messages that are not a list of role and content"
    NO_RESPONSE = "no assistant turn"
    STARTS_WITH_RESPONSE = "starts with an assistant turn"
    NEEDS_CHAT_TEMPLATE = "several turns or a system prompt, without a chat template"
    TEMPLATE_REFUSES = "template refuses the messages"
    NOT_PREFIX = "template does not keep prefixes"
    NO_TARGET = "nothing to predict"
    ONE_TOKEN = "text of one token"


class Unusable(Exception):
    """This row cannot be used, for a reason that is counted."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text: every token after the first is a target."""

    text: str


@dataclass(frozen=True, slots=True)
class Exchange:
    """One instruction and its response; the first of ``references`` is the one to learn."""

    instruction: str
    input: str
    references: tuple[str, ...]
    separator: str = "\n\n"
    """What the template "none" puts between prompt and response."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages; the assistant turns from ``first_response`` on are to be learnt."""

    messages: tuple[Message, ...]
    first_response: int = 0


Record = Text | Exchange | Chat


@dataclass(frozen=True)
class ColumnNames:
    """Columns by the names a dataset gives them. None: recognised by the usual name."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    text: str | None = None

    def recognise(self, columns: Sequence[str], *, dataset: str) -> "Layout":
        """How the rows of a dataset with these columns are read; ValueError where they are not understood."""
        given = {field.name: name for field in fields(self) if (name := getattr(self, field.name))}
        found = ", ".join(columns) or "(none)"
        if missing := sorted(set(given.values()) - set(columns)):
            raise ValueError(f"{dataset} has no column {', '.join(missing)}: found {found}")
        for required, optional in LAYOUTS:
            if not given.keys() <= {*required, *optional}:
                continue
            names = {key: _find(key, given, columns) for key in (*required, *optional)}
            if all(names[key] for key in required):
                return Layout({key: name for key, name in names.items() if name})
        named = f" with {', '.join(f'{key}={name}' for key, name in given.items())}" if given else ""
        raise ValueError(
            f"{dataset} has the columns {found}{named}: expected "
            f"messages, or prompt and completion, or instruction, input (optional) and output, or text. "
            f"Name the columns with --messages-column, --prompt-column, --completion-column, "
            f"--instruction-column, --input-column, --output-column or --text-column."
        )


LAYOUTS = (
    (("messages",), ()),
    (("prompt", "completion"), ()),
    (("instruction", "output"), ("input",)),
    (("text",), ()),
)
"""Required and optional columns, the most telling first: Alpaca's ``text`` is a rendering of the others."""

USUAL_NAMES = {"input": ("input", "context"), "output": ("output", "response")}
"""Dolly's own names beside Alpaca's: a context that is silently left out would change what is learnt."""


def _find(key: str, given: Mapping[str, str], columns: Sequence[str]) -> str | None:
    if key in given:
        return given[key]
    return next((name for name in USUAL_NAMES.get(key, (key,)) if name in columns), None)


@dataclass(frozen=True)
class Layout:
    """Which column holds what; reads a row into what it says. Other columns are not read."""

    names: Mapping[str, str]

    def __str__(self) -> str:
        return ", ".join(key if key == name else f"{key} (column {name})" for key, name in self.names.items())

    @property
    def is_text(self) -> bool:
        """Whether rows are plain text, without prompt and response."""
        return "text" in self.names

    def read(self, row: Mapping[str, Any]) -> Record:
        """What ``row`` says; raises ``Unusable``."""
        cells = {key: row.get(name) for key, name in self.names.items()}
        if "text" in cells:
            text = _text(cells["text"], self.names["text"])
            if not text.strip():
                raise Unusable(Reason.EMPTY_TEXT)
            return Text(text)
        if "messages" in cells:
            return _chat(_messages(cells["messages"], self.names["messages"]))
        if "prompt" in cells and (isinstance(cells["prompt"], list) or isinstance(cells["completion"], list)):
            prompt = _conversation(cells["prompt"], self.names["prompt"], role="user")
            completion = _conversation(cells["completion"], self.names["completion"], role="assistant")
            return _chat(prompt + completion, first_response=len(prompt))
        asked, answered = ("prompt", "completion") if "prompt" in cells else ("instruction", "output")
        context = cells.get("input")
        return Exchange(
            instruction=_text(cells[asked], self.names[asked]),
            input="" if context is None else _text(context, self.names["input"]),
            references=references_of(cells[answered], self.names[answered]),
            separator="" if asked == "prompt" else "\n\n",  # a prompt is as it is; an instruction just stops
        )


def _text(cell: Any, column: str) -> str:
    if not isinstance(cell, str):
        raise Unusable(Reason.NOT_STRINGS, f"column {column} holds {_kind(cell)}")
    try:
        cell.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write and no tokenizer can read
        raise Unusable(Reason.NOT_UNICODE, f"column {column} holds half of a surrogate pair") from None
    return cell


def _kind(cell: Any) -> str:
    return "nothing" if cell is None else f"a {type(cell).__name__}"


def references_of(cell: Any, column: str) -> tuple[str, ...]:
    """The reference texts in a cell: one text, or a list of them whose first is the one to learn."""
    references = tuple(_text(item, column) for item in (cell if isinstance(cell, list) else [cell]))
    if not references or not references[0].strip():
        raise Unusable(Reason.EMPTY_RESPONSE)
    return references


def _conversation(cell: Any, column: str, *, role: str) -> tuple[Message, ...]:
    if isinstance(cell, list):
        return _messages(cell, column)
    return ({"role": role, "content": _text(cell, column)},)


def _messages(cell: Any, column: str) -> tuple[Message, ...]:
    if not isinstance(cell, list) or not all(isinstance(message, dict) for message in cell):
        raise Unusable(Reason.NOT_MESSAGES, f"column {column} holds {_kind(cell)}")
    messages = []
    for given in cell:
        # Parquet fills keys that only some messages have with nulls, JSONL does not: they must render alike.
        message = {key: value for key, value in given.items() if value is not None}
        if not isinstance(message.get("role"), str):
            raise Unusable(Reason.NOT_MESSAGES, f"column {column} has a message without a role")
        if "content" in message or not message.get("tool_calls"):
            message["content"] = _text(message.get("content"), f"{column}, content of {message['role']}")
        messages.append(message)
    return tuple(messages)


def _chat(messages: tuple[Message, ...], first_response: int = 0) -> Chat:
    """A chat that ends with its last response: what comes after it is not needed to predict anything."""
    responses = [i for i in range(first_response, len(messages)) if messages[i]["role"] == "assistant"]
    if not responses:
        raise Unusable(Reason.NO_RESPONSE)
    for i in responses:
        if not messages[i].get("content", "").strip() and not messages[i].get("tool_calls"):
            raise Unusable(Reason.EMPTY_RESPONSE)
    return Chat(messages[: responses[-1] + 1], first_response)

"""The text that a row becomes: a chat template, Alpaca's wording, or nothing around prompt and response."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from distilllens.records import (
    Chat,
    ColumnNames,
    Exchange,
    Message,
    Reason,
    Record,
    Text,
    Unusable,
    references_of,
)

__all__ = ["ColumnNames", "Reason", "Rendered", "Template", "Unusable", "resolve_template"]

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""The wording of Stanford Alpaca, which MiniLLM's and DistillLens' released recipes use."""

FIXED_TODAY = """{%- macro strftime_now(format) -%}
{{ format | replace("%d", "26") | replace("%e", "26") | replace("%m", "07") | replace("%b", "Jul")
 | replace("%B", "July") | replace("%Y", "2024") | replace("%y", "24") | replace("%a", "Fri")
 | replace("%A", "Friday") | replace("%H", "00") | replace("%I", "12") | replace("%M", "00")
 | replace("%S", "00") | replace("%p", "AM") }}
{%- endmacro %}

"""
"""Some templates (Llama 3, SmolLM3) write today's date into the system prompt. A cache begun today and
resumed tomorrow would hold other tokens, so the date is the one Llama 3.1 falls back on, 26 Jul 2024."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of an example and which parts of it are responses.

    Each response is ``(before, upto)``: the text in front of it and the text up to its end, both beginnings
    of ``whole``. ``has_specials``: the template wrote the special tokens itself, so that none is added.
    """

    whole: str
    responses: tuple[tuple[str, str], ...]
    references: tuple[str, ...]
    has_specials: bool

    @property
    def beginnings(self) -> tuple[str, ...]:
        """The texts whose tokens are needed: the whole, and where each response starts and ends."""
        return (self.whole, *(text for response in self.responses for text in response))

    @property
    def is_text(self) -> bool:
        """Whether this is plain text, without prompt and response."""
        return not self.references

    @property
    def prompt(self) -> str:
        """What a model is given to write the last response."""
        return self.responses[-1][0]


@dataclass(frozen=True)
class Template:
    """The text around prompt and response; made by ``resolve_template``."""

    name: str
    """"chat template of the tokenizer", "alpaca", "none", or the path of a Jinja file."""
    kind: Literal["chat", "alpaca", "none"]
    source: str
    """Jinja of a chat template; the wording of the others."""
    tokenizer: PreTrainedTokenizerBase

    @property
    def digest(self) -> str:
        """SHA-256 of what decides the text; two paths with one content have one digest."""
        return hashlib.sha256(f"{self.kind}\n{self.source}".encode()).hexdigest()

    @property
    def preamble(self) -> str:
        """Jinja that goes before a template that asks for today's date."""
        return FIXED_TODAY if "strftime_now" in self.source else ""

    def render(self, record: Record) -> Rendered:
        """The text of ``record``; raises ``Unusable``."""
        if isinstance(record, Text):
            return Rendered(record.text, (("", record.text),), (), has_specials=False)
        if self.kind == "chat":
            return self._render_chat(record)
        exchange = _as_exchange(record) if isinstance(record, Chat) else record
        prompt = _alpaca(exchange) if self.kind == "alpaca" else _joined(exchange) + exchange.separator
        whole = prompt + exchange.references[0]
        return Rendered(whole, ((prompt, whole),), exchange.references, has_specials=False)

    def _render_chat(self, record: Exchange | Chat) -> Rendered:
        chat = _as_chat(record) if isinstance(record, Exchange) else record
        turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        responses = []
        for i in turns:
            if i < chat.first_response:
                continue
            if i == 0:
                raise Unusable(Reason.STARTS_WITH_RESPONSE)
            before = self.write(chat.messages[:i], add_generation_prompt=True)
            responses.append((before, self.write(chat.messages[: i + 1])))
        whole = responses[-1][1]
        if not all(whole.startswith(part) for response in responses for part in response):
            raise Unusable(Reason.NOT_PREFIX)
        if isinstance(record, Exchange):
            return Rendered(whole, tuple(responses), record.references, has_specials=True)
        return Rendered(whole, tuple(responses), (chat.messages[-1].get("content", ""),), has_specials=True)

    def write(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of ``messages`` in a chat template; raises ``Unusable`` where the template objects."""
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.preamble + self.source,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except TemplateSyntaxError:
            raise
        except (TemplateError, TypeError) as error:
            raise Unusable(Reason.TEMPLATE_REFUSES, str(error).partition("\n")[0]) from None
        assert isinstance(text, str)
        return text


def _alpaca(exchange: Exchange) -> str:
    wording = ALPACA_WITH_INPUT if exchange.input.strip() else ALPACA
    # Not str.format twice: an instruction may hold braces.
    return wording.format(instruction=exchange.instruction, input=exchange.input)


def _joined(exchange: Exchange) -> str:
    """Instruction and input as one text."""
    return f"{exchange.instruction}\n\n{exchange.input}" if exchange.input.strip() else exchange.instruction


def _as_chat(exchange: Exchange) -> Chat:
    asked = {"role": "user", "content": _joined(exchange)}
    return Chat((asked, {"role": "assistant", "content": exchange.references[0]}))


def _as_exchange(chat: Chat) -> Exchange:
    if [message["role"] for message in chat.messages] != ["user", "assistant"]:
        raise Unusable(Reason.NEEDS_CHAT_TEMPLATE)
    asked, answered = (message.get("content", "") for message in chat.messages)
    return Exchange(asked, "", references_of(answered, "messages"))


def resolve_template(template: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template called ``auto``, ``alpaca`` or ``none``, or the one in a Jinja file.

    ``auto`` is the tokenizer's chat template where it has one, else alpaca. ``none`` writes prompt and
    response one after the other, and separates an instruction from its response by a blank line. Plain text
    looks the same in every template. Raises ValueError for a file that is missing or is no chat template.
    """
    if template == "alpaca" or (template == "auto" and not tokenizer.chat_template):
        return Template("alpaca", "alpaca", f"{ALPACA}\n{ALPACA_WITH_INPUT}", tokenizer)
    if template == "none":
        return Template("none", "none", "{instruction}\n\n{input}\n\n{output}", tokenizer)
    if template == "auto":
        found = Template("chat template of the tokenizer", "chat", tokenizer.get_chat_template(), tokenizer)
        _probe(found)
        return found
    path = Path(template).expanduser()
    if not path.is_file():
        raise ValueError(f"template {template!r} is not auto, alpaca or none, and no Jinja file has that name")
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: --template takes a Jinja chat template") from None
    found = Template(str(path), "chat", source, tokenizer)
    written = _probe(found)
    if written is not None and PROBE not in written:
        raise ValueError(
            f"{path} writes nothing of what a message says: a chat template loops over `messages`, "
            f"as in {{% for message in messages %}}{{{{ message.content }}}}{{% endfor %}}"
        )
    return found


PROBE = "distilllens asks"


def _probe(template: Template) -> str | None:
    """One question in this template, None where it wants more than that; ValueError where it isn't Jinja."""
    try:
        return template.write([{"role": "user", "content": PROBE}], add_generation_prompt=True)
    except TemplateSyntaxError as error:
        line = error.lineno - template.preamble.count("\n")
        raise ValueError(f"{template.name}, line {line}: not Jinja ({error.message})") from None
    except Unusable:
        return None

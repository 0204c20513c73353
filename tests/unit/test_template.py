"""Columns are recognised or named, rows read or refused for a reason, and templates write the right text."""

from pathlib import Path

import pytest

from distilllens.records import Chat, Exchange, Text, Unusable
from distilllens.template import ColumnNames, Rendered, resolve_template

LLAMA_3 = (
    "{{- bos_token }}{%- if not date_string is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{- '<|im_start|>system\nToday Date: ' + date_string + '<|im_end|>' }}"
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim"
    " + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
STRICT = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant\nand so on') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST]' + message['content'] + '[/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def recognise(*columns: str, **names: str):
    return ColumnNames(**names).recognise(columns, dataset="rows.jsonl")


def read(row: dict, **names: str):
    return recognise(*row, **names).read(row)


def refusal(row: dict, **names: str) -> str:
    with pytest.raises(Unusable) as caught:
        read(row, **names)
    return str(caught.value.reason)


# Columns


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("messages",), "messages"),
        (("prompt", "completion"), "prompt, completion"),
        (("instruction", "input", "output"), "instruction, output, input"),
        (("output", "instruction"), "instruction, output"),
        (
            ("instruction", "context", "response", "category"),
            "instruction, output (column response), input (column context)",
        ),
        (("text",), "text"),
        (("instruction", "input", "output", "text"), "instruction, output, input"),
        (("prompt", "prompt_id", "messages"), "messages"),
        (("prompt", "text"), "text"),
    ],
)
def test_the_usual_columns_are_recognised(columns: tuple[str, ...], expected: str) -> None:
    assert str(recognise(*columns)) == expected


def test_unknown_columns_are_listed_beside_the_accepted_ones() -> None:
    with pytest.raises(
        ValueError, match=r"rows.jsonl has the columns question, answer: expected messages, or prompt and"
    ) as caught:
        recognise("question", "answer")
    assert "instruction, input (optional) and output, or text" in str(caught.value)
    assert "--output-column" in str(caught.value)


def test_named_columns_win_over_recognised_ones() -> None:
    assert read({"text": "no", "body": "yes"}, text="body") == Text("yes")
    row = {"question": "Why?", "answer": "So.", "messages": []}
    assert read(row, instruction="question", output="answer") == Exchange("Why?", "", ("So.",))
    assert read({"instruction": "Why?", "reply": "So."}, output="reply") == Exchange("Why?", "", ("So.",))


def test_a_named_column_that_is_not_there_is_an_error_with_the_columns_found() -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl has no column body: found text, title"):
        recognise("text", "title", text="body")


def test_named_columns_of_two_formats_are_an_error() -> None:
    with pytest.raises(ValueError, match="with prompt=a, output=b"):
        recognise("a", "b", prompt="a", output="b")


# What a row says


def test_an_exchange_has_its_input_and_all_its_references() -> None:
    row = {"instruction": "Why?", "input": "ctx", "output": ["So.", "Thus."]}
    assert read(row) == Exchange("Why?", "ctx", ("So.", "Thus."))
    assert read(row | {"input": None, "output": "So."}) == Exchange("Why?", "", ("So.",))


def test_a_prompt_and_a_completion_may_be_lists_of_messages() -> None:
    ask, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert read({"prompt": [*earlier, ask], "completion": [answer]}) == Chat((*earlier, ask, answer), 3)
    assert read({"prompt": [ask], "completion": "So."}) == Chat((ask, answer), 1)


def test_messages_end_with_the_last_response_and_lose_their_nulls() -> None:
    chat = [
        {"role": "user", "content": "Why?", "tool_calls": None, "name": None},
        {"role": "assistant", "content": "So.", "tool_calls": None},
        {"role": "user", "content": "Thanks"},
    ]
    expected = ({"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."})
    assert read({"messages": chat}) == Chat(expected)


USER = {"role": "user", "content": "Why?"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "Why?", "output": ""}, "empty response"),
        ({"instruction": "Why?", "output": " \n\t"}, "empty response"),
        ({"instruction": "Why?", "output": []}, "empty response"),
        ({"prompt": "Why?", "completion": ""}, "empty response"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "empty response"),
        ({"text": " \n"}, "empty text"),
        ({"text": 3}, "cells that are not strings"),
        ({"text": None}, "cells that are not strings"),
        ({"text": ["a"]}, "cells that are not strings"),
        ({"instruction": None, "output": "So."}, "cells that are not strings"),
        ({"instruction": "Why?", "output": None}, "cells that are not strings"),
        ({"instruction": "Why?", "output": ["So.", 3]}, "cells that are not strings"),
        ({"instruction": "Why?", "input": {}, "output": "So."}, "cells that are not strings"),
        ({"prompt": 1.5, "completion": "So."}, "cells that are not strings"),
        ({"prompt": [USER], "completion": 3}, "cells that are not strings"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]},
            "cells that are not strings",
        ),
        ({"messages": [USER, {"role": "assistant"}]}, "cells that are not strings"),
        ({"text": "half a pair \ud83d"}, "text that is not valid Unicode"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "text that is not valid Unicode"),
        ({"messages": "Why?"}, "messages that are not a list of role and content"),
        ({"messages": None}, "messages that are not a list of role and content"),
        ({"messages": ["Why?", "So."]}, "messages that are not a list of role and content"),
        ({"messages": [{"content": "Why?"}]}, "messages that are not a list of role and content"),
        (
            {"messages": [{"from": "human", "value": "Why?"}]},
            "messages that are not a list of role and content",
        ),
        ({"messages": []}, "no assistant turn"),
        ({"messages": [USER]}, "no assistant turn"),
        (
            {"prompt": [USER, {"role": "assistant", "content": "So."}], "completion": [USER]},
            "no assistant turn",
        ),
    ],
)
def test_an_unusable_row_is_refused_for_its_reason(row: dict, reason: str) -> None:
    assert refusal(row) == reason


# Templates


def test_auto_is_the_chat_template_where_there_is_one_else_alpaca(tiny_tokenizer, tiny_chat_tokenizer) -> None:
    assert resolve_template("auto", tiny_tokenizer).name == "alpaca"
    chat = resolve_template("auto", tiny_chat_tokenizer)
    assert chat.kind == "chat"
    assert chat.source == tiny_chat_tokenizer.chat_template


def test_alpaca_is_the_released_wording(tiny_tokenizer) -> None:
    template = resolve_template("alpaca", tiny_tokenizer)
    plain = template.render(Exchange("Add {x} and {input}.", "", ("Done.",)))
    assert plain.whole == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd {x} and {input}.\n\n### Response:\nDone."
    )
    with_input = template.render(Exchange("Add.", "1 {2}", ("Done.",)))
    assert with_input.whole == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Input:\n1 {2}\n\n### Response:\nDone."
    )
    assert with_input.responses == ((with_input.whole.removesuffix("Done."), with_input.whole),)
    assert with_input.prompt == with_input.whole.removesuffix("Done.")


def test_none_adds_nothing_to_a_prompt_and_a_blank_line_to_an_instruction(tiny_tokenizer) -> None:
    template = resolve_template("none", tiny_tokenizer)
    assert template.render(read({"prompt": "2+2=", "completion": "4"})).whole == "2+2=4"
    assert template.render(read({"instruction": "Add.", "output": "4"})).whole == "Add.\n\n4"
    assert template.render(read({"instruction": "Add.", "input": "2 2", "output": "4"})).whole == "Add.\n\n2 2\n\n4"
    assert template.render(Text("just text")) == Rendered("just text", (("", "just text"),), (), False)


def test_an_exchange_in_a_chat_template_is_one_question_and_one_answer(tiny_chat_tokenizer) -> None:
    template = resolve_template("auto", tiny_chat_tokenizer)
    rendered = template.render(Exchange("Add.", "2 2", ("4", "four")))
    prompt = "<|im_start|>user\nAdd.\n\n2 2<|im_end|>\n<|im_start|>assistant\n"
    assert rendered == Rendered(f"{prompt}4<|im_end|>\n", ((prompt, f"{prompt}4<|im_end|>\n"),), ("4", "four"), True)


def test_a_single_turn_of_messages_fits_alpaca_and_anything_more_does_not(tiny_tokenizer) -> None:
    template = resolve_template("auto", tiny_tokenizer)
    answer = {"role": "assistant", "content": "So."}
    assert template.render(Chat((USER, answer))) == template.render(Exchange("Why?", "", ("So.",)))
    for chat in (({"role": "system", "content": "Be."}, USER, answer), (USER, answer, USER, answer)):
        with pytest.raises(Unusable, match="several turns or a system prompt, without a chat template"):
            template.render(Chat(chat))


def test_an_objection_of_the_template_is_a_reason_with_its_first_line(tiny_chat_tokenizer, tmp_path: Path) -> None:
    (tmp_path / "strict.jinja").write_text(STRICT)
    template = resolve_template(str(tmp_path / "strict.jinja"), tiny_chat_tokenizer)
    with pytest.raises(Unusable) as caught:
        template.render(Chat(({"role": "system", "content": "Be."}, USER, {"role": "assistant", "content": "So."})))
    assert str(caught.value) == "template refuses the messages: roles must alternate user/assistant"


def test_a_chat_that_the_assistant_opens_is_refused(tiny_chat_tokenizer) -> None:
    template = resolve_template("auto", tiny_chat_tokenizer)
    with pytest.raises(Unusable, match="starts with an assistant turn"):
        template.render(
            Chat(({"role": "assistant", "content": "Hello"}, USER, {"role": "assistant", "content": "So."}))
        )


def test_a_template_that_writes_todays_date_writes_the_same_text_every_day(tiny_chat_tokenizer, tmp_path: Path) -> None:
    (tmp_path / "llama.jinja").write_text(LLAMA_3)
    template = resolve_template(str(tmp_path / "llama.jinja"), tiny_chat_tokenizer)
    assert template.source == LLAMA_3
    assert template.render(Exchange("Why?", "", ("So.",))).whole == (
        "<|im_start|>system\nToday Date: 26 Jul 2024<|im_end|><|im_start|>user\nWhy?<|im_end|>"
        "<|im_start|>assistant\nSo.<|im_end|>"
    )
    (tmp_path / "plain.jinja").write_text(LLAMA_3.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'"))
    fixed = resolve_template(str(tmp_path / "plain.jinja"), tiny_chat_tokenizer)
    record = Exchange("Why?", "", ("So.",))
    assert fixed.render(record) == template.render(record), "nothing but the date is fixed"


def test_a_template_digest_follows_its_text_and_not_its_path(
    tiny_tokenizer, tiny_chat_tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "a.jinja").write_text(tiny_chat_tokenizer.chat_template)
    (tmp_path / "b.jinja").write_text(tiny_chat_tokenizer.chat_template + " ")
    digests = [
        resolve_template(name, tiny_chat_tokenizer).digest
        for name in ("auto", str(tmp_path / "a.jinja"), str(tmp_path / "b.jinja"), "alpaca", "none")
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4
    assert resolve_template("alpaca", tiny_tokenizer).digest == digests[3]


def test_a_template_that_is_no_template_is_a_sentence(tiny_tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'alpacca' is not auto, alpaca or none"):
        resolve_template("alpacca", tiny_tokenizer)
    (tmp_path / "broken.jinja").write_text("{% for message in messages %}\n{{ message.content }\n{% endfor %}")
    with pytest.raises(ValueError, match=r"broken.jinja, line 2: not Jinja"):
        resolve_template(str(tmp_path / "broken.jinja"), tiny_tokenizer)
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%Y') }}\n{{ message.content }")
    with pytest.raises(ValueError, match=r"dated.jinja, line 2: not Jinja"):
        resolve_template(str(tmp_path / "dated.jinja"), tiny_tokenizer)
    (tmp_path / "prose.txt").write_text("### Instruction:\n{instruction}\n")
    with pytest.raises(ValueError, match=r"prose.txt writes nothing of what a message says"):
        resolve_template(str(tmp_path / "prose.txt"), tiny_tokenizer)
    (tmp_path / "bytes.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"bytes.jinja is not UTF-8"):
        resolve_template(str(tmp_path / "bytes.jinja"), tiny_tokenizer)

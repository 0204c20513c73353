"""Manifests, plans and commits as nobody's writer makes them."""

import json
import random
from typing import Any

from faultlab.seals import Files, sealed, unsealed

RAW = (
    *("NaN Infinity -Infinity 1e999 -1e999 -0 1.0 1e3 01 0x10 tru 'a' {} [] null nul".split()),
    *("1" + "0" * 400, "1" * 5000, "0." + "1" * 5000, "[" * 100_000, '{"a":' * 50_000, "[" * 2000 + "]" * 2000),
    *('"\\ud800"', '"\\u0000"', '"unterminated', "", ",", "}", "/*x*/ 1", '"\\x00"', "1 2", '"\xff"', "\x00"),
)
"""What may stand in the place of a value."""
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        255,
        2**31,
        2**32 - 1,
        2**32,
        2**53,
        2**53 + 1,
        2**63 - 1,
        2**63,
        2**64,
        -(2**63),
    ),
    *(
        0.5,
        -0.5,
        1e-320,
        1e308,
        "",
        " ",
        "a" * 5000,
        "\n",
        "é",
        "🙂" * 100,
        "1",
        "none",
        "final",
        "packed",
        "arrow-fp32",
    ),
    *(
        "../plan.json",
        "/etc/passwd",
        "shards/../../x",
        "~/x",
        "C:\\x",
        "shards/00000.arrow\0",
        "tokenizer//x",
        ".",
        "..",
    ),
    *(
        "shards/./00000.arrow",
        "file:///etc/passwd",
        "http://localhost/x",
        "s3://a/b",
        "\\\\host\\x",
        "shards/00000.arrow/",
    ),
    *("sketch:4096:8", "sampled:65535", "profile+profile", "sketch:4", "0" * 64, "f" * 64, [], {}, [[]], {"": {}}),
    *({"name": "/etc/passwd", "size": 1, "sha256": "0" * 64}, ["../x"] * 3, {"1": 1}, {"-1": 1}, {"999999999999": 1}),
)
"""The same, as values."""


class _Raw(str):
    """Text that stands in the file as it is."""


class _Pairs(list):
    """An object as a list of its pairs, so that a key may occur twice."""


def forged_json(rng: random.Random, files: Files) -> Files:
    """One sealed file with one to three things wrong; most often the manifest."""
    others = sorted(name for name in files if name.endswith(".json") and not name.startswith("tokenizer"))
    name = "manifest.json" if rng.random() < 0.7 else rng.choice(others)
    tree = _pairs(unsealed(files[name]))
    for _ in range(rng.choice([1, 1, 2, 3])):
        _spoil(rng, tree)
    text = _text(tree).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        at = rng.randrange(len(text))
        text = text[:at] + rng.randbytes(rng.randrange(3)) + text[at + rng.randrange(3) :]
    return {name: sealed(text[:-1])}


def _spoil(rng: random.Random, tree: _Pairs) -> None:
    """Do one thing to one place of a tree."""
    holder, place = rng.choice(_places(tree))
    is_object = isinstance(holder, _Pairs)
    value = holder[place][1] if is_object else holder[place]

    def put(new: Any) -> None:
        holder[place] = (holder[place][0], new) if is_object else new

    what = rng.randrange(10)
    if what == 0:
        put(_Raw(rng.choice(RAW)))
    elif what in (1, 2):
        put(_pairs(rng.choice(VALUES)))
    elif what == 3:
        del holder[place]
    elif what == 4:
        holder.insert(rng.randrange(len(holder) + 1), holder[place])  # a key twice, or one item more
    elif what == 5 and is_object:
        holder.append((rng.choice(["x", "", "__proto__", "format_version", "sha256", "kind"]), rng.choice(VALUES)))
    elif what == 6 and is_object:
        holder[place] = (rng.choice(["", "1", "01", "-1", "name", "2 ", "９"]), value)
    elif what == 7 and isinstance(value, list) and value:
        put(type(value)(value * rng.choice([2, 1000])))
    elif what == 8 and isinstance(value, str) and value:
        at = rng.randrange(len(value))
        put(value[:at] + rng.choice("0aZ/.\\\0 é\u202e") + value[at + 1 :])
    elif isinstance(value, int | float):
        put(rng.choice([value + 1, value - 1, -value, value * 2, float(value), str(value), value + 0.5]))
    else:
        put(rng.choice([[value], _Pairs([("a", value)]), None]))


def _places(tree: Any) -> list[tuple[Any, int]]:
    found: list[tuple[Any, int]] = []
    waiting = [tree]
    while waiting:
        holder = waiting.pop()
        for place in range(len(holder)):
            value = holder[place][1] if isinstance(holder, _Pairs) else holder[place]
            found.append((holder, place))
            if isinstance(value, list):
                waiting.append(value)
    return found or [(tree, tree.append(("a", 1)) or 0)]


def _pairs(value: Any) -> Any:
    if isinstance(value, dict):
        return _Pairs((key, _pairs(part)) for key, part in value.items())
    return [_pairs(part) for part in value] if isinstance(value, list) else value


def _text(value: Any) -> str:
    if isinstance(value, _Raw):
        return str(value)
    if isinstance(value, _Pairs):
        return "{" + ",".join(f"{_text(str(key))}:{_text(part)}" for key, part in value) + "}"
    if isinstance(value, dict):
        return _text(_pairs(value))
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    return json.dumps(value, ensure_ascii=False)

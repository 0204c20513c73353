"""The demo's data: questions and answers out of the running Python's own documentation.

Docstrings of the standard library and the language reference in ``pydoc_data.topics``: real text that is
always there, the same for a Python version. Rows are split by object: a name belongs to train or to valid
whatever the seed, and no text, nor the opening of one, occurs in both.
"""

import hashlib
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from distilllens.text_file import write_text

MODULES = (
    "builtins os os.path math cmath random statistics fractions decimal numbers operator string textwrap re "
    "difflib datetime calendar time collections collections.abc itertools functools heapq bisect array copy "
    "pprint enum graphlib types typing dataclasses contextlib abc atexit traceback warnings weakref gc "
    "inspect ast dis tokenize symtable pathlib shutil glob fnmatch tempfile fileinput filecmp stat io "
    "codecs unicodedata struct binascii base64 quopri json csv configparser pickle shelve plistlib tomllib "
    "zipfile tarfile gzip zlib hashlib hmac secrets uuid argparse getopt logging logging.handlers "
    "logging.config getpass platform shlex cmd threading queue sched subprocess signal socket socketserver "
    "select selectors asyncio concurrent.futures multiprocessing contextvars urllib.parse urllib.request "
    "urllib.error urllib.robotparser http http.client http.cookies http.cookiejar http.server email.message "
    "email.headerregistry email.policy email.utils smtplib imaplib poplib ftplib ipaddress mailbox "
    "mimetypes html html.parser xml.etree.ElementTree xml.sax.handler xml.dom.minidom xmlrpc.client gettext "
    "locale unittest unittest.mock doctest timeit cProfile pstats trace bdb importlib importlib.abc "
    "importlib.util importlib.metadata importlib.resources pkgutil zipimport runpy code codeop compileall "
    "py_compile linecache reprlib wave colorsys netrc optparse"
).split()
"""What is read: no side effects on import, no optional C libraries, not deprecated in Python 3.11 to 3.14."""

MIN_WORDS, MAX_WORDS = 20, 80
"""Bounds of an answer; longer texts end after the last paragraph that fits."""

VALID_SHARE = 0.15
"""Share of all names that may only ever be in the valid split."""

STATEMENTS = frozenset(
    "assert async await break class continue del else for function global if import nonlocal pass raise "
    "return try while with yield".split()
)

QUESTIONS: dict[str, tuple[str, ...]] = {
    "module": ("What is the Python module `{}` for?", "Give an overview of the Python module `{}`."),
    "class": ("What is the Python class `{}`?", "Describe the class `{}` of Python's standard library."),
    "function": (
        "What does `{}` do?",
        "Explain the Python function `{}`.",
        "When would I call `{}` in Python, and what do I get?",
        "Write the documentation of the Python function `{}`.",
    ),
    "method": (
        "What does the method `{}` do?",
        "Explain the Python method `{}`.",
        "How does `{}` behave in Python?",
    ),
    "property": ("What is the attribute `{}`?",),
    "statement": ("Explain the Python statement `{}`.",),
    "topic": ("Explain this topic of the Python language: {}.",),
}

_ADDRESS = re.compile(r"\bat 0x|0x[0-9a-fA-F]{7,}")


@dataclass(frozen=True)
class Entry:
    """One documented object: its dotted name, what it is, its signature or "", and its text."""

    name: str
    kind: str
    signature: str
    text: str


def write_python_docs(folder: Path, *, num_train: int, num_valid: int, seed: int) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``valid.jsonl`` into ``folder`` and return their paths.

    Rows have ``id``, ``instruction``, ``input`` and ``output``. The seed picks rows and their order;
    which name may be in which file does not depend on it. ValueError when there are too few rows.
    """
    train, valid = split_entries(list(entries()))
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, pool, wanted in (("train", train, num_train), ("valid", valid, num_valid)):
        if wanted > len(pool):
            raise ValueError(
                f"this Python's documentation gives {len(pool)} rows for {name}, {wanted} were asked for: "
                f"ask for fewer (a Python started with -OO, or packaged without docstrings, has none)"
            )
        chosen = sorted(pool, key=lambda entry: _hash(f"{seed}:{entry.name}"))[:wanted]
        paths.append(folder / f"{name}.jsonl")
        _write_lines(paths[-1], [json.dumps(row(entry), ensure_ascii=False) for entry in chosen])
    return paths[0], paths[1]


def row(entry: Entry) -> dict[str, str]:
    """The entry as a question; its wording depends on the name alone."""
    wordings = QUESTIONS[entry.kind]
    wording = wordings[int(_hash(f"wording:{entry.name}"), 16) % len(wordings)]
    return {
        "id": entry.name,
        "instruction": wording.format(entry.name.removeprefix("topic:")),
        "input": entry.signature,
        "output": entry.text,
    }


def split_entries(found: list[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Train and valid entries: by hash of the name, each text once, no opening of a text in both."""
    unique: dict[str, Entry] = {}
    for entry in found:
        unique.setdefault(_normal(entry.text), entry)
    is_valid = {entry.name: int(_hash(entry.name)[:8], 16) < VALID_SHARE * 2**32 for entry in unique.values()}
    train = [entry for entry in unique.values() if not is_valid[entry.name]]
    openings = {_opening(entry.text) for entry in train}
    names = {entry.name for entry in train}
    valid = [
        entry
        for entry in unique.values()
        if is_valid[entry.name] and entry.name not in names and _opening(entry.text) not in openings
    ]
    return train, valid


def entries() -> Iterator[Entry]:
    """Every documented object with a text of usable length, in a fixed order."""
    seen: set[int] = set()
    for module_name in MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # not built, or not in this version
            continue
        for name, kind, value in _objects(module, module_name):
            if id(value) in seen:
                continue
            seen.add(id(value))
            text = answer_from(_own_docstring(value))
            if text is not None:
                yield Entry(name=name, kind=kind, signature=_signature(name, kind, value), text=text)
    yield from _topics()


def _objects(module: ModuleType, module_name: str) -> Iterator[tuple[str, str, Any]]:
    """The module, its public functions and classes, and their public methods (by ``vars``: runs nothing)."""
    prefix = "" if module_name == "builtins" else f"{module_name}."
    yield module_name, "module", module
    public = getattr(module, "__all__", None)
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or (public is not None and name not in public):
            continue
        if inspect.isclass(value):
            yield f"{prefix}{name}", "class", value
            for attribute, member in sorted(vars(value).items()):
                if not attribute.startswith("_"):
                    kind = "property" if isinstance(member, property) or inspect.isdatadescriptor(member) else "method"
                    yield f"{prefix}{name}.{attribute}", kind, member
        elif inspect.isroutine(value):
            yield f"{prefix}{name}", "function", value


def _own_docstring(value: Any) -> str:
    """The docstring written on the object itself; an inherited one belongs to another name."""
    if not (
        inspect.ismodule(value)
        or inspect.isclass(value)
        or inspect.isroutine(value)
        or inspect.isdatadescriptor(value)
        or isinstance(value, staticmethod | classmethod)
    ):
        return ""  # a constant shows the docstring of its type
    text = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    return inspect.cleandoc(text) if isinstance(text, str) else ""


def _signature(name: str, kind: str, value: Any) -> str:
    if kind in ("module", "property"):
        return ""
    target: Callable[..., Any] = value.__func__ if isinstance(value, staticmethod | classmethod) else value
    try:
        text = str(inspect.signature(target))
    except Exception:  # text signatures of C functions that inspect cannot parse raise anything
        return ""
    # Defaults without a repr of their own print an address or an internal name.
    return "" if "<" in text or len(text) > 160 else f"{name}{text}"


def _topics() -> Iterator[Entry]:
    """The language reference: one entry per topic of ``help()``."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):
        return
    for key, text in sorted(topics.items()):
        title, _, body = text.strip().partition("\n")
        answer = answer_from(inspect.cleandoc(re.sub(r"^[*=\-~^]{3,}\n", "", body)))
        if answer is not None:
            kind = "statement" if key in STATEMENTS else "topic"
            yield Entry(
                name=key if kind == "statement" else f"topic:{title.strip()}",
                kind=kind,
                signature="",
                text=answer,
            )


def answer_from(text: str) -> str | None:
    """Leading paragraphs of ``text``, unwrapped, within the bounds; None when there is no such text."""
    kept: list[str] = []
    num_words = 0
    for paragraph in re.split(r"\n\s*\n", text.expandtabs()):
        num_words += len(paragraph.split())
        if num_words > MAX_WORDS:
            break
        kept.append(_unwrap(paragraph))
    answer = "\n\n".join(kept).strip().rstrip(":")
    if len(answer.split()) < MIN_WORDS or _ADDRESS.search(answer):
        return None
    return answer


def _unwrap(paragraph: str) -> str:
    """Prose on one line; indented or listed lines stay as they are."""
    lines = [line.rstrip() for line in paragraph.splitlines()]
    is_prose = not any(re.match(r"\s|[-*+>|.] |[>=.]{3}|\d+[.)]", line) for line in lines)
    return " ".join(lines) if is_prose else "\n".join(lines)


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _opening(text: str) -> str:
    """The first words: near-copies (``str.find`` and ``bytes.find``) differ further down."""
    return " ".join(_normal(text).split()[:8])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write_lines(path: Path, lines: list[str]) -> None:
    write_text(path, "".join(f"{line}\n" for line in lines))

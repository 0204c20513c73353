"""The demo's data: deterministic, without leaks between the splits, without traces of this machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distilllens.python_docs import (
    MAX_WORDS,
    MIN_WORDS,
    MODULES,
    Entry,
    answer_from,
    entries,
    row,
    split_entries,
    write_python_docs,
)


@pytest.fixture(scope="module")
def found() -> list[Entry]:
    return list(entries())


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def normal(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def write_in_another_process(folder: Path, hash_seed: str) -> tuple[bytes, bytes]:
    program = (
        "import sys, pathlib; from distilllens.python_docs import write_python_docs as w;"
        "w(pathlib.Path(sys.argv[1]), num_train=300, num_valid=40, seed=3)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True, env=environment, cwd=folder.parent)
    return (folder / "train.jsonl").read_bytes(), (folder / "valid.jsonl").read_bytes()


def test_two_processes_with_other_hash_seeds_write_the_same_bytes(tmp_path: Path) -> None:
    first = write_in_another_process(tmp_path / "first", "1")
    assert first == write_in_another_process(tmp_path / "second", "2")


def test_no_name_text_or_opening_of_a_text_is_in_both_splits_whatever_the_seeds(tmp_path: Path) -> None:
    train, _ = write_python_docs(tmp_path / "a", num_train=900, num_valid=10, seed=0)
    _, valid = write_python_docs(tmp_path / "b", num_train=10, num_valid=150, seed=1)
    seen, held_out = read(train), read(valid)
    assert not {r["id"] for r in seen} & {r["id"] for r in held_out}
    assert not {normal(r["output"]) for r in seen} & {normal(r["output"]) for r in held_out}
    assert not {normal(r["output"])[:60] for r in seen} & {normal(r["output"])[:60] for r in held_out}


def test_a_docstring_that_two_names_share_is_used_once() -> None:
    twins = [Entry(name, "function", "", "Return the same thing. " * 8) for name in ("a.f", "b.f", "c.f", "d.f")]
    train, valid = split_entries(twins)
    assert [entry.name for entry in train + valid] == ["a.f"]


def test_the_seed_changes_which_rows_are_taken(tmp_path: Path) -> None:
    one, _ = write_python_docs(tmp_path / "a", num_train=100, num_valid=10, seed=0)
    other, _ = write_python_docs(tmp_path / "b", num_train=100, num_valid=10, seed=1)
    assert {r["id"] for r in read(one)} != {r["id"] for r in read(other)}


def test_no_row_holds_an_address_or_an_internal_name(found: list[Entry]) -> None:
    for entry in found:
        text = json.dumps(row(entry))
        assert not re.search(r"\bat 0x|0x[0-9a-f]{7}", text, re.IGNORECASE), text
        assert "<" not in entry.signature


def test_a_text_with_an_address_is_no_answer() -> None:
    text = "word " * 30
    assert answer_from(text) is not None
    assert answer_from(f"{text}<object at 0x7f3a>") is None
    assert answer_from(f"{text}0x7f3a00ff11") is None


def test_answers_are_of_the_length_that_two_cores_manage(found: list[Entry]) -> None:
    assert all(MIN_WORDS <= len(entry.text.split()) <= MAX_WORDS for entry in found)


def test_there_are_several_hundred_rows_and_questions_of_each_kind(found: list[Entry]) -> None:
    train, valid = split_entries(found)
    assert len(train) >= 800
    assert len(valid) >= 100
    assert {"module", "class", "function", "method"} <= {entry.kind for entry in train}
    assert {entry.kind for entry in found} >= {"statement", "topic"}
    assert len({row(entry)["instruction"] for entry in train}) == len(train)


def test_reading_the_documentation_opens_no_browser_and_prints_nothing() -> None:
    program = (
        "import sys, webbrowser; webbrowser.open = lambda *a, **k: sys.exit('a browser was opened');"
        "from distilllens.python_docs import entries; list(entries());"
        "bad = {'antigravity', 'this', 'idlelib', 'turtle', 'tkinter', 'torch'} & set(sys.modules);"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not {"antigravity", "this"} & set(MODULES)


def test_asking_for_more_rows_than_there_are_says_how_many_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gives \d+ rows for valid, 100000 were asked for"):
        write_python_docs(tmp_path, num_train=10, num_valid=100000, seed=0)

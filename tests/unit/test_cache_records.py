"""Sealed JSON and the records in it."""

import hashlib
import runpy
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from distilllens_cache import READER_FIELDS, CacheError, Identity, compare_identity
from distilllens_cache.layout import is_safe_name
from distilllens_cache.manifest import Manifest, Plan, from_bytes, to_bytes
from distilllens_cache.sealed_json import seal, unseal

TinyCache: Any = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_cache_v1.py"))["TinyCache"]


def sealed(body: bytes) -> bytes:
    """Any bytes with a correct digest at their end."""
    return body + b',\n"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def identity(**changes: Any) -> Identity:
    return Identity(**(TinyCache().identity.model_dump() | changes))


def test_sealed_json_is_sorted_and_ends_with_the_digest_of_all_before() -> None:
    data = seal({"b": {"z": 1, "a": [1.5, "ü"]}, "a": None})
    body, digest = data[:-79], data[-67:-3].decode()
    assert body == '{\n"a":null,\n"b":{"a":[1.5,"ü"],"z":1}'.encode()
    assert digest == hashlib.sha256(body).hexdigest()
    assert data == sealed(body)
    assert unseal(data, name="x") == body + b"}"


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b'{\n"a":1,\n"a":2', "twice"),
        (b'{\n"a":{"b":1,"b":1}', "twice"),
        (b'{\n"a":NaN', "NaN"),
        (b'{\n"a":-Infinity', "Infinity"),
        (b'{\n"a":1e999', "out of range"),
        (b'{\n"a":' + b"9" * 10_000, "JSON"),
        (b'{\n"a":' + b"[" * 200_000, "nested"),
        (b'{\n"a":' + b"[" * 200_000 + b"]" * 200_000, "nested"),
        (b'{\n"a":"\xff"', "JSON"),
        (b'{\n"sha256":1', "twice|sealed"),
        (b"[1", "JSON"),
        (b"", "JSON"),
    ],
)
def test_json_with_a_correct_digest_but_nonsense_inside_is_refused(body: bytes, what: str) -> None:
    with pytest.raises(CacheError, match=what):
        unseal(sealed(body), name="plan.json")


def test_a_wrong_digest_is_refused_before_anything_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    import distilllens_cache.sealed_json as module

    def parse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("parsed")

    data = bytearray(seal({"a": 1}))
    data[5] ^= 1
    monkeypatch.setattr(module.json, "loads", parse)
    with pytest.raises(CacheError, match=r"plan\.json is damaged"):
        unseal(bytes(data), name="plan.json")


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/passwd", "../x", "a/../b", "a/./b", "a//b", "a\\b", ".hidden", "a/.b", "", "a/", "C:x"),
        *("a\nb", "a\0b", "x" * 300, "a/b/c/d/e", "ü"),
    ],
)
def test_a_name_that_could_leave_the_folder_is_unsafe(name: str) -> None:
    assert not is_safe_name(name)


def test_ordinary_names_are_safe() -> None:
    assert is_safe_name("shards/00000.arrow")
    assert is_safe_name("tokenizer/additional_chat_templates/tool-use.jinja")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"layers": (4, 2)}, "ascend"),
        ({"layers": (2, 2, 4)}, "ascend"),
        ({"layers": (2, 3)}, "ascend"),
        ({"layers": ()}, "ascend"),
        ({"layers": (0, 4)}, "greater than or equal to 1"),
        ({"top_k": {2: 3}}, "top_k has the layers"),
        ({"top_k": {2: 3, 4: 51}}, "more than the vocabulary"),
        ({"top_k": {2: 0, 4: 6}}, "greater than or equal to 1"),
        ({"temperature": 0.0}, "greater than 0"),
        ({"temperature": float("inf")}, "finite"),
        ({"lens_norm": "tuned"}, "final"),
        ({"surprise": 1}, "not permitted"),
    ],
)
def test_an_identity_that_contradicts_itself_is_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        identity(**changes)


def test_each_difference_of_two_identities_is_named_with_both_values() -> None:
    differences = compare_identity(identity(), identity(seed=7, tokenizer_digest="abc"))
    assert differences == [
        f"tokenizer_digest: cache has {'33' * 32!r}, this run has 'abc'",
        "seed: cache has 0, this run has 7",
    ]
    assert len(compare_identity(identity(), identity(seed=7, dtype="float16"), READER_FIELDS)) == 0
    assert set(READER_FIELDS) <= set(Identity.model_fields)


def test_a_record_comes_back_equal_and_its_bytes_are_always_the_same(tmp_path: Path) -> None:
    folder = TinyCache().write(tmp_path / "cache")
    plan, manifest = ((folder / name).read_bytes() for name in ("plan.json", "manifest.json"))
    assert to_bytes(from_bytes(Plan, plan, name="plan.json")) == plan
    assert to_bytes(from_bytes(Manifest, manifest, name="manifest.json")) == manifest


def edited(folder: Path, old: str, new: str) -> bytes:
    body = (folder / "manifest.json").read_bytes()[:-79]
    assert old.encode() in body
    return sealed(body.replace(old.encode(), new.encode(), 1))


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('"format_version":1,\n', '"format_version":2,\n', "version 2, this distilllens reads version 1"),
        ('"kind":', '"unknown":1,\n"kind":', "unknown"),
        ('"name":"shards/00000.arrow"', '"name":"../00000.arrow"', "plain relative name"),
        ('"name":"shards/00000.arrow"', '"name":"/tmp/0.arrow"', "plain relative name"),
        ('"name":"shards/00000.arrow"', '"name":"shards/00001.arrow"', "is called"),
        ('"name":"index.arrow"', '"name":"plan.json"', "index is called"),
        ('"name":"tokenizer/tokenizer.json"', '"name":"manifest.json"', "tokenizer files"),
        ('"seed":0', '"seed":"0"', "seed"),
        ('"seed":0', '"seed":true', "seed"),
        ('"num_examples":3', '"num_examples":-3', "num_examples"),
        ('"num_examples":3', '"num_examples":100000000000000000000000', "num_examples"),
        ('"layers":[2,4]', '"layers":[4]', "layers"),
        ('"store_tail":"profile"', '"store_tail":"none"', "tail sums"),
    ],
)  # fmt: skip
def test_a_sealed_manifest_that_says_something_impossible_is_refused(
    tmp_path: Path, old: str, new: str, what: str
) -> None:
    folder = TinyCache().write(tmp_path / "cache")
    with pytest.raises(CacheError, match=what):
        from_bytes(Manifest, edited(folder, old, new), name="manifest.json")

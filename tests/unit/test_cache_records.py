"""Sealed JSON and the records in it."""

import hashlib
import runpy
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from distilllens_cache import READER_FIELDS, CacheError, Identity, compare_identity
from distilllens_cache.layout import is_safe_name
from distilllens_cache.manifest import Manifest, Plan, Sidecar, from_bytes, sketches_digest, to_bytes
from distilllens_cache.sealed_json import seal, unseal

GOLDEN = Path(__file__).parents[1] / "golden"
MADE: Any = runpy.run_path(str(GOLDEN / "make_cache_v1.py"))
TinyCache = MADE["TinyCache"]


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
        ({"store_tail": "bucket"}, "'bucket' is no stored tail: expected"),
        ({"store_tail": {2: "profile", 4: "sketch:0"}}, "'sketch:0' is no stored tail"),
        ({"store_tail": {4: "profile"}}, r"store_tail has the layers \[4\], the cache has \[2, 4\]"),
        ({"store_tail": {2: "none", 3: "none", 4: "none"}}, "store_tail has the layers"),
        ({"store_tail": {}}, "store_tail has the layers"),
        ({"store_tail": "profile+" * 600}, "at most 4096"),
        ({"min_k": {3: 1}}, r"min_k has the layers \[3\]"),
        ({"min_k": {4: 7}}, "min_k of layer 4 is 7, more than its top_k of 6"),
        ({"min_k": {4: 0}}, "greater than or equal to 1"),
        ({"min_prob": {3: 0.1}}, "min_prob has the layers"),
        ({"min_prob": {4: 1.0}}, "less than 1"),
        ({"min_prob": {4: -0.1}}, "greater than or equal to 0"),
        ({"min_prob": {4: float("nan")}}, "min_prob"),
        ({"top_p": {1: 0.5}}, "top_p has the layers"),
        ({"top_p": {4: 0.0}}, "greater than 0"),
        ({"top_p": {4: 1.1}}, "less than or equal to 1"),
        ({"calibration_targets": -1}, "greater than or equal to 0"),
    ],
)
def test_an_identity_that_contradicts_itself_is_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        identity(**changes)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ({2: "profile", 4: "profile"}, "profile"),
        ({2: "sketch:64", 4: "sketch:64:4"}, "sketch:64"),
        ("sketch:64:4", "sketch:64"),
        ({4: "sketch:64:4", 2: "none"}, {2: "none", 4: "sketch:64"}),
    ],
)
def test_there_is_one_way_to_say_what_is_stored_of_the_tails(said: Any, kept: Any) -> None:
    found = identity(store_tail=said)
    assert found.store_tail == kept
    assert found == identity(store_tail=kept)
    assert (
        [str(spec) for spec in found.tail_specs.values()] == [kept, kept] if isinstance(kept, str) else [*kept.values()]
    )


def test_layers_are_told_by_what_is_stored_of_their_tails() -> None:
    found = identity(store_tail={2: "profile+sampled:3", 4: "sketch:8"})
    assert (found.profile_layers, found.sketch_layers, found.tail_row_layers) == ((2,), (4,), (2, 4))
    assert identity(store_tail="profile").tail_row_layers == ()
    assert identity(store_tail="none").profile_layers == ()


def test_what_the_first_caches_did_not_have_is_left_out_while_it_is_unused() -> None:
    later = {"min_k", "min_prob", "top_p", "calibration_targets"}
    assert not later & set(identity().model_dump(mode="json"))
    used = identity(min_k={2: 1}, min_prob={2: 0.1}, top_p={4: 0.9}, calibration_targets=1)
    assert later < set(used.model_dump(mode="json"))
    assert Identity.model_validate_json(used.model_dump_json(), strict=True) == used


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


def test_old_records_keep_their_bytes() -> None:
    for folder in ("cache_v1", "cache_v1_fp16"):
        for name, model in (("plan.json", Plan), ("manifest.json", Manifest), ("shards/00000.json", Sidecar)):
            data = (GOLDEN / folder / name).read_bytes()
            assert to_bytes(from_bytes(model, data, name=name)) == data


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


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('"rank":4', '"rank":5', "the sketch of layer 3 has rank 5, 8 bits .* expected is sketch:4:8"),
        ('"bits":8', '"bits":4', "the sketch of layer 3 has rank 4, 4 bits"),
        ('"bits":8', '"bits":6', "bits"),
        ('"hidden_size":8', '"hidden_size":3', "hidden size 3"),
        ('"hidden_size":8', '"hidden_size":99999999999', "hidden_size"),
        ('"softcap":30.0', '"softcap":0', "softcap"),
        ('"sketches":{"3"', '"sketches":{"2"', "sketches of the layers"),
        ('"name":"sketches/layer_3.arrow"', '"name":"sketches/layer_4.arrow"', "files of layer 3"),
        ('"name":"sketches/layer_3.projection.arrow"', '"name":"index.arrow"', "files of layer 3"),
        ('"3":"sketch:4:8"', '"3":"none"', "sketches of the layers"),
        ('"3":"sketch:4:8"', '"3":"sketch:4"', "expected is sketch:4"),
        ('"3":"sketch:4:8"', '"3":"sketch:4:9"', "no stored tail"),
        ('"name":"shards/00000.tail_rows.arrow"', '"name":"shards/00001.tail_rows.arrow"', "tail rows of shard 0"),
        ('"store_tail":{"2":"profile+sampled:5",', '"store_tail":{"2":"none","5":"none",', "store_tail has the layers"),
    ],
)  # fmt: skip
def test_a_sealed_manifest_with_impossible_sketches_is_refused(tmp_path: Path, old: str, new: str, what: str) -> None:
    folder = TinyCache(**MADE["SKETCHED"]).write(tmp_path / "cache")
    with pytest.raises(CacheError, match=what):
        from_bytes(Manifest, edited(folder, old, new), name="manifest.json")


def test_the_digest_of_the_sketches_is_that_of_their_commit_files(tmp_path: Path) -> None:
    folder = TinyCache(**MADE["SKETCHED"]).write(tmp_path / "cache")
    manifest = from_bytes(Manifest, (folder / "manifest.json").read_bytes(), name="manifest.json")
    commits = b"".join((folder / "sketches" / f"layer_{layer}.json").read_bytes() for layer in (3, 4))
    digest = hashlib.sha256(commits).hexdigest()
    backwards = dict(reversed(manifest.sketches.items()))
    for sketches in (manifest.sketches, backwards):
        assert sketches_digest(sketches, plan_sha256=manifest.plan_sha256) == digest
    assert sketches_digest({}, plan_sha256=manifest.plan_sha256) is None
    sidecar = from_bytes(Sidecar, (folder / "shards" / "00001.json").read_bytes(), name="00001.json")
    assert sidecar.sketches_sha256 == digest


def test_the_manifest_names_every_file_that_is_stored_of_the_tails(tmp_path: Path) -> None:
    folder = TinyCache(**MADE["SKETCHED"]).write(tmp_path / "cache")
    manifest = from_bytes(Manifest, (folder / "manifest.json").read_bytes(), name="manifest.json")
    named = {record.name: record.size for record in manifest.files}
    there = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    assert {name: size for name, size in there.items() if not name.endswith(".json") or "tokenizer" in name} == named
    assert manifest.total_bytes == sum(named.values())
    assert manifest.shards[0].tail_rows is not None
    assert manifest.shards[0].tail_rows.size == there["shards/00000.tail_rows.arrow"]

"""Two caches compared: differences are counted where they are, and the JSD is a lower bound of the dense one."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from distilllens_cache import CachedExample, CacheReader, CacheWriter, Identity, LayerTargets, PlannedExample
from distilllens_cache import example_digest as digest_of
from distilllens_inspect.commands import inspect
from distilllens_inspect.diff import compare_rows

VOCABULARY = 12
GOLDEN = Path(__file__).parents[1] / "golden"


def sparse(dense: np.ndarray, k: int) -> LayerTargets:
    """The k likeliest ids of each row of (T, V) probabilities."""
    ids = np.argsort(-dense, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(dense, ids, axis=1)
    rest = np.maximum(1 - kept.sum(1), np.exp(-100))
    return LayerTargets(
        counts=np.full(len(dense), k, np.int32),
        ids=ids.astype(np.uint32).ravel(),
        log_probs=np.log(kept).astype(np.float32).ravel(),
        log_rest=np.log(rest).astype(np.float32),
    )


def dense_rows(seed: int, rows: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(VOCABULARY, 0.5), rows).clip(1e-12)


def jsd(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    m = (p + q) / 2
    return ((p * np.log(p / m)).sum(-1) + (q * np.log(q / m)).sum(-1)) / 2


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, VOCABULARY - 1), st.integers(1, VOCABULARY - 1))
def test_the_jsd_of_sparse_rows_never_exceeds_the_dense_one_and_is_symmetric(seed: int, k: int, other: int) -> None:
    p, q = dense_rows(seed), dense_rows(seed + 1)
    a, b = sparse(p, k), sparse(q, other)
    found = compare_rows(a, b).jsd
    assert (found <= jsd(p, q) + 1e-6).all()
    assert (found >= 0).all()
    np.testing.assert_allclose(found, compare_rows(b, a).jsd, atol=1e-12)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_with_every_id_kept_the_jsd_is_the_dense_one(seed: int) -> None:
    p, q = dense_rows(seed), dense_rows(seed + 1)
    found = compare_rows(sparse(p, VOCABULARY), sparse(q, VOCABULARY))
    np.testing.assert_allclose(found.jsd, jsd(p, q), atol=1e-6)
    assert not found.has_other_ids.any()


def test_rows_without_a_common_id_have_one_bucket_each_and_so_no_distance() -> None:
    p, q = np.array([[0.9, 0.1, 0.0, 0.0]]), np.array([[0.0, 0.0, 0.9, 0.1]])
    found = compare_rows(sparse(p.clip(1e-9), 1), sparse(q.clip(1e-9), 1))
    assert found.jsd[0] == pytest.approx(0.0)
    assert found.has_other_ids.all()
    assert found.has_other_top_id.all()


IDENTITY = Identity(
    teacher="one", teacher_digest="", teacher_config_digest="", num_layers=4, dtype="float32",
    attn_implementation="sdpa", torch_version="", transformers_version="", device="cpu", tokenizer_digest="",
    template_digest="", vocab_size=VOCABULARY, dataset_digest="", layers=(2, 4), lens_norm="final", top_k={2: 3, 4: 3},
    store_tail="none", temperature=1.0, codec="arrow-fp32", batch_tokens=64, examples_per_shard=2, seed=0,
)  # fmt: skip


def write(folder: Path, texts: list[list[int]], *, seed: int = 0, changed: bool = False, **identity: object) -> Path:
    """A cache of these texts: all positions but the last are targets, distributions follow from text and seed."""
    made = IDENTITY.model_copy(update=identity)
    examples = []
    for place, text in enumerate(texts):
        targets = {
            layer: sparse(dense_rows(hash((*text, layer, seed)) % 2**32, len(text) - 1), made.top_k[layer])
            for layer in made.layers
        }
        if changed and place == 0:
            targets[2].log_rest[1] -= 0.00001
        positions = np.arange(len(text) - 1, dtype=np.uint32)
        examples.append(CachedExample(place, f"row-{place}", np.array(text, np.uint32), positions, targets))
    plan = [
        PlannedExample(e.id, digest_of(e.token_ids, e.target_positions), len(e.token_ids), len(e.target_positions))
        for e in examples
    ]
    shards = [range(start, min(start + 2, len(plan))) for start in range(0, len(plan), 2)]
    writer = CacheWriter(folder, identity=made, examples=plan, tokenizer_files={}, shards=shards)
    for number, shard in enumerate(shards):
        writer.write_shard(number, examples[shard.start : shard.stop])
    writer.finish()
    return folder


TEXTS = [[1, 2, 3, 4], [5, 6], [7, 8, 9], [1, 2]]


def diff(a: Path, b: Path, *more: str) -> Result:
    result = CliRunner().invoke(inspect, ["diff", str(a), str(b), *more])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def found(a: Path, b: Path) -> dict:
    return json.loads(diff(a, b, "--json").stdout)


def test_a_copy_is_the_same_with_exit_code_0(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", TEXTS), write(tmp_path / "b", TEXTS)
    result = diff(a, b)
    assert result.exit_code == 0
    assert [line.split() for line in result.stdout.splitlines()[-3:]] == [
        ["identity", "same"],
        ["examples", "same"],
        ["targets", "same"],
    ]


def test_one_bit_of_one_rest_makes_the_targets_differ(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", TEXTS), write(tmp_path / "b", TEXTS, changed=True)
    assert diff(a, b).exit_code == 1
    content = found(a, b)
    assert (content["same_identity"], content["same_examples"], content["same_targets"]) == (True, True, False)
    assert [layer["num_targets"] - layer["identical"] for layer in content["layers"]] == [1, 0]


def test_another_teacher_over_the_same_rows_differs_layer_by_layer(tmp_path: Path) -> None:
    a = write(tmp_path / "a", TEXTS)
    b = write(tmp_path / "b", TEXTS, seed=1, teacher="two", top_k={2: 3, 4: 5})
    content = found(a, b)
    assert [field["name"] for field in content["identity"]] == ["teacher", "top_k"]
    for layer in content["layers"]:
        assert layer["num_targets"] == 7
        assert 0 < layer["mean_jsd_lower_bound"] <= layer["largest_jsd_lower_bound"] <= np.log(2)
    assert content["layers"][1]["other_ids"] == 7


def test_examples_are_paired_by_their_tokens_wherever_they_stand(tmp_path: Path) -> None:
    a = write(tmp_path / "a", TEXTS)
    b = write(tmp_path / "b", [*reversed(TEXTS), [3, 3, 3]])
    content = found(a, b)
    assert content["examples"] == {"shared": 4, "only_a": 0, "only_b": 1}
    assert not content["same_examples"]
    assert content["same_targets"]
    assert diff(a, b).exit_code == 1


def test_the_same_example_twice_is_paired_once_each(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [TEXTS[0], TEXTS[0], TEXTS[1]]), write(tmp_path / "b", [TEXTS[0], TEXTS[1]])
    assert found(a, b)["examples"] == {"shared": 2, "only_a": 1, "only_b": 0}


def test_without_a_common_example_there_is_nothing_to_compare(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", TEXTS[:1]), write(tmp_path / "b", TEXTS[1:2])
    result = diff(a, b)
    assert result.exit_code == 1
    assert "nothing to compare" in result.stdout
    assert found(a, b)["same_targets"] is None


def test_the_last_layers_of_teachers_of_other_depth_are_compared_with_each_other(tmp_path: Path) -> None:
    a = write(tmp_path / "a", TEXTS)
    b = write(tmp_path / "b", TEXTS, num_layers=6, layers=(2, 3, 6), top_k={2: 3, 3: 3, 6: 3})
    content = found(a, b)
    assert [(layer["a"], layer["b"]) for layer in content["layers"]] == [(2, 2), (4, 6)]
    assert content["layers_only_in"] == {"a": [], "b": [3]}
    assert not content["same_targets"]


def test_stored_tails_count(tmp_path: Path) -> None:
    content = found(GOLDEN / "cache_v1", GOLDEN / "cache_v1_sketch")
    assert [layer["tails_differ"] for layer in content["layers"]] == [
        ["profile", "samples"],
        ["codes", "profile", "samples", "sketch"],
    ]
    assert diff(GOLDEN / "cache_v1_sketch", GOLDEN / "cache_v1_sketch").exit_code == 0


def test_another_codec_moves_values_within_its_error_and_no_ids() -> None:
    for layer in found(GOLDEN / "cache_v1", GOLDEN / "cache_v1_fp16")["layers"]:
        assert layer["other_ids"] == 0
        assert 0 < layer["largest_log_prob"] < 0.01
        assert layer["mean_jsd_lower_bound"] < 1e-6


def test_few_shards_are_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [[n % 12, n // 12, 3] for n in range(24)]
    a, b = write(tmp_path / "a", texts), write(tmp_path / "b", texts)
    most = []
    get = CacheReader.__getitem__

    def counted(reader: CacheReader, index: int) -> CachedExample:
        example = get(reader, index)
        most.append(len(reader._decoded))
        return example

    monkeypatch.setattr(CacheReader, "__getitem__", counted)
    assert diff(a, b).exit_code == 0
    assert max(most) <= 4

"""The teacher's pass on tiny models: what is cached is what the teacher says, whatever happens on the way."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from distilllens.cache_teacher import run_cache_teacher
from distilllens.cli import main
from distilllens.config import CacheTeacherConfig
from distilllens.lens import decoder_of, final_norm_of
from distilllens_cache import CacheError, CacheReader, CacheWriter, verify_cache

SETTINGS = {
    "layers": "2",
    "top_k": "16",
    "max_length": 300,
    "examples_per_shard": 5,
    "batch_tokens": 600,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory, tiny_rows, write_jsonl) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny_rows)


def cache(teacher: Path, rows: Path, folder: Path, **settings: object) -> CacheReader:
    config = CacheTeacherConfig(teacher=str(teacher), dataset=str(rows), output_dir=folder, **{**SETTINGS, **settings})
    return CacheReader(run_cache_teacher(config))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the cache; the copy of the run's config names the folder itself and is left out."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "config.resolved.yaml")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def live_log_probs(folder: Path, token_ids: np.ndarray, lens_norm: str) -> dict[int, torch.Tensor]:
    """Log-probabilities of every position at layers 2 and 4, from transformers alone, without the project's lens."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(input_ids=torch.tensor(token_ids.astype(np.int64))[None], output_hidden_states=True)
        hidden = output.hidden_states[2]
        normed = final_norm_of(decoder_of(model))(hidden) if lens_norm == "final" else hidden
        return {
            2: model.get_output_embeddings()(normed)[0].log_softmax(-1),
            4: output.logits[0].log_softmax(-1),
        }


@pytest.mark.parametrize(("codec", "tolerance"), [("arrow-fp32", 1e-6), ("arrow-fp16", 1e-3)])
@pytest.mark.parametrize("lens_norm", ["final", "none"])
@pytest.mark.parametrize(("architecture", "tied"), [("llama", False), ("gpt2", True), ("qwen2", True), ("llama", True)])
def test_cached_probabilities_are_those_computed_live(
    tiny_model_folder,
    rows,
    tmp_path,
    architecture: str,
    tied: bool,
    lens_norm: str,
    codec: str,
    tolerance: float,
) -> None:
    teacher = tiny_model_folder(architecture, tied=tied)
    reader = cache(teacher, rows, tmp_path / "cache", lens_norm=lens_norm, codec=codec, limit=6)
    for example in (reader[0], reader[5]):
        live = live_log_probs(teacher, example.token_ids, lens_norm)
        for layer, targets in example.targets.items():
            ids, log_probs = targets.padded()
            wanted = live[layer][torch.tensor(example.target_positions.astype(np.int64))]
            got = torch.from_numpy(log_probs).exp()
            assert (got - wanted.gather(-1, torch.from_numpy(ids)).exp()).abs().max() < tolerance
            rest = 1 - wanted.double().gather(-1, torch.from_numpy(ids)).exp().sum(-1)
            assert (torch.tensor(targets.log_rest).double().exp() - rest).abs().max() < 2 * tolerance


def test_tail_sums_are_the_teachers_mean_tail(tiny_model_folder, rows, tmp_path) -> None:
    teacher = tiny_model_folder("llama")
    reader = cache(teacher, rows, tmp_path / "cache", limit=6)
    wanted = torch.zeros(320, dtype=torch.float64)
    for example in reader:
        live = live_log_probs(teacher, example.token_ids, "final")[2].double().exp()
        tail = live[torch.tensor(example.target_positions.astype(np.int64))]
        wanted += tail.scatter(-1, torch.from_numpy(example.targets[2].padded()[0]), 0.0).sum(0)
    np.testing.assert_allclose(reader.tail_sums()[2] / 2**32, wanted.numpy(), atol=1e-5)


def test_temperature_is_applied_before_anything_is_left_out(tiny_model_folder, rows, tmp_path) -> None:
    teacher = tiny_model_folder("llama")
    reader = cache(teacher, rows, tmp_path / "cache", temperature=2.0, limit=2, codec="arrow-fp32")
    example = reader[0]
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(example.token_ids.astype(np.int64))[None]).logits[0]
    wanted = (logits / 2).log_softmax(-1)[torch.tensor(example.target_positions.astype(np.int64))]
    ids, log_probs = example.targets[4].padded()
    torch.testing.assert_close(torch.from_numpy(log_probs), wanted.gather(-1, torch.from_numpy(ids)), atol=1e-5, rtol=0)


def test_padding_and_batching_change_no_target(tiny_model_folder, rows, tmp_path) -> None:
    teacher = tiny_model_folder("gpt2")
    packed = cache(teacher, rows, tmp_path / "packed", batch_tokens=3000, codec="arrow-fp32")
    alone = cache(teacher, rows, tmp_path / "alone", batch_tokens=1, codec="arrow-fp32")
    for one, other in zip(packed, alone, strict=True):
        for layer in (2, 4):
            np.testing.assert_allclose(one.targets[layer].log_probs, other.targets[layer].log_probs, atol=2e-5)


def test_a_stopped_run_continues_to_the_same_bytes(tiny_model_folder, rows, tmp_path, monkeypatch) -> None:
    teacher = tiny_model_folder("llama")
    cache(teacher, rows, tmp_path / "whole")
    write, calls = CacheWriter.write_shard, []

    def stop_at_the_third(self, number, examples, tails):
        calls.append(number)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(self, number, examples, tails)

    monkeypatch.setattr(CacheWriter, "write_shard", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        cache(teacher, rows, tmp_path / "stopped")
    with pytest.raises(CacheError):
        CacheReader(tmp_path / "stopped")
    monkeypatch.undo()
    cache(teacher, rows, tmp_path / "stopped")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_finished_cache_is_left_as_it_is(tiny_model_folder, rows, tmp_path, capsys) -> None:
    cache(tiny_model_folder("llama"), rows, tmp_path / "cache")
    before = contents(tmp_path / "cache")
    cache(tiny_model_folder("llama"), rows, tmp_path / "cache")
    assert "nothing to do" in capsys.readouterr().out
    assert contents(tmp_path / "cache") == before


def test_a_card_lies_beside_the_finished_cache_and_one_that_somebody_wrote_is_kept(
    tiny_model_folder, rows, tmp_path
) -> None:
    teacher, card = tiny_model_folder("llama"), tmp_path / "cache" / "README.md"
    reader = cache(teacher, rows, tmp_path / "cache", limit=3, license="mit")
    assert reader.digest in card.read_text()
    assert "license: mit" in card.read_text()
    card.unlink()
    cache(teacher, rows, tmp_path / "cache", limit=3)
    assert reader.digest in card.read_text()
    anew = cache(teacher, rows, tmp_path / "cache", limit=2, overwrite=True)
    assert anew.digest in card.read_text()
    card.write_text("Mine.")
    cache(teacher, rows, tmp_path / "cache", limit=3, overwrite=True)
    assert card.read_text() == "Mine."


def test_another_teacher_is_refused_on_resume_and_nothing_is_lost(tiny_model_folder, rows, tmp_path) -> None:
    cache(tiny_model_folder("llama"), rows, tmp_path / "cache")
    before = contents(tmp_path / "cache")
    with pytest.raises(CacheError, match="teacher_digest"):
        cache(tiny_model_folder("llama", seed=5), rows, tmp_path / "cache")
    assert contents(tmp_path / "cache") == before


def test_the_cache_verifies_and_an_estimate_writes_nothing(tiny_model_folder, rows, tmp_path, capsys) -> None:
    teacher = tiny_model_folder("llama")
    config = CacheTeacherConfig(
        teacher=str(teacher), dataset=str(rows), output_dir=tmp_path / "dry", **{**SETTINGS, "dry_run": True}
    )
    run_cache_teacher(config)
    assert not (tmp_path / "dry").exists()
    printed = capsys.readouterr().out
    reader = cache(teacher, rows, tmp_path / "cache")
    assert f"target positions   {int(reader.num_targets.sum())}" in printed
    assert "rows               24 of 24" in printed
    assert not verify_cache(tmp_path / "cache").problems


def command(teacher: Path, rows: Path, folder: Path, *more: str) -> list[str]:
    flags = ["--teacher", str(teacher), "--dataset", str(rows), "--output-dir", str(folder), "--device", "cpu"]
    return ["cache-teacher", *flags, "--layers", "2", "--max-length", "300", "--top-k", "16", *more]


@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_a_cache_that_cannot_fit_is_exit_code_3_and_a_sentence(
    tiny_model_folder, rows, tmp_path, monkeypatch, capsys, more
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(SystemExit) as ended:
        main(command(tiny_model_folder("llama"), rows, tmp_path / "a" / "cache", *more))
    assert ended.value.code == 3
    printed = capsys.readouterr()
    assert f"{tmp_path} has 1.0 kB free" in printed.err
    assert ("it does not fit" in printed.out) == bool(more)
    assert not list(tmp_path.iterdir())


def test_a_run_goes_by_the_measured_size_and_counts_what_the_folder_holds(
    tiny_model_folder, rows, tmp_path, monkeypatch, capsys
) -> None:
    """The settings alone ask for 104 kB, a sample says 73: the run has room in 95 kB, and once it is there in none."""
    free = {"bytes": 95_000}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free["bytes"]))
    for more in ([], ["--dry-run"]):
        with pytest.raises(SystemExit) as ended:
            main(command(tiny_model_folder("llama"), rows, tmp_path / "cache", *more))
        assert ended.value.code == 0
        free["bytes"] = 0
    assert CacheReader(tmp_path / "cache").manifest.total_bytes < 95_000
    assert "there already" in capsys.readouterr().out


def test_padded_rows_of_the_head_are_left_out(tiny_model, tiny_tokenizer, rows, tmp_path) -> None:
    """Qwen's heads have more rows than its tokenizer has ids; junk rows may hold real mass."""
    folder = tmp_path / "padded"
    model = tiny_model("qwen2", vocab_size=len(tiny_tokenizer) + 64)
    with torch.no_grad():
        model.lm_head.weight[len(tiny_tokenizer) :] *= 10
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    reader = cache(folder, rows, tmp_path / "cache", top_k="320", min_prob="0", codec="arrow-fp32", limit=3)
    assert reader.manifest.identity.vocab_size == len(tiny_tokenizer)
    targets = reader[0].targets[4]
    assert targets.ids.max() < len(tiny_tokenizer)
    np.testing.assert_allclose(np.exp(targets.padded()[1]).sum(-1), 1.0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "9"}, "layer 9 does not exist; the teacher has layers 1 to 4"),
        ({"top_k": "321"}, "321 is outside 1 to 320"),
        ({"dataset": "absent.jsonl"}, "absent.jsonl"),
        ({"teacher": "nowhere/at-all"}, "nowhere/at-all"),
        ({"device": "cuda"}, "CUDA"),
        ({"text_column": "nothing"}, "nothing"),
    ],
)
def test_bad_input_gets_a_sentence_and_nothing_is_written(tiny_model_folder, rows, tmp_path, settings, message) -> None:
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    config = {"teacher": str(tiny_model_folder("llama")), "dataset": str(rows), **SETTINGS, **settings}
    with pytest.raises(ValueError, match=message):
        run_cache_teacher(CacheTeacherConfig(output_dir=tmp_path / "cache", **config))
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_holds_something_else_is_left_untouched(tiny_model_folder, rows, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(CacheError):
            cache(tiny_model_folder("llama"), rows, tmp_path / "mine", overwrite=overwrite)
    assert contents(tmp_path / "mine") == {"thesis.txt": b"years of work"}

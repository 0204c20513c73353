"""Sequence-level distillation: the teacher's own responses are what its cache and its students are made of."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from distilllens import free_space, generated_rows
from distilllens.cache_teacher import run_cache_teacher
from distilllens.config import CacheTeacherConfig, TrainConfig
from distilllens.data import load_prompts
from distilllens.free_space import NoSpaceError
from distilllens.generate import Sampling, end_tokens, generate
from distilllens.generated_rows import responses_file
from distilllens.metrics import read_metrics
from distilllens.models import load_model
from distilllens.train import run_train
from distilllens_cache import CacheError, CacheReader
from faultlab.child import in_child


@pytest.fixture
def config(tmp_path, tiny_model_folder, tiny_rows, write_jsonl) -> CacheTeacherConfig:
    rows = write_jsonl(tmp_path / "rows.jsonl", tiny_rows)
    return CacheTeacherConfig(
        teacher=str(tiny_model_folder("llama")), dataset=str(rows), layers="2", top_k="16", device="cpu", limit=7,
        max_length=300, generate=True, max_new_tokens=9, generate_batch_size=3, output_dir=tmp_path / "cache",
    )  # fmt: skip


def test_a_cache_holds_what_the_teacher_writes_after_each_prompt(config, tmp_path, tiny_model_folder) -> None:
    reader = CacheReader(run_cache_teacher(config))
    model, tokenizer = load_model(config.teacher).eval(), AutoTokenizer.from_pretrained(config.teacher)
    prompts = load_prompts(config, config.dataset, tokenizer).prompts
    ends = end_tokens(model, tokenizer)
    written = generate(
        model, tokenizer, prompts, Sampling(max_new_tokens=9), seed=0, vocab_size=len(tokenizer), ends=ends
    )
    assert [example.id for example in reader] == [prompt.id for prompt in prompts]
    for example, prompt, one in zip(reader, prompts, written, strict=True):
        end = () if one.end_id is None else (one.end_id,)
        assert example.token_ids.tolist() == [*prompt.token_ids, *one.token_ids, *end]
        first = len(prompt.token_ids) - 1
        assert example.target_positions.tolist() == list(range(first, first + len(one.token_ids) + len(end)))
    settings = json.loads(responses_file(config.output_dir).read_text().splitlines()[0])["settings"]
    assert (settings["seed"], settings["sampling_temperature"], settings["do_sample"]) == (0, 1.0, True)
    student = str(tiny_model_folder("llama", num_layers=2, seed=1))
    train = {"student": student, "cache": config.output_dir, "method": "sft", "max_steps": 3, "logging_steps": 1}
    run_train(TrainConfig(**train, output_dir=tmp_path / "run", learning_rate=1e-2, device="cpu"))
    losses = [line["train/loss"] for line in read_metrics(tmp_path / "run")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("left", [0, 1, 200, 900])
def test_a_stopped_run_goes_on_to_the_same_responses(config, left: int) -> None:
    digest = CacheReader(run_cache_teacher(config)).digest
    file = responses_file(config.output_dir)
    whole = file.read_bytes()
    file.write_bytes(whole[:left])  # in the midst of a line
    again = config.model_copy(update={"generate_batch_size": 2})
    assert CacheReader(run_cache_teacher(again)).digest == digest
    assert file.read_bytes() == whole


def test_responses_of_other_settings_are_refused_by_name_and_overwritten_on_request(config) -> None:
    run_cache_teacher(config)
    other = config.model_copy(update={"sampling_temperature": 0.5})
    with pytest.raises(ValueError, match=r"(?s)sampling_temperature: there 1\.0, now 0\.5.*--overwrite"):
        run_cache_teacher(other)
    run_cache_teacher(other.model_copy(update={"overwrite": True}))
    file = responses_file(config.output_dir)
    file.write_text("something else\n")
    with pytest.raises(ValueError, match="no file of responses, or damaged"):
        run_cache_teacher(other)


def test_a_dry_run_writes_nothing(config) -> None:
    with pytest.raises(ValueError, match="7 of 7 responses are still to be written"):
        run_cache_teacher(config.model_copy(update={"dry_run": True, "overwrite": True}))
    assert not responses_file(config.output_dir).exists()


def test_several_ranks_do_not_write_one_file_of_responses(config, monkeypatch) -> None:
    ranks = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="one process writes the responses"):
        run_cache_teacher(config)


def test_a_second_run_is_told_who_generates(config, monkeypatch) -> None:
    """It is refused before it opens its teacher, and the first one is not disturbed."""
    ended = []

    def generate_beside_another_run(*arguments: Any, **settings: Any) -> Any:
        ended.append(in_child(lambda: run_cache_teacher(config.model_copy(update={"teacher": "nowhere"}))))
        return generate(*arguments, **settings)

    monkeypatch.setattr(generated_rows, "generate", generate_beside_another_run)
    run_cache_teacher(config)
    assert len(ended) == 3
    for one in ended:
        assert one.how == "refused", one.text
        assert f"is being written by another run: process {os.getpid()} on " in one.text
    assert not list(config.output_dir.glob("*.lock"))


def test_a_run_whose_seat_was_taken_away_adds_no_response(config, monkeypatch) -> None:
    def generate_and_lose_the_seat(*arguments: Any, **settings: Any) -> Any:
        (config.output_dir / "writer.0.lock").unlink()
        return generate(*arguments, **settings)

    monkeypatch.setattr(generated_rows, "generate", generate_and_lose_the_seat)
    with pytest.raises(CacheError, match="no longer this run's"):
        run_cache_teacher(config)
    assert len(responses_file(config.output_dir).read_text().splitlines()) == 1


def test_what_can_be_refused_is_refused_before_the_teacher_writes_anything(config, tmp_path, monkeypatch) -> None:
    cache = run_cache_teacher(config)
    written = responses_file(cache)
    written.unlink()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    monkeypatch.setattr(generated_rows, "generate", lambda *_, **__: pytest.fail("the teacher writes"))

    def run(**changes: Any) -> None:
        run_cache_teacher(config.model_copy(update=changes))

    with pytest.raises(CacheError, match="top_k: cache has"):
        run(top_k="8")
    for overwrite in (False, True):
        with pytest.raises(CacheError, match="holds something that is not a cache"):
            run(output_dir=tmp_path / "mine", overwrite=overwrite)
    with pytest.raises((CacheError, OSError), match=r"notes\.txt"):
        run(output_dir=tmp_path / "mine" / "notes.txt" / "cache")
    monkeypatch.setattr(free_space.shutil, "disk_usage", lambda path: SimpleNamespace(free=99))
    with pytest.raises(NoSpaceError, match="has 99 bytes free"):
        run(output_dir=tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "mine", "rows.jsonl"]


def test_sampling_flags_without_generate_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--sampling-temperature is for responses"):
        CacheTeacherConfig(teacher="t", dataset="d", output_dir=tmp_path, sampling_temperature=0.5)

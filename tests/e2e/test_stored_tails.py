"""Sketches and samples: from the teacher through the cache into a training step."""

from pathlib import Path

import numpy as np
import pytest
import torch

from distilllens import calibration
from distilllens.cache_teacher import run_cache_teacher
from distilllens.config import CacheTeacherConfig, NewStudentConfig, TrainConfig
from distilllens.divergence import forward_kl
from distilllens.matching import choose_tails, load_tails
from distilllens.metrics import read_metrics
from distilllens.models import load_model
from distilllens.new_student import run_new_student
from distilllens.targets import stack_targets
from distilllens.teacher_pass import TeacherPass
from distilllens.train import run_train
from distilllens_cache import CacheReader, CacheWriter, verify_cache

EVERYTHING = "lens=profile+sampled:6,final=profile+sketch:8+sampled:6"


@pytest.fixture(scope="module")
def rows(tiny_rows, write_jsonl, tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny_rows[:12])


@pytest.fixture(scope="module")
def make_cache(tiny_model_folder, rows, tmp_path_factory):
    def make(folder: Path | None = None, **settings) -> Path:
        settings = {"layers": "2", "top_k": "8", "calibration_targets": 200, "examples_per_shard": 5} | settings
        folder = folder or tmp_path_factory.mktemp("cache") / "cache"
        return run_cache_teacher(
            CacheTeacherConfig(
                teacher=str(tiny_model_folder("llama")),
                dataset=str(rows),
                codec="arrow-fp32",
                output_dir=folder,
                **settings,
            )
        )

    return make


def test_a_cache_with_every_tail_is_sound_and_says_what_it_stores(make_cache) -> None:
    folder = make_cache(store_tail=EVERYTHING)
    assert verify_cache(folder).problems == []
    reader = CacheReader(folder)
    example, layers = reader[0], reader.manifest.identity.layers
    assert example.targets[layers[0]].codes is None
    assert example.targets[layers[-1]].codes.shape == (len(example.target_positions), 8)
    for layer in layers:
        samples = example.targets[layer].samples
        assert np.add.reduceat(samples.draws.astype(int), samples.offsets[:-1]).tolist() == [6] * len(samples.counts)


def test_codes_read_through_the_sketch_are_near_the_teachers_tail(make_cache, tiny_model_folder) -> None:
    """At full rank and 8 bits next to nothing is lost."""
    folder = make_cache(store_tail="lens=none,final=profile+sketch:16:8")
    reader = CacheReader(folder)
    model = load_model(str(tiny_model_folder("llama")))
    size = reader.manifest.identity.vocab_size
    layer = reader.manifest.identity.layers[-1]
    choices = choose_tails(reader.manifest.identity, "final=sketch", [layer])
    tail = load_tails(reader, choices)[layer]
    worst = 0.0
    for example in reader:
        ids = torch.from_numpy(example.token_ids.astype(np.int64))[None]
        with torch.no_grad():
            live = model(ids).logits[0, torch.from_numpy(example.target_positions.astype(np.int64)), :size]
        targets = stack_targets([example.targets[layer]])
        gap = forward_kl(live.log_softmax(-1), tail.completed(targets, size))
        worst = max(worst, gap.max().item())
    assert worst < 0.01


def test_a_calibration_that_was_stopped_goes_on_to_the_same_bytes(make_cache, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(calibration, "CHUNK_EXAMPLES", 2)  # another cutting rounds the sums in another order
    whole = make_cache(store_tail=EVERYTHING)
    monkeypatch.setattr(calibration, "SECONDS_BETWEEN_STATES", 0.0)
    calls = []
    read = TeacherPass.read

    def stop_at_the_third(self, examples, layers, *, batch_tokens):
        calls.append(len(examples))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(self, examples, layers, batch_tokens=batch_tokens)

    monkeypatch.setattr(TeacherPass, "read", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        make_cache(tmp_path / "cache", store_tail=EVERYTHING)
    assert (tmp_path / "cache" / "calibration.bin").exists()
    make_cache(tmp_path / "cache", store_tail=EVERYTHING)
    assert len(calls) < 9  # the two chunks that were kept are not read again
    for name in ("manifest.json", "sketches/layer_4.arrow"):
        assert (tmp_path / "cache" / name).read_bytes() == (whole / name).read_bytes()
    assert not (tmp_path / "cache" / "calibration.bin").exists()


def test_a_stopped_pass_with_samples_ends_with_the_bytes_of_an_undisturbed_one(
    make_cache, monkeypatch, tmp_path
) -> None:
    whole = make_cache(store_tail=EVERYTHING)
    write, written = CacheWriter.write_shard, []

    def stop_at_the_second(self, number, examples, tails):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(number)
        write(self, number, examples, tails)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write_shard", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            make_cache(tmp_path / "cache", store_tail=EVERYTHING)
    make_cache(tmp_path / "cache", store_tail=EVERYTHING)
    assert (tmp_path / "cache" / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()


@pytest.fixture(scope="module")
def student(tiny_model_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "student"
    run_new_student(NewStudentConfig(from_model=str(tiny_model_folder("llama")), layers=2, output_dir=folder))
    return folder


@pytest.mark.parametrize(
    "tail", ["bucket", "profile", "sampled", "renorm", "lens=profile,final=sketch:4", "final=sketch,lens=sampled"]
)
def test_a_student_trains_from_every_tail(make_cache, student, tmp_path, tail: str) -> None:
    cache = make_cache(store_tail=EVERYTHING)
    run = tmp_path / "run"
    settings = {"per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3, "max_steps": 12}
    run_train(TrainConfig(student=str(student), cache=cache, tail=tail, output_dir=run, **settings))
    losses = [line["train/loss"] for line in read_metrics(run)]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


@pytest.mark.parametrize(
    ("stored", "tail", "message"),
    [
        ("profile", "final=sketch", "stores profile"),
        ("lens=profile,final=profile+sketch:8", "final=sketch:9", r"stores profile\+sketch:8"),
        ("lens=profile,final=profile+sketch:8", "sketch", "at layer 2"),
        ("none", "profile", "--tail bucket"),
        ("profile", "sampled", "--tail profile"),
    ],
)
def test_a_tail_that_is_not_stored_is_refused_with_what_is(
    make_cache, student, tmp_path, stored: str, tail: str, message: str
) -> None:
    cache = make_cache(store_tail=stored)
    with pytest.raises(ValueError, match=message):
        run_train(TrainConfig(student=str(student), cache=cache, tail=tail, output_dir=tmp_path / "run", max_steps=1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"store_tail": "final=sketch:4000"}, "hidden size"),
        ({"store_tail": "sketch"}, "--store-tail"),
        ({"min_prob": "2"}, "min-prob"),
        ({"top_p": "final=0"}, "top-p"),
        ({"min_k": "9"}, "min-k"),
        ({"top_k": "lens=4"}, "--top-k"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    make_cache, tmp_path, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_cache(tmp_path / "cache", **settings)
    assert not (tmp_path / "cache").exists()

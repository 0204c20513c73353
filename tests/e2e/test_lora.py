"""LoRA students: only adapters change, runs resume exactly, folders are PEFT's, and merging changes no logit."""

import json
import re
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

import distilllens.train as train_module
from distilllens.cache_teacher import run_cache_teacher
from distilllens.cli import main
from distilllens.config import CacheTeacherConfig, TrainConfig, load_config
from distilllens.metrics import read_metrics
from distilllens.models import load_model
from distilllens.teacher_forced import measured_student, score_against_cache
from distilllens.train import run_train
from distilllens.training_run import open_run
from distilllens_cache import CacheReader

pytest.importorskip("peft")

LORA = {"lora_r": 4, "lora_dropout": 0.1, "lora_target_modules": ("q_proj", "v_proj", "lm_head")}
TRAIN = {
    "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2, "save_steps": 2,
    "device": "cpu", "max_length": 300,
}  # fmt: skip
CLOCK = ("train/tokens_per_s", "train/data_wait", "train/peak_memory_gb")


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_model_folder, tiny_rows, write_jsonl) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    rows = write_jsonl(folder / "rows.jsonl", tiny_rows)
    config = {"layers": "2", "top_k": "16", "max_length": 300, "device": "cpu", "limit": 12, "store_tail": "profile"}
    teacher = str(tiny_model_folder("llama"))
    return run_cache_teacher(
        CacheTeacherConfig(teacher=teacher, dataset=str(rows), output_dir=folder / "cache", **config)
    )


@pytest.fixture(scope="module")
def base(tiny_model_folder) -> Path:
    return tiny_model_folder("llama", num_layers=3, seed=1)


def train(student: Path, cache: Path, folder: Path, **settings: object) -> list[dict[str, float]]:
    run_train(TrainConfig(student=str(student), cache=cache, output_dir=folder, **{**TRAIN, **settings}))
    return read_metrics(folder)


@pytest.fixture(scope="module")
def trained(base, cache, tmp_path_factory) -> Path:
    """A run of four steps, merged at its end."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(base, cache, folder, lora_merge=True, **LORA)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 23)[None]).logits


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def clockless(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def test_only_adapters_change_and_the_loss_falls(base, cache, tmp_path) -> None:
    config = TrainConfig(
        student=str(base), cache=cache, output_dir=tmp_path / "run", **{**TRAIN, **LORA, "max_steps": 12}
    )
    run = open_run(config, start_from=None)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    train_module.run_opened(run, torch.device("cpu"), None)
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]) is ("lora_" not in name), name
    assert any("lm_head.lora_" in name for name in before)
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]


def test_a_run_is_a_peft_folder_whose_base_is_the_student(base, trained) -> None:
    from peft import PeftModel

    settings = json.loads((trained / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 32, 0.1)
    assert settings["base_model_name_or_path"] == str(base)
    assert all("lora_" in name for name in adapter_weights(trained))
    assert not list(trained.glob("model*.safetensors"))
    assert (trained / "tokenizer.json").is_file()
    assert (trained / "checkpoint-2" / "adapter_config.json").is_file()
    unmerged, merged = PeftModel.from_pretrained(load_model(base), str(trained)), load_model(trained / "merged")
    assert (logits(unmerged) - logits(load_model(base))).abs().max() > 1e-2
    torch.testing.assert_close(logits(merged), logits(unmerged), atol=1e-4, rtol=1e-4)


def test_a_stopped_run_resumes_bitwise(base, cache, tmp_path) -> None:
    whole = train(base, cache, tmp_path / "run", **LORA)
    final = adapter_weights(tmp_path / "run")
    for name in ("checkpoint-4", "adapter_model.safetensors"):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = train(base, cache, tmp_path / "run", resume_from_checkpoint="latest", **LORA)
    assert clockless(resumed) == clockless(whole)
    again = adapter_weights(tmp_path / "run")
    assert final.keys() == again.keys()
    assert all(torch.equal(again[name], final[name]) for name in final)
    with pytest.raises(ValueError, match="  lora_r: the checkpoint has 4, this run has 8"):
        train(base, cache, tmp_path / "run", resume_from_checkpoint="latest", **{**LORA, "lora_r": 8})


def test_training_goes_on_from_an_adapter_and_evaluation_reads_it(trained, cache, tmp_path) -> None:
    more = train(trained, cache, tmp_path / "more")
    assert more[0]["train/loss"] < read_metrics(trained)[0]["train/loss"]
    settings = [json.loads((folder / "adapter_config.json").read_text()) for folder in (trained, tmp_path / "more")]
    assert settings[0]["base_model_name_or_path"] == settings[1]["base_model_name_or_path"]
    scores = []
    for folder in (tmp_path / "more", trained / "merged", trained):
        config = TrainConfig(student=str(folder), cache=cache, output_dir=tmp_path / "x")
        reader, tokenizer = CacheReader(cache), open_run(config, start_from=None).tokenizer
        scores.append(score_against_cache(*measured_student(load_model(folder), tokenizer, reader), reader))
    assert scores[0]["kl"] < scores[2]["kl"]
    assert scores[1]["kl"] == pytest.approx(scores[2]["kl"], abs=1e-4)


def test_an_adapter_on_the_hub_is_trained_on_as_one_in_a_folder(trained, cache, tmp_path, monkeypatch, capsys) -> None:
    repository = tmp_path / "hub" / "models--owner--adapter"
    ignored = shutil.ignore_patterns("checkpoint-*", "merged")
    shutil.copytree(trained, repository / "snapshots" / ("0" * 40), ignore=ignored)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    runs = {}
    for name, student in (("folder", trained), ("hub", Path("owner/adapter"))):
        runs[name] = train(student, cache, tmp_path / "runs" / name, max_steps=2)
        assert re.search(rf"{student} is a LoRA adapter of \S+: it is trained on", capsys.readouterr().err)
    assert [line["train/loss"] for line in runs["hub"]] == [line["train/loss"] for line in runs["folder"]]
    mine, theirs = (adapter_weights(tmp_path / "runs" / name) for name in ("hub", "folder"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def _foreign_base(adapter: Path, tiny_model_folder) -> None:
    other = tiny_model_folder("llama", num_layers=3, seed=2)
    _name_base(adapter, other)


def _smaller_base(adapter: Path, tiny_model_folder) -> None:
    _name_base(adapter, tiny_model_folder("llama", num_layers=2, seed=2))
    (adapter / "base_digest.json").unlink()


def _name_base(adapter: Path, base: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [(_foreign_base, "for another base: .* has other weights"), (_smaller_base, "for another base: .* has no module")],
)
def test_an_adapter_for_another_base_is_refused(
    trained, cache, tiny_model_folder, tmp_path, capsys, change, sentence: str
) -> None:
    copy = shutil.copytree(trained, tmp_path / "adapter", ignore=shutil.ignore_patterns("checkpoint-*", "merged"))
    change(copy, tiny_model_folder)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--student", str(copy), "--cache", str(cache), "--output-dir", str(tmp_path / "run")])
    assert stopped.value.code == 1
    assert re.search(sentence, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=sentence):
        load_model(copy)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lora_alpha": 8.0}, "--lora-alpha is for new adapters: give --lora-r"),
        ({"lora_dropout": 0.5}, "--lora-dropout is for new adapters"),
        ({"lora_target_modules": "q_proj"}, "--lora-target-modules is for new adapters"),
        ({"lora_r": 0}, "lora_r: Input should be greater"),
    ],
)
def test_settings_without_adapters_are_refused(settings: dict, sentence: str) -> None:
    flags = {"student": "s", "cache": "c", "output_dir": "o", **settings}
    with pytest.raises(ValueError, match=sentence):
        load_config(TrainConfig, file=None, flags=flags)


def test_what_cannot_be_adapted_is_refused_before_anything_is_written(
    base, trained, cache, tmp_path, monkeypatch
) -> None:
    for student, settings, sentence in (
        (trained, {"lora_r": 8}, "is an adapter with a rank of its own: drop --lora-r"),
        (base, {"lora_merge": True}, "--lora-merge: .* is no adapter and gets none"),
        (base, {"lora_r": 8, "lora_target_modules": ("wq",)}, "cannot get LoRA adapters: .*lora-target-modules"),
    ):
        with pytest.raises(ValueError, match=sentence):
            train(student, cache, tmp_path / "run", **settings)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"--lora-r needs peft: pip install 'distilllens\[lora\]'"):
        train(base, cache, tmp_path / "run", lora_r=8)
    assert not (tmp_path / "run").exists()

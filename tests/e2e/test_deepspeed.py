"""Two CPU ranks under DeepSpeed give the losses and weights of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distilllens.cache_teacher import run_cache_teacher
from distilllens.config import CacheTeacherConfig, TrainConfig
from distilllens.deepspeed_config import RunFacts, load_deepspeed_config
from distilllens.metrics import read_metrics
from distilllens.train import run_train

SETTINGS = {"max_steps": 4, "logging_steps": 1, "learning_rate": 2e-3, "save_steps": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_model_folder, tiny_rows, write_jsonl) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    rows = write_jsonl(folder / "rows.jsonl", tiny_rows)
    teacher = tiny_model_folder("llama")
    config = {"layers": "2", "top_k": "16", "max_length": 300, "device": "cpu", "limit": 12}
    return run_cache_teacher(
        CacheTeacherConfig(teacher=str(teacher), dataset=str(rows), output_dir=folder / "cache", **config)
    )


FUSED_ONLY = """
from distilllens import cli, losses

def refuse(*_):
    raise AssertionError("a loss took the plain way")

losses._plain = refuse
cli.main()
"""


def launch(
    student: Path,
    cache: Path,
    run: Path,
    *more: str,
    resume: bool = False,
    program: tuple[str, ...] = ("-m", "distilllens"),
) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    flags += ["--per-device-train-batch-size=2", "--gradient-accumulation-steps=2"]
    flags += [*more, *(["--resume-from-checkpoint"] if resume else [])]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29571",
    ]
    command += [
        *program,
        "train",
        f"--student={student}",
        f"--cache={cache}",
        f"--output-dir={run}",
        *flags,
    ]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_ranks_give_the_losses_and_weights_of_one_process_and_resume(cache, tiny_model_folder, tmp_path) -> None:
    student = tiny_model_folder("llama", num_layers=3, seed=1)
    config = {"student": str(student), "cache": cache, "per_device_train_batch_size": 8, **SETTINGS}
    run_train(TrainConfig(output_dir=tmp_path / "one", **config))
    launch(student, cache, tmp_path / "two")
    wanted = [line["train/loss"] for line in read_metrics(tmp_path / "one")]
    assert [line["train/loss"] for line in read_metrics(tmp_path / "two")] == pytest.approx(wanted, abs=1e-5)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=0)
    for file in (tmp_path / "two" / "checkpoint-4").rglob("*"):
        file.unlink() if file.is_file() else None
    launch(student, cache, tmp_path / "two", resume=True)
    assert [line["train/loss"] for line in read_metrics(tmp_path / "two")] == pytest.approx(wanted, abs=1e-5)


def test_a_student_sharded_by_zero_3_is_saved_whole(cache, tiny_model_folder, tmp_path) -> None:
    student = tiny_model_folder("llama", num_layers=3, seed=1)
    file = tmp_path / "zero3.json"
    file.write_text(
        '{"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto",'
        ' "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'
    )
    config = {"student": str(student), "cache": cache, "per_device_train_batch_size": 8, **SETTINGS}
    run_train(TrainConfig(output_dir=tmp_path / "one", **config))
    launch(student, cache, tmp_path / "three", f"--deepspeed={file}")
    wanted = [line["train/loss"] for line in read_metrics(tmp_path / "one")]
    assert [line["train/loss"] for line in read_metrics(tmp_path / "three")] == pytest.approx(wanted, abs=1e-5)
    one, three = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "three"))
    for name in one:
        torch.testing.assert_close(three[name], one[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_measure_and_select_as_one_process_does(cache, tiny_model_folder, tmp_path, stage: int) -> None:
    """Five rows to answer, on two ranks."""
    student = tiny_model_folder("llama", num_layers=3, seed=1)
    file = tmp_path / "zero.json"
    file.write_text(
        '{"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto",'
        f' "zero_optimization": {{"stage": {stage}, "stage3_param_persistence_threshold": 0}}}}'
    )
    rows = cache.parent / "rows.jsonl"
    held_out = {
        "eval_cache": cache, "eval_dataset": str(rows), "eval_limit": 5, "eval_max_new_tokens": 6, "eval_steps": 2,
        "max_length": 300, "metric_for_best_model": "kl",
    }  # fmt: skip
    config = {"student": str(student), "cache": cache, "per_device_train_batch_size": 8, **SETTINGS, **held_out}
    run_train(TrainConfig(output_dir=tmp_path / "one", load_best_model_at_end=True, **config))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in held_out.items()]
    launch(student, cache, tmp_path / "two", f"--deepspeed={file}", "--load-best-model-at-end", *flags)
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in two] == [line["step"] for line in one] == [1, 2, 2, 3, 4, 4]
    for mine, theirs in zip(two, one, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"train/tokens_per_s", "train/data_wait", "train/peak_memory_gb"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    samples = [json.loads((tmp_path / name / "lens_samples.json").read_text()) for name in ("one", "two")]
    assert samples[0]["step"] == samples[1]["step"]
    for mine, theirs in zip(samples[1]["examples"], samples[0]["examples"], strict=True):
        assert mine["pairs"][0]["jsd"] == pytest.approx(theirs["pairs"][0]["jsd"], abs=1e-3)
    mine, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("two", "one"))
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("task", ["fkl", "akl"])
def test_a_head_sharded_by_zero_3_is_whole_in_every_way_through_it(
    cache, tiny_model_folder, tmp_path, task: str
) -> None:
    """Ranks have different numbers of rows, so their numbers of chunks differ too. ``akl`` has no fused form."""
    student = tiny_model_folder("llama", num_layers=3, seed=1, tied=task == "akl")
    file, program = tmp_path / "zero3.json", tmp_path / "fused_only.py"
    file.write_text(
        '{"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto",'
        ' "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'
    )
    program.write_text(FUSED_ONLY)
    config = {"student": str(student), "cache": cache, "per_device_train_batch_size": 8, "task": task, **SETTINGS}
    run_train(TrainConfig(output_dir=tmp_path / "one", **config))
    way = (str(program),) if task == "fkl" else ("-m", "distilllens")
    flags = (f"--deepspeed={file}", "--loss-chunk-rows=5", f"--task={task}")
    launch(student, cache, tmp_path / "three", *flags, program=way)
    wanted = [line["train/loss"] for line in read_metrics(tmp_path / "one")]
    assert [line["train/loss"] for line in read_metrics(tmp_path / "three")] == pytest.approx(wanted, abs=1e-5)
    one, three = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "three"))
    for name in one:
        torch.testing.assert_close(three[name], one[name], atol=1e-4, rtol=0)


def test_a_lora_student_sharded_by_zero_3_learns_what_it_learns_alone(cache, tiny_model_folder, tmp_path) -> None:
    """With an adapter on the head that the lens must not train, and with chosen positions."""
    student = tiny_model_folder("llama", num_layers=3, seed=1)
    file = tmp_path / "zero3.json"
    file.write_text(
        '{"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto",'
        ' "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'
    )
    settings = {
        "lora_r": 4, "lora_target_modules": "q_proj,lm_head", "lora_merge": True, "lens_head_grad": "off",
        "positions_share": 0.5, "task": "rkl",
    }  # fmt: skip
    config = {"student": str(student), "cache": cache, "per_device_train_batch_size": 8, **SETTINGS, **settings}
    run_train(TrainConfig(output_dir=tmp_path / "one", **config))
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in settings.items()]
    launch(student, cache, tmp_path / "three", f"--deepspeed={file}", *flags)
    wanted = [line["train/loss"] for line in read_metrics(tmp_path / "one")]
    assert [line["train/loss"] for line in read_metrics(tmp_path / "three")] == pytest.approx(wanted, abs=1e-5)
    for name in ("adapter_model.safetensors", "merged/model.safetensors"):
        one, three = (load_file(tmp_path / run / name) for run in ("one", "three"))
        assert one.keys() == three.keys()
        for weight in one:
            torch.testing.assert_close(three[weight], one[weight], atol=1e-4, rtol=0)


def deepspeed_file(tmp_path: Path, text: str) -> TrainConfig:
    (tmp_path / "ds.json").write_text(text)
    return TrainConfig(student="s", cache=tmp_path, output_dir=tmp_path, deepspeed=tmp_path / "ds.json", bf16=True)


def test_every_auto_of_a_hugging_face_file_is_resolved(tmp_path) -> None:
    config = deepspeed_file(
        tmp_path,
        '{"train_batch_size": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"},'
        ' "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"},'
        ' "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}',
    )
    resolved = load_deepspeed_config(config, RunFacts(world_size=2, hidden_size=10))
    assert resolved["train_batch_size"] == 16
    assert resolved["bf16"] == {"enabled": True}
    assert resolved["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 100,
        "stage3_prefetch_bucket_size": 90,
    }
    assert "auto" not in str(resolved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"train_batch_size": 7}', "train_batch_size = 7, and the run says 16"),
        ('{"bf16": {"enabled": false}}', "bf16.enabled = False, and the run says True"),
        ('{"zero_optimization": {"stage": "auto"}}', "zero_optimization.stage has no meaning here"),
        ("{", "not valid JSON"),
    ],
)
def test_a_file_that_contradicts_the_run_is_refused_with_both_values(tmp_path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_deepspeed_config(deepspeed_file(tmp_path, text), RunFacts(world_size=2, hidden_size=10))

"""CPU ranks under DeepSpeed give the losses and weights of one process, at every stage, and go on from each other."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from distilllens.cache_teacher import run_cache_teacher
from distilllens.config import CacheTeacherConfig
from distilllens.example_log import read_examples
from distilllens.metrics import read_metrics
from distilllens_inspect.run_files import checkpoints

PROGRAM = Path(__file__).with_name("run_under_ranks.py")
EXAMPLES_PER_STEP = 8
SETTINGS = {
    "max_steps": 4, "logging_steps": 1, "learning_rate": 2e-3, "max_grad_norm": 0.1, "save_steps": 2, "device": "cpu",
    "log_example_ids": True,
}  # fmt: skip
CPU = {"device": "cpu"}
ZERO = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "2-offload": {"stage": 2, "offload_optimizer": CPU},
    "3-offload": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
}
"""With a threshold of 0 the smallest parameter is sharded, too."""


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_under_ranks", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_model_folder, tiny_rows, write_jsonl) -> dict:
    """Student and cache: examples of many lengths."""
    folder = tmp_path_factory.mktemp("deepspeed")
    rows = write_jsonl(folder / "rows.jsonl", tiny_rows)
    settings = {"layers": "2", "top_k": "16", "max_length": 300, "device": "cpu", "limit": 12}
    teacher = str(tiny_model_folder("llama"))
    config = CacheTeacherConfig(teacher=teacher, dataset=str(rows), output_dir=folder / "cache", **settings)
    student = tiny_model_folder("llama", num_layers=3, seed=1)
    return {"student": str(student), "cache": str(run_cache_teacher(config)), **SETTINGS}


@pytest.fixture(scope="module")
def one(base, program, tmp_path_factory) -> dict[str, Path]:
    """Runs of one process, in plain torch: usual, with blank examples, and with other losses and heads."""
    folder = tmp_path_factory.mktemp("one")
    runs = {name: folder / name for name in ("usual", "blank")}
    for name, run in runs.items():
        sizes = {"per_device_train_batch_size": EXAMPLES_PER_STEP}
        program.run({**base, **sizes, "output_dir": str(run)}, blank=name == "blank")
    return runs


def config_of(base: dict, run: Path, zero: str, *, world_size: int, micro_batches: int = 2, **more: object) -> dict:
    file = run.with_suffix(".json")
    file.write_text(json.dumps({"train_batch_size": "auto", "zero_optimization": ZERO[zero]}))
    sizes = {
        "per_device_train_batch_size": EXAMPLES_PER_STEP // micro_batches // world_size,
        "gradient_accumulation_steps": micro_batches,
    }
    return {**base, **sizes, "output_dir": str(run), "deepspeed": str(file), **more}


def launch(folder: Path, runs: list[dict], *, world_size: int) -> subprocess.CompletedProcess[str]:
    """Train ``runs`` in one launch of torchrun."""
    file = folder / "runs.json"
    file.write_text(json.dumps(runs, default=str))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    command += [str(PROGRAM), str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550, check=False)


@pytest.fixture(scope="module")
def two(base, tiny_model_folder, tmp_path_factory) -> dict[str, Path]:
    """The folders of runs of two ranks that different tests look at, from one launch: starting ranks takes longest."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("bfloat16", "head", "measured", "lora")}
    runs = in_bfloat16(base, folders["bfloat16"])
    for task in ("fkl", "akl"):
        settings = with_head(base, tiny_model_folder, task)
        config = config_of(settings, folders["head"] / task, "3", world_size=2, loss_chunk_rows=5)
        runs.append({"config": config, "only_fused": task == "fkl"})
    for zero in ("2", "3"):
        runs.append({"config": config_of(held_out(base), folders["measured"] / zero, zero, world_size=2)})
    adapters = config_of(with_adapters(base), folders["lora"] / "3", "3", world_size=2)
    runs.append({"config": adapters, "one_by_one": True})
    done = launch(tmp_path_factory.mktemp("two"), runs, world_size=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folders


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run)]


def require_equal(run: Path, wanted: Path, *, from_step: int = 0) -> None:
    """Losses to 1e-5, weights to 1e-4, the very same examples."""
    assert losses(run) == pytest.approx(losses(wanted)[from_step:], abs=1e-5)
    assert read_examples(run) == read_examples(wanted)[from_step:]
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (run, wanted))
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_stage_and_number_of_ranks_gives_the_numbers_of_one_process(base, one, tmp_path, world_size) -> None:
    """At one global batch, accumulated, of ragged examples of which most have no target, with clipped gradients."""
    runs = []
    for zero in ZERO:
        more = {"gradient_checkpointing": zero == "3", "eval_cache": base["cache"] if zero == "2" else None}
        config = config_of(base, tmp_path / zero, zero, world_size=world_size, **more)
        runs.append({"config": config, "blank": True, "one_by_one": True})
    done = launch(tmp_path, runs, world_size=world_size)
    assert done.returncode == 0, done.stderr[-3000:]
    for zero in ZERO:
        lines = read_metrics(tmp_path / zero)
        assert all(line["train/grad_norm"] > SETTINGS["max_grad_norm"] for line in lines if "train/loss" in line)
        if zero == "2":
            assert "eval/kl" in lines.pop()
            (tmp_path / zero / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        require_equal(tmp_path / zero, one["blank"])


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_and_another_stage(base, one, program, tmp_path) -> None:
    """1 -> 2, 2 -> 4 and 2 -> 1, each from the checkpoint after step 2."""
    ways = {2: {"1": one["usual"], "3": one["usual"], "0": one["usual"]}, 4: {"3": tmp_path / "2-1"}}
    ways[4]["2"] = tmp_path / "2-3"
    for world_size, froms in ways.items():
        runs = []
        for zero, start in froms.items():
            config = config_of(base, tmp_path / f"{world_size}-{zero}", zero, world_size=world_size)
            # Its first steps belong to another run's folder, as after a move.
            whole = config_of(base, tmp_path / f"{world_size}-{zero}-whole", zero, world_size=world_size)
            runs.append({"config": {**config, "resume_from_checkpoint": str(start / "checkpoint-2")}})
            runs.append({"config": whole}) if world_size == 2 else None
        done = launch(tmp_path, runs, world_size=world_size)
        assert done.returncode == 0, done.stderr[-3000:]
        for zero in froms:
            require_equal(tmp_path / f"{world_size}-{zero}", one["usual"], from_step=2)
        if world_size == 2:
            for zero in ("1", "3"):
                shutil.copytree(tmp_path / f"2-{zero}-whole" / "checkpoint-2", tmp_path / f"2-{zero}" / "checkpoint-2")
    for zero in ("0", "1", "3"):
        sizes = {"per_device_train_batch_size": EXAMPLES_PER_STEP}
        start = tmp_path / f"2-{zero}-whole" / "checkpoint-2"
        program.run({**base, **sizes, "output_dir": str(tmp_path / f"1-{zero}"), "resume_from_checkpoint": str(start)})
        require_equal(tmp_path / f"1-{zero}", one["usual"], from_step=2)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["2", "3"])
def test_a_run_whose_ranks_are_killed_twice_ends_with_the_very_numbers_of_one_that_is_not(base, tmp_path, zero) -> None:
    whole = {"config": config_of(base, tmp_path / "whole", zero, world_size=2, save_steps=1)}
    mine = config_of(base, tmp_path / "killed", zero, world_size=2, save_steps=1, resume_from_checkpoint="latest")
    done = launch(tmp_path, [whole, {"config": mine, "die_in_step": 2, "rank": "1"}], world_size=2)
    assert done.returncode != 0
    assert len(losses(tmp_path / "killed")) == 1
    assert launch(tmp_path, [{"config": mine, "die_in_step": 3, "rank": "0"}], world_size=2).returncode != 0
    assert [folder.name for folder in checkpoints(tmp_path / "killed")] == [f"checkpoint-{n}" for n in (1, 2, 3)]
    assert launch(tmp_path, [{"config": mine}], world_size=2).returncode == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert read_examples(tmp_path / "killed") == read_examples(tmp_path / "whole")
    mine, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def in_bfloat16(base: dict, folder: Path) -> list[dict]:
    runs = []
    for zero in ("0", "1", "2", "3-offload"):
        config = config_of(base, folder / zero, zero, world_size=2, bf16=True)
        stored = json.loads(Path(config["deepspeed"]).read_text()) | {"bf16": {"enabled": "auto"}}
        Path(config["deepspeed"]).write_text(json.dumps(stored))
        again = {**config, "output_dir": str(folder / f"{zero}-again")}
        runs += [{"config": config}, {"config": {**again, "resume_from_checkpoint": f"{folder}/{zero}/checkpoint-2"}}]
    return runs


@pytest.mark.slow
def test_bfloat16_follows_one_process_at_every_stage_and_resumes_exactly(base, program, two, tmp_path) -> None:
    sizes = {"per_device_train_batch_size": EXAMPLES_PER_STEP}
    program.run({**base, **sizes, "bf16": True, "output_dir": str(tmp_path / "one")})
    for zero in ("0", "1", "2", "3-offload"):
        run = two["bfloat16"] / zero
        assert losses(run) == pytest.approx(losses(tmp_path / "one"), rel=0.02)
        assert losses(run.with_name(f"{zero}-again")) == losses(run)[2:]


def with_head(base: dict, tiny_model_folder, task: str) -> dict:
    student = str(tiny_model_folder("llama", num_layers=3, seed=1, tied=task == "akl"))
    return {**base, "student": student, "task": task}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["fkl", "akl"])
def test_a_head_sharded_by_zero_3_is_whole_in_every_way_through_it(
    base, program, two, tiny_model_folder, tmp_path, task: str
) -> None:
    """Ranks have different numbers of rows, so their numbers of chunks differ too. ``akl`` has no fused form."""
    one = {"per_device_train_batch_size": EXAMPLES_PER_STEP, "output_dir": str(tmp_path / "one")}
    program.run({**with_head(base, tiny_model_folder, task), **one})
    require_equal(two["head"] / task, tmp_path / "one")


def held_out(base: dict) -> dict:
    return {
        **base,
        "eval_cache": base["cache"], "eval_dataset": str(Path(base["cache"]).parent / "rows.jsonl"), "eval_limit": 5,
        "eval_max_new_tokens": 6, "eval_steps": 2, "max_length": 300, "metric_for_best_model": "kl",
        "load_best_model_at_end": True,
    }  # fmt: skip


@pytest.mark.slow
def test_ranks_measure_and_select_as_one_process_does(base, program, two, tmp_path) -> None:
    """Five rows to answer, on two ranks."""
    sizes = {"per_device_train_batch_size": EXAMPLES_PER_STEP, "output_dir": str(tmp_path / "one")}
    program.run({**held_out(base), **sizes})
    one, wanted = (read_metrics(tmp_path / "one"), load_file(tmp_path / "one" / "model.safetensors"))
    for zero in ("2", "3"):
        run = two["measured"] / zero
        lines = read_metrics(run)
        assert [line["step"] for line in lines] == [line["step"] for line in one] == [1, 2, 2, 3, 4, 4]
        for mine, theirs in zip(lines, one, strict=True):
            assert mine.keys() == theirs.keys()
            for name in mine.keys() - {"train/tokens_per_s", "train/data_wait", "train/peak_memory_gb"}:
                assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
        samples = [json.loads((folder / "lens_samples.json").read_text()) for folder in (tmp_path / "one", run)]
        assert samples[0]["step"] == samples[1]["step"]
        for mine, theirs in zip(samples[1]["examples"], samples[0]["examples"], strict=True):
            assert mine["pairs"][0]["jsd"] == pytest.approx(theirs["pairs"][0]["jsd"], abs=1e-3)
        found = load_file(run / "model.safetensors")
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], atol=1e-4, rtol=0)


def with_adapters(base: dict) -> dict:
    return {
        **base, "lora_r": 4, "lora_target_modules": "q_proj,lm_head", "lora_merge": True, "lens_head_grad": "off",
        "positions_share": 0.5, "task": "rkl",
    }  # fmt: skip


@pytest.mark.slow
def test_a_lora_student_sharded_by_zero_3_learns_what_it_learns_alone(base, program, two, tmp_path) -> None:
    """With an adapter on the head that the lens must not train, and with chosen positions."""
    sizes = {"per_device_train_batch_size": EXAMPLES_PER_STEP, "output_dir": str(tmp_path / "one")}
    program.run({**with_adapters(base), **sizes})
    assert losses(two["lora"] / "3") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    for name in ("adapter_model.safetensors", "merged/model.safetensors"):
        one, three = (load_file(run / name) for run in (tmp_path / "one", two["lora"] / "3"))
        assert one.keys() == three.keys()
        for weight in one:
            torch.testing.assert_close(three[weight], one[weight], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_signal_to_one_of_slurms_ranks_makes_all_of_them_save_and_exit_130(base, one, program, tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = config_of({**base, "max_steps": 400}, tmp_path / "run", "1", world_size=2)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in config.items() if name != "log_example_ids"]
    command = [sys.executable, "-m", "distilllens", "train", *flags, "--log-example-ids"]
    slurm = {"SLURM_NTASKS": "2", "SLURM_NODELIST": "localhost", "SLURM_JOB_ID": "77", "MASTER_PORT": str(port)}
    environment = {**os.environ, **slurm, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            command, env={**environment, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()) and all(rank.poll() is None for rank in ranks):
        time.sleep(0.1)
    ranks[1].send_signal(signal.SIGTERM)
    said = [rank.communicate(timeout=500)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [130, 130], said
    last = checkpoints(tmp_path / "run")[-1]
    assert last.name == f"checkpoint-{len(losses(tmp_path / 'run'))}"
    assert f"Saved {last}" in said[0]

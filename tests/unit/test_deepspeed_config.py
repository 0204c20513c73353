"""DeepSpeed files as Hugging Face's trainer takes them: every "auto" filled in, every conflict and mistake named."""

import json
from pathlib import Path

import pytest

from distilllens.config import TrainConfig
from distilllens.deepspeed_config import ResolvedDeepSpeed, RunFacts, load_deepspeed_config, shipped_configs

FACTS = RunFacts(world_size=2, hidden_size=10, num_steps=40)
HUGGING_FACE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
             "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW",
                  "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupDecayLR",
                  "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto",
                             "total_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
}  # fmt: skip
"""The ZeRO-3 file of transformers' documentation, with its linear schedule."""


def load(tmp_path: Path, text: str | dict, **settings: object) -> ResolvedDeepSpeed:
    (tmp_path / "ds.json").write_text(text if isinstance(text, str) else json.dumps(text))
    run = {"student": "s", "cache": tmp_path, "output_dir": tmp_path, "deepspeed": tmp_path / "ds.json", "bf16": True}
    return load_deepspeed_config(TrainConfig(**{**run, **settings}), FACTS)


def test_every_auto_of_a_hugging_face_file_is_resolved_and_told(tmp_path) -> None:
    resolved = load(tmp_path, HUGGING_FACE, warmup_ratio=0.1, lr_scheduler_type="linear")
    assert resolved.autos == {
        "fp16.enabled": False, "bf16.enabled": True,
        "optimizer.params.lr": 2e-4, "optimizer.params.betas": [0.9, 0.999], "optimizer.params.eps": 1e-8,
        "optimizer.params.weight_decay": 0.01,
        "scheduler.params.warmup_min_lr": 0, "scheduler.params.warmup_max_lr": 2e-4,
        "scheduler.params.warmup_num_steps": 4, "scheduler.params.total_num_steps": 40,
        "zero_optimization.reduce_bucket_size": 100, "zero_optimization.stage3_prefetch_bucket_size": 90,
        "zero_optimization.stage3_param_persistence_threshold": 100,
        "gradient_accumulation_steps": 1, "gradient_clipping": 1.0, "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 8,
    }  # fmt: skip
    assert "auto" not in str(resolved.values)
    assert {"optimizer", "scheduler"}.isdisjoint(resolved.values)  # the run's own are used
    assert resolved.offloads_optimizer
    assert "ZeRO stage 3" in resolved.report
    for key, value in resolved.autos.items():
        assert f"{key}: auto -> {json.dumps(value)}" in resolved.report


def test_what_a_file_leaves_out_is_the_runs_own(tmp_path) -> None:
    sizes = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4}
    resolved = load(tmp_path, {"zero_optimization": {"stage": 1}}, max_grad_norm=0.5, bf16=False, **sizes)
    assert resolved.values["train_batch_size"] == 2 * 3 * 4
    assert resolved.values["gradient_clipping"] == 0.5
    assert not resolved.autos


@pytest.mark.parametrize("name", [None, *shipped_configs()])
def test_a_shipped_file_is_reached_by_its_name(tmp_path, name: str | None) -> None:
    resolved = load(tmp_path, "", deepspeed=name and Path(name))
    stage = int((name or "zero2")[4])
    assert resolved.values["zero_optimization"]["stage"] == stage
    assert resolved.offloads_optimizer == (name is not None and "offload" in name)
    assert resolved.values["bf16"] == {"enabled": True}


def test_the_shipped_files_are_these() -> None:
    assert shipped_configs() == ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]


def test_another_schedule_is_told_unless_both_were_asked_for(tmp_path) -> None:
    file = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}
    assert "WarmupLR is not used; the run's schedule is cosine" in load(tmp_path, file).report
    with pytest.raises(ValueError, match=r"WarmupLR \(constant\), and the run says --lr-scheduler-type linear"):
        load(tmp_path, file, lr_scheduler_type="linear")
    assert not load(tmp_path, file, lr_scheduler_type="constant", bf16=False).notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"train_batch_size": 7}', "train_batch_size = 7, and the run says 16"),
        ('{"gradient_clipping": 0.3}', "gradient_clipping = 0.3, and the run says 1.0"),
        ('{"bf16": {"enabled": false}}', "bf16.enabled = False, and the run says True"),
        ('{"fp16": {"enabled": true}}', "fp16.enabled = True, and the run says False"),
        ('{"optimizer": {"type": "AdamW", "params": {"lr": 1}}}', "optimizer.params.lr = 1, and the run says 0.0002"),
        ('{"optimizer": {"type": "Lion"}}', r'optimizer \{"type": "Lion"\}, and the run says AdamW'),
        ('{"scheduler": {"type": "OneCycle"}}', "scheduler.type = OneCycle: expected one of WarmupLR"),
        ('{"zero_optimization": {"stage": "auto"}}', "zero_optimization.stage has no meaning here"),
        ('{"zero_optimization": {"stage": 7}}', "zero_optimization.stage = 7: "),
        (
            '{"zero_optimization": {"stag": 2}}',
            "zero_optimization.stag is not a .* did you mean zero_optimization.stage",
        ),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}}',
            "zero_optimization.offload_optimizer.devise is not a DeepSpeed key",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}}',
            "offload_param.device = nvme: train offloads to cpu only",
        ),
        ('{"zero_optimisation": {"stage": 2}}', "zero_optimisation is not .* did you mean zero_optimization"),
        ('{"bf16": {"enable": true}}', "bf16.enable is not a DeepSpeed key .* did you mean bf16.enabled"),
        ('{"optimizer": {"type": "AdamW", "params": {"learning_rate": 1}}}', "optimizer.params.learning_rate is not"),
        ('{"elasticity": {"enabled": true}}', "elasticity is not a DeepSpeed key that train takes"),
        ('{"bf16": true}', "bf16 is true, expected a section"),
        ("[]", "holds a list"),
        ("{", "not valid JSON"),
    ],
)
def test_a_file_with_a_mistake_is_refused_in_one_sentence(tmp_path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "idle"), [(0, ["offload_optimizer", "offload_param"]), (2, ["offload_param"]), (3, [])]
)
def test_offload_that_a_stage_has_no_use_for_is_left_out_and_told(tmp_path, stage: int, idle: list[str]) -> None:
    both = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    resolved = load(tmp_path, {"zero_optimization": {"stage": stage, **both}}, bf16=False)
    assert set(both) - set(resolved.values["zero_optimization"]) == set(idle)
    assert resolved.offloads_optimizer == (stage > 0)
    assert [note.split()[0] for note in resolved.notes] == [f"zero_optimization.{key}" for key in idle]


def test_before_the_model_is_opened_what_only_it_can_tell_is_not_compared(tmp_path) -> None:
    file = tmp_path / "ds.json"
    settings = {"student": "s", "cache": tmp_path, "output_dir": tmp_path, "deepspeed": file}
    config, early = TrainConfig(**settings), RunFacts(world_size=2, hidden_size=None, num_steps=None)
    schedule = {"warmup_num_steps": 3, "total_num_steps": 41}
    file.write_text(json.dumps({**HUGGING_FACE, "scheduler": {"type": "WarmupCosineLR", "params": schedule}}))
    load_deepspeed_config(config, early)
    with pytest.raises(ValueError, match="warmup_num_steps = 3, and the run says 0"):
        load_deepspeed_config(config, FACTS)
    file.write_text('{"train_batch_size": 7}')
    with pytest.raises(ValueError, match="train_batch_size = 7, and the run says 16"):
        load_deepspeed_config(config, early)


def test_a_file_that_is_not_there_is_refused_with_the_names_that_are(tmp_path) -> None:
    with pytest.raises(ValueError, match="neither a file nor one of zero1, zero2, zero2_offload"):
        load(tmp_path, "", deepspeed=Path("zero9"))

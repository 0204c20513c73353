"""Training from a cache on tiny models: the same numbers as with the teacher in memory, exactly resumable."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import distilllens.train as train_module
from distilllens.cache_teacher import run_cache_teacher
from distilllens.checkpoint import OURS, STATE
from distilllens.config import CacheTeacherConfig, TrainConfig
from distilllens.divergence import jensen_shannon
from distilllens.metrics import read_metrics
from distilllens.schedule import learning_rate
from distilllens.targets import entropies, stack_targets
from distilllens.train import run_train
from distilllens_cache import CacheError, CacheReader
from distilllens_cache.sealed_json import seal

CACHE = {
    "layers": "2", "top_k": "16", "min_prob": "0", "store_tail": "profile", "max_length": 300, "examples_per_shard": 5,
    "device": "cpu",
}  # fmt: skip
TRAIN = {
    "max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 2e-3, "save_steps": 3,
    "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory, tiny_rows, write_jsonl) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny_rows)


@pytest.fixture(scope="module")
def make_cache(tmp_path_factory, tiny_model_folder, rows):
    """``make_cache(teacher_settings, **cache_settings)``; equal arguments give one cache."""
    made: dict[str, Path] = {}

    def make(teacher: dict | None = None, **settings: object) -> Path:
        key = json.dumps([teacher, settings], sort_keys=True)
        if key not in made:
            source = tiny_model_folder(**(teacher or {"architecture": "llama"}))
            folder = tmp_path_factory.mktemp("caches") / "cache"
            config = {"teacher": str(source), "dataset": str(rows), "output_dir": folder, **CACHE, **settings}
            made[key] = run_cache_teacher(CacheTeacherConfig(**config))
        return made[key]

    return make


@pytest.fixture
def student(tiny_model_folder) -> Path:
    return tiny_model_folder("llama", num_layers=3, seed=1)


def train(student: Path, cache: Path, folder: Path, **settings: object) -> list[dict[str, float]]:
    run_train(TrainConfig(student=str(student), cache=cache, output_dir=folder, **{**TRAIN, **settings}))
    return read_metrics(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_student_learns_and_loads_with_plain_transformers(student, make_cache, tmp_path) -> None:
    lines = train(student, make_cache(), tmp_path / "run", max_steps=30, eval_cache=make_cache(), save_steps=100)
    first, last = lines[0], lines[-2]
    assert [line["step"] for line in lines] == [*range(1, 31), 30]
    assert last["train/loss"] < 0.5 * first["train/loss"]
    assert first["train/loss"] == pytest.approx(first["train/task"] + first["train/lens/2:2"], rel=1e-5)
    assert lines[-1]["eval/kl"] < first["train/task"]
    for name, line in (("train/lens", first), ("train/lens", last), ("eval/lens_jsd", lines[-1])):
        low, high = line[f"{name}_low/2:2"], line[f"{name}_high/2:2"]
        assert 0 < low < line[f"{name}/2:2"] < high < math.log(2)
        assert line[name] == line[f"{name}/2:2"]  # the mean over pairs, limits not among them
    before, after = weights(student), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("lens_norm", ["final", "none"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_a_teacher_trained_as_its_own_student_has_no_loss(
    make_cache, tiny_model_folder, tmp_path, architecture: str, tied: bool, lens_norm: str
) -> None:
    teacher = {"architecture": architecture, "tied": tied}
    cache = make_cache(teacher, layers="1,2,3", top_k="320", codec="arrow-fp32", lens_norm=lens_norm)
    # An untrained teacher with tied embeddings echoes its input, which the canary takes for a shift.
    settings = {"max_steps": 1, "pairs": "1:1,2:2,3:3", "allow_mismatch": "alignment" if tied else None}
    lines = train(tiny_model_folder(**teacher), cache, tmp_path / "run", **settings)
    assert abs(lines[0]["train/loss"]) < 1e-5
    assert abs(lines[0]["train/lens"]) < 1e-6


def test_training_from_a_lossless_cache_gives_the_curve_of_the_teacher_in_memory(
    student, make_cache, tiny_model_folder, tmp_path
) -> None:
    """The live loop is written anew here, dense and without anything of ours but the order of the examples."""
    steps, cache = 20, make_cache(top_k="320", codec="arrow-fp32")
    settings = {"task": "rkl", "kd_ratio": 0.8, "lens_weight": 0.5, "max_steps": steps, "save_steps": 100}
    for tail in ("bucket", "profile"):
        cached = train(student, cache, tmp_path / tail, tail=tail, gradient_accumulation_steps=2, **settings)
        live = live_curve(student, tiny_model_folder("llama"), cache, steps, tmp_path / tail)
        assert [line["train/loss"] for line in cached] == pytest.approx(live, abs=1e-5)


@pytest.mark.parametrize("lens_rows", [1.0, 0.5])
def test_packing_changes_neither_examples_nor_losses(student, make_cache, tmp_path, lens_rows: float) -> None:
    cache = make_cache()
    padded, packed = (
        train(student, cache, tmp_path / str(packing), packing=packing, lens_rows=lens_rows)
        for packing in (False, True)
    )
    for name in ("train/loss", "train/task", "train/lens/2:2", "train/grad_norm"):
        assert [line[name] for line in packed] == pytest.approx([line[name] for line in padded], rel=1e-5)


def live_curve(student: Path, teacher: Path, cache: Path, steps: int, run: Path) -> list[float]:
    from distilllens.batches import Steps

    mine, theirs = (AutoModelForCausalLM.from_pretrained(folder) for folder in (student, teacher))
    reader = CacheReader(cache)
    order = Steps(reader, TrainConfig(student="", cache=cache, output_dir=run).seed, 8, 1)
    config = TrainConfig(student="", cache=cache, output_dir=run, **TRAIN)
    decayed = [p for p in mine.parameters() if p.ndim > 1]
    others = [p for p in mine.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer, losses = torch.optim.AdamW(groups), []
    for step in range(steps):
        total, count = torch.zeros(()), 0
        for index in order.indices(step):
            example = reader[index]
            ids = torch.tensor(example.token_ids.astype("int64"))[None]
            where = torch.tensor(example.target_positions.astype("int64"))
            p, q = theirs(ids, output_hidden_states=True), mine(ids, output_hidden_states=True)
            log_p, log_q = (out.logits[0, where].log_softmax(-1) for out in (p, q))
            lens_p, lens_q = (
                model.lm_head(model.model.norm(out.hidden_states[2]))[0, where].log_softmax(-1)
                for model, out in ((theirs, p), (mine, q))
            )
            ce = -log_q.gather(-1, ids[0, where + 1][:, None]).sum()
            rkl = (log_q.exp() * (log_q - log_p.detach())).sum()
            jsd = jensen_shannon(lens_p.detach(), lens_q).sum()
            total, count = total + 0.2 * ce + 0.8 * (rkl + 0.5 * jsd), count + len(where)
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mine.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps=steps, config=config)
        optimizer.step()
        losses.append(loss.item())
    return losses


CLOCK = ("train/tokens_per_s", "train/data_wait", "train/peak_memory_gb")


def without_clock(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


@pytest.mark.parametrize(("architecture", "logging_steps"), [("llama", 1), ("gpt2", 1), ("llama", 3)])
def test_a_run_stopped_anywhere_resumes_to_the_same_losses_and_weights(
    make_cache, tiny_model_folder, tmp_path, monkeypatch, architecture: str, logging_steps: int
) -> None:
    """GPT-2 has dropout here, whose masks must not depend on where a run stopped."""
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1} if architecture == "gpt2" else {}
    student = tiny_model_folder(architecture, num_layers=3, seed=1, **dropout)
    settings = {"logging_steps": logging_steps}
    whole = train(student, make_cache(), tmp_path / "whole", **settings)
    update, calls = train_module.Engine.any, []

    def ask_at(number: int):
        def asked(self, claim: bool) -> bool:
            calls.append(1)
            return len(calls) == number

        return asked

    for number in (2, 2):
        calls.clear()
        monkeypatch.setattr(train_module.Engine, "any", ask_at(number))
        with pytest.raises(KeyboardInterrupt):
            train(student, make_cache(), tmp_path / "stopped", resume_from_checkpoint="latest", **settings)
    monkeypatch.setattr(train_module.Engine, "any", update)
    resumed = train(student, make_cache(), tmp_path / "stopped", resume_from_checkpoint="latest", **settings)
    assert without_clock(resumed) == without_clock(whole)
    mine, theirs = weights(tmp_path / "stopped"), weights(tmp_path / "whole")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_killed_run_resumes_from_its_last_whole_checkpoint(student, make_cache, tmp_path) -> None:
    whole = train(student, make_cache(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    (tmp_path / "run" / "checkpoint-5").mkdir()  # without its state: half a checkpoint
    (tmp_path / "run" / "checkpoint-4.tmp").mkdir()
    resumed = train(student, make_cache(), tmp_path / "run", resume_from_checkpoint="latest")
    assert without_clock(resumed) == without_clock(whole)


def test_resuming_with_another_cache_or_loss_is_refused_by_field(student, make_cache, tmp_path) -> None:
    train(student, make_cache(), tmp_path / "run")
    with pytest.raises(ValueError, match=r"  lens_weight: the checkpoint has 1\.0, this run has 0\.5"):
        train(student, make_cache(), tmp_path / "run", resume_from_checkpoint="latest", lens_weight=0.5)
    with pytest.raises(ValueError, match="  cache: "):
        train(student, make_cache(top_k="8"), tmp_path / "run", resume_from_checkpoint="latest")


def test_a_run_is_not_overwritten_by_accident(student, make_cache, tmp_path) -> None:
    train(student, make_cache(), tmp_path / "run", max_steps=1)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="--resume-from-checkpoint continues it, --overwrite begins anew"):
        train(student, make_cache(), tmp_path / "run", max_steps=1)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not a run"):
        train(student, make_cache(), tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_old_checkpoints_go_and_the_newest_stay(student, make_cache, tmp_path) -> None:
    train(student, make_cache(), tmp_path / "run", save_steps=1, save_total_limit=2)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
        "checkpoint-5",
        "checkpoint-6",
    ]


def test_without_a_limit_all_checkpoints_stay_and_the_loss_is_watched_after_the_warm_up(
    student, make_cache, tmp_path
) -> None:
    train(student, make_cache(), tmp_path / "run", save_steps=2, warmup_steps=2)
    names = [f"checkpoint-{step}" for step in (2, 4, 6)]
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == names
    states = [json.loads((tmp_path / "run" / name / STATE).read_text()) for name in names]
    watched = [state["stateful_callbacks"][OURS]["attributes"]["loss_watch"]["recent"] for state in states]
    assert [len(recent) for recent in watched] == [0, 2, 4]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    student, make_cache, tmp_path, monkeypatch
) -> None:
    good, calls = train_module.start_engine, []

    def poisoned(*arguments, **settings):
        engine = good(*arguments, **settings)
        run = engine.forward

        def with_nan(batch, **options):
            if "read" in options:  # the check before the first step
                return run(batch, **options)
            calls.append(1)
            losses = run(batch, **options)
            return {**losses, "total": losses["total"] * float("nan")} if len(calls) == 5 else losses

        engine.forward = with_nan
        return engine

    monkeypatch.setattr(train_module, "start_engine", poisoned)
    with pytest.raises(ValueError, match=r"the loss of step 5 is nan.*Examples of the batch: "):
        train(student, make_cache(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run" / "checkpoint-3").values())


def test_the_teachers_files_are_not_needed(student, tiny_model, tiny_tokenizer, rows, tmp_path, monkeypatch) -> None:
    teacher = tmp_path / "teacher"
    tiny_model("llama", seed=3).save_pretrained(teacher)
    tiny_tokenizer.save_pretrained(teacher)
    config = {"teacher": str(teacher), "dataset": str(rows), "output_dir": tmp_path / "cache", **CACHE}
    cache = run_cache_teacher(CacheTeacherConfig(**config))
    shutil.rmtree(teacher)
    moved = cache.rename(tmp_path / "elsewhere")
    assert train(student, moved, tmp_path / "run", max_steps=2)


def test_fine_tuning_needs_no_cache(student, rows, make_cache, tmp_path) -> None:
    config = TrainConfig(
        student=str(student), method="sft", dataset=str(rows), output_dir=tmp_path / "run", eval_cache=make_cache(),
        max_length=300, **{**TRAIN, "max_steps": 20, "save_steps": 100},
    )  # fmt: skip
    run_train(config)
    lines = read_metrics(tmp_path / "run")
    assert lines[-2]["train/loss"] == pytest.approx(lines[-2]["train/ce"])
    assert lines[-2]["train/loss"] < lines[0]["train/loss"]
    assert "eval/kl" in lines[-1]


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"loss_chunk_rows": 3},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
)
def test_saving_memory_changes_no_number(student, make_cache, tmp_path, settings) -> None:
    plain = train(student, make_cache(), tmp_path / "plain", max_steps=3)
    lean = train(student, make_cache(), tmp_path / "lean", max_steps=3, **settings)
    assert [line["train/loss"] for line in lean] == pytest.approx([line["train/loss"] for line in plain], abs=1e-5)


def test_a_quarter_of_the_lens_rows_trains_alike_however_a_step_is_divided_or_stopped(
    student, make_cache, tmp_path
) -> None:
    settings = {"lens_rows": 0.25, "max_steps": 12, "save_steps": 6}
    full = train(student, make_cache(), tmp_path / "full", **{**settings, "lens_rows": 1.0})
    some = train(student, make_cache(), tmp_path / "some", **settings)
    assert [line["train/lens"] for line in some] != [line["train/lens"] for line in full]
    for name in ("train/lens", "train/kept_mass/2:2", "train/student_mass/2:2"):
        whole, estimate = (sum(line[name] for line in lines) / len(lines) for lines in (full, some))
        assert estimate == pytest.approx(whole, rel=0.2)
    assert all(line["train/lens_low/2:2"] < line["train/lens_high/2:2"] for line in some)
    half = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    parted = train(student, make_cache(), tmp_path / "parted", **settings, **half)
    for name in ("train/loss", "train/lens", "train/grad_norm"):
        assert [line[name] for line in parted] == pytest.approx([line[name] for line in some], abs=1e-5)
    shutil.rmtree(tmp_path / "some" / "checkpoint-12")
    resumed = train(student, make_cache(), tmp_path / "some", resume_from_checkpoint="latest", **settings)
    assert without_clock(resumed) == without_clock(some)
    with pytest.raises(ValueError, match=r"  lens_rows: the checkpoint has 0\.25, this run has 0\.5"):
        train(
            student, make_cache(), tmp_path / "some", resume_from_checkpoint="latest", **{**settings, "lens_rows": 0.5}
        )


def test_schedule_gate_and_chosen_positions_train_alike_however_a_step_is_divided_or_stopped(
    student, make_cache, tmp_path
) -> None:
    reader = CacheReader(make_cache())
    found = {layer: entropies(stack_targets([one.targets[layer] for one in reader])) for layer in (2, 4)}
    settings = {
        "task": "rkl", "lens_schedule": "warm-off:0.5", "positions_share": 0.5, "lens_head_grad": "off",
        "entropy_gate": f"final={found[4].median().item()},lens={found[2].median().item()}",
    }  # fmt: skip
    some = train(student, make_cache(), tmp_path / "some", **settings)
    assert [line["train/lens_weight"] for line in some] == [1, 1, 1, 0, 0, 0]
    for line in some:
        expected = line["train/task"] + line["train/lens_weight"] * line["train/lens"]
        assert line["train/loss"] == pytest.approx(expected, rel=1e-5)
    unsure = [line.get(f"train/unsure/{where}") for line in some for where in ("final", "2:2")]
    assert all(0 <= share <= 1 for share in unsure)
    assert any(0 < share < 1 for share in unsure)
    half = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    parted = train(student, make_cache(), tmp_path / "parted", **settings, **half)
    for name in ("train/loss", "train/lens", "train/grad_norm", "train/unsure/2:2"):
        assert [line[name] for line in parted] == pytest.approx([line[name] for line in some], abs=1e-5)
    shutil.rmtree(tmp_path / "some" / "checkpoint-6")
    resumed = train(student, make_cache(), tmp_path / "some", resume_from_checkpoint="latest", **settings)
    assert without_clock(resumed) == without_clock(some)
    other = {**settings, "lens_schedule": "linear"}
    with pytest.raises(ValueError, match=r"  lens_schedule: the checkpoint has 'warm-off:0\.5', this run has 'linear'"):
        train(student, make_cache(), tmp_path / "some", resume_from_checkpoint="latest", **other)


def test_a_baseline_reads_the_final_layer_and_is_measured_at_the_lens_layers(student, make_cache, tmp_path) -> None:
    lines = train(student, make_cache(), tmp_path / "run", method="kd", eval_cache=make_cache(), max_steps=2)
    assert not any(name.startswith("train/lens/") for name in lines[0])
    assert lines[0]["train/loss"] == pytest.approx((lines[0]["train/ce"] + lines[0]["train/task"]) / 2, rel=1e-5)
    assert "eval/lens_jsd/2:2" in lines[-1]


@pytest.mark.parametrize("settings", [{"kd_ratio": 0.0}, {"method": "kd", "kd_ratio": 0.0}, {"method": "sft"}, {}])
def test_a_teacher_that_the_loss_does_not_read_is_told(student, make_cache, tmp_path, settings, capsys) -> None:
    train(student, make_cache(), tmp_path / "run", **{**settings, "max_steps": 1})
    asked_for = settings.get("kd_ratio") == 0.0
    assert ("Nothing of the teacher is in the loss" in capsys.readouterr().err) == asked_for


def test_held_out_rows_are_measured_with_their_own_lens_or_refused(student, make_cache, tmp_path) -> None:
    bare = make_cache(lens_norm="none")
    (*_, alone) = train(student, bare, tmp_path / "bare", method="kd", eval_cache=bare, max_steps=1)
    (*_, mixed) = train(student, make_cache(), tmp_path / "mixed", method="kd", eval_cache=bare, max_steps=1)
    assert mixed["eval/lens_jsd"] == pytest.approx(alone["eval/lens_jsd"], rel=1e-5)
    with pytest.raises(ValueError, match=r"--eval-cache \S+ has lens_norm 'none', and what is trained on has 'final'"):
        train(student, make_cache(), tmp_path / "run", eval_cache=bare)
    assert not (tmp_path / "run").exists()


def test_bfloat16_follows_float32(student, make_cache, tmp_path) -> None:
    plain = train(student, make_cache(), tmp_path / "plain")
    half = train(student, make_cache(), tmp_path / "half", bf16=True)
    assert [line["train/loss"] for line in half] == pytest.approx([line["train/loss"] for line in plain], rel=0.1)
    assert weights(tmp_path / "half")["lm_head.weight"].dtype == torch.float32


def test_a_student_is_called_in_no_other_number_type_than_it_is_trained_in(student, make_cache, rows, tmp_path) -> None:
    """As attention kernels need it that know 16 bits only: before the first step, in it, and for answers."""
    called = []

    def of_16_bits(*arguments: Any, **options: Any) -> Any:
        called.append(torch.is_autocast_enabled("cpu"))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*arguments, **options)

    AttentionInterface.register("of_16_bits", of_16_bits)
    AttentionMaskInterface.register("of_16_bits", sdpa_mask)
    measured = {"eval_cache": make_cache(), "eval_dataset": str(rows), "eval_limit": 2, "eval_max_new_tokens": 3}
    settings = {"attn_implementation": "of_16_bits", "bf16": True, "packing": True, "max_length": 300, "max_steps": 1}
    lines = train(student, make_cache(), tmp_path / "run", **measured, **settings)
    assert "eval/rouge_l" in lines[-1]
    assert all(called)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": "9:2"}, "the student has lens layers 1 to 2"),
        ({"pairs": "1:3"}, "no lens targets of teacher layer 3"),
        ({"cache": Path("absent")}, "absent"),
        ({"student": "nowhere/at-all"}, "nowhere/at-all"),
        ({"resume_from_checkpoint": "absent"}, "not a complete checkpoint"),
        # Before the student is opened.
        ({"student": "nowhere/at-all", "deepspeed": Path("zero9")}, "--deepspeed zero9 is neither a file nor one of"),
    ],
)
def test_bad_input_gets_a_sentence_before_anything_is_written(student, make_cache, tmp_path, settings, message) -> None:
    config = {"student": str(student), "cache": make_cache(), **TRAIN, **settings}
    with pytest.raises(ValueError, match=message):
        run_train(TrainConfig(output_dir=tmp_path / "run", **config))
    assert not (tmp_path / "run").exists()


def test_a_student_with_another_tokenizer_is_refused(
    tiny_model_folder, tiny_chat_tokenizer, make_cache, tmp_path
) -> None:
    other = tiny_model_folder("llama", tokenizer=tiny_chat_tokenizer, num_layers=3)
    with pytest.raises(
        CacheError, match=r"^\S+ has token ids of another tokenizer .*--allow-mismatch tokenizer_digest$"
    ):
        train(other, make_cache(), tmp_path / "run")
    lines = train(other, make_cache(), tmp_path / "run", allow_mismatch="tokenizer_digest", max_steps=1)
    state = json.loads((tmp_path / "run" / "checkpoint-1" / "trainer_state.json").read_text())
    assert lines
    assert any(
        "tokenizer_digest" in text
        for text in state["stateful_callbacks"]["distilllens"]["attributes"]["identity"]["mismatches"]
    )


def forged(cache: Path, folder: Path, identity: dict[str, Any]) -> Path:
    """A copy of a cache whose manifest gives another identity, sealed anew."""
    manifest = shutil.copytree(cache, folder) / "manifest.json"
    content = json.loads(manifest.read_bytes())
    del content["sha256"]
    manifest.write_bytes(seal({**content, "identity": content["identity"] | identity}))
    return folder


@pytest.mark.parametrize("flag", ["cache", "eval_cache"])
@pytest.mark.parametrize(
    ("identity", "settings", "message"),
    [
        ({"format_version": 2}, {}, "manifest.json .* format_version 2"),
        ({"vocab_size": 319}, {}, "vocab_size: cache has 319, this run has 320"),
        ({"vocab_size": 321}, {}, "vocab_size: cache has 321, this run has 320"),
        ({"tokenizer_digest": "0" * 64}, {}, "tokenizer_digest 0000"),
        ({"temperature": 1.001}, {}, r"temperature: cache has 1\.001, this run has 1\.0"),
        ({"temperature": 0.999}, {"method": "kd"}, r"temperature: cache has 0\.999, this run has 1\.0"),
        # The norm is the cache's own to choose: only two caches can differ in it.
        ({"lens_norm": "none"}, {}, r"--eval-cache \S+ has lens_norm '(none|final)', and what is trained on"),
        ({}, {"pairs": "2:3"}, "no lens targets of teacher layer 3"),
    ],
    ids="format vocabulary- vocabulary+ tokenizer temperature+ temperature- norm layers".split(),
)
def test_a_cache_of_another_identity_is_refused_by_the_field_before_any_step(
    student, make_cache, tmp_path, flag: str, identity: dict[str, Any], settings: dict[str, str], message: str
) -> None:
    other = forged(make_cache(), tmp_path / "other", identity)
    caches = {"cache": make_cache(), "eval_cache": make_cache(), flag: other}
    with pytest.raises(ValueError, match=message):
        train(student, caches.pop("cache"), tmp_path / "run", **caches, **settings)
    assert not (tmp_path / "run").exists()


def test_a_cache_of_another_format_is_refused_by_its_version(student, make_cache, tmp_path) -> None:
    other = forged(make_cache(), tmp_path / "other", {})
    content = json.loads((other / "manifest.json").read_bytes())
    del content["sha256"]
    (other / "manifest.json").write_bytes(seal(content | {"format_version": 2}))
    with pytest.raises(CacheError, match=r"format version 2, this distilllens reads version 1"):
        train(student, other, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_cache_of_another_temperature_trains_where_it_is_not_read_or_the_difference_is_recorded(
    student, make_cache, tmp_path
) -> None:
    warm = make_cache(temperature=2.0)
    assert train(student, warm, tmp_path / "sft", method="sft", max_steps=1)
    for name, caches in (("cache", (warm, None)), ("eval", (make_cache(), warm))):
        settings = {"eval_cache": caches[1], "allow_mismatch": "temperature", "max_steps": 1}
        assert train(student, caches[0], tmp_path / name, **settings)
        state = json.loads((tmp_path / name / "checkpoint-1" / STATE).read_text())
        recorded = state["stateful_callbacks"][OURS]["attributes"]["identity"]["mismatches"]
        assert recorded == ["temperature: cache has 2.0, this run has 1.0"]


def test_a_profile_that_the_cache_does_not_hold_is_refused(student, make_cache, tmp_path) -> None:
    cache = make_cache(store_tail="none")
    with pytest.raises(ValueError, match="choose --tail bucket"):
        train(student, cache, tmp_path / "run", tail="profile")
    assert train(student, cache, tmp_path / "run", max_steps=1)


def test_a_flipped_bit_in_a_shard_stops_the_run_with_the_files_name(student, make_cache, tmp_path) -> None:
    copy = shutil.copytree(make_cache(), tmp_path / "cache")
    shard = copy / "shards" / "00000.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(CacheError, match=r"00000\.arrow"):
        train(student, copy, tmp_path / "run")

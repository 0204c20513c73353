"""Watching a run: files that other tools read, the best checkpoint, early stopping, divergence, lens samples."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerState

import distilllens.trackers as trackers_module
import distilllens.train as train_module
from distilllens.cache_teacher import run_cache_teacher
from distilllens.cli import main
from distilllens.config import CacheTeacherConfig, EvaluateConfig, TrainConfig
from distilllens.evaluate import run_evaluate
from distilllens.loss_watch import FEWEST, PATIENCE
from distilllens.metrics import read_metrics
from distilllens.trackers import TrackedRun, Tracker
from distilllens.train import run_train
from distilllens_inspect.run_files import read_run
from distilllens_inspect.run_page import open_run_page

TRAIN = {"max_steps": 12, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 2e-3, "device": "cpu"}
CLOCK = ("train/tokens_per_s", "train/data_wait", "train/peak_memory_gb")


@pytest.fixture(scope="module")
def rows(tmp_path_factory, tiny_rows, write_jsonl) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny_rows)


@pytest.fixture(scope="module")
def teacher(tiny_model_folder) -> Path:
    return tiny_model_folder("llama")


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher, rows) -> Path:
    settings = {"layers": "2", "top_k": "16", "store_tail": "profile", "max_length": 300, "device": "cpu"}
    folder = tmp_path_factory.mktemp("watching") / "cache"
    return run_cache_teacher(CacheTeacherConfig(teacher=str(teacher), dataset=str(rows), output_dir=folder, **settings))


@pytest.fixture(scope="module")
def student(tiny_model_folder) -> Path:
    return tiny_model_folder("llama", num_layers=3, seed=1)


@pytest.fixture(scope="module")
def stranger(tiny_model_folder, tiny_chat_tokenizer) -> Path:
    """A student with another tokenizer than the teacher's."""
    return tiny_model_folder("llama", num_layers=3, tokenizer=tiny_chat_tokenizer)


def configured(student: Path, cache: Path, folder: Path, **settings: object) -> TrainConfig:
    return TrainConfig(student=str(student), cache=cache, output_dir=folder, **{**TRAIN, **settings})


def train(student: Path, cache: Path, folder: Path, **settings: object) -> list[dict[str, float]]:
    run_train(configured(student, cache, folder, **settings))
    return read_metrics(folder)


def state_of(run: Path) -> dict:
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((newest / "trainer_state.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def without_clock(entries: list[dict]) -> list[dict]:
    return [{name: value for name, value in entry.items() if name not in CLOCK} for entry in entries]


@pytest.fixture(scope="module")
def run(tmp_path_factory, student, cache) -> Path:
    """A short run with evaluations and no selection."""
    folder = tmp_path_factory.mktemp("run") / "run"
    train(student, cache, folder, eval_cache=cache, eval_steps=4, max_steps=8, report_to="tensorboard")
    return folder


def test_a_line_has_every_documented_name(run) -> None:
    documented = (Path(__file__).parents[2] / "docs" / "watching.md").read_text()
    lines = read_metrics(run)
    for name in dict.fromkeys(name for line in lines for name in line):
        group, _, place = name.rpartition("/")
        known = f"{group}/S:T" if ":" in place or place == "final" else name
        assert f"`{known}`" in documented, name
    for line in lines:
        if "train/loss" in line:
            for where in ("2:2", "final"):
                assert 0 < line[f"train/kept_mass/{where}"] <= 1
                assert 0 < line[f"train/student_mass/{where}"] <= 1
            assert line["train/peak_memory_gb"] > 0.01
            assert 0 <= line["train/data_wait"] < 1
    first, last = lines[0], lines[-2]
    assert last["train/student_mass/final"] > first["train/student_mass/final"]


def test_transformers_opens_the_state_and_plot_tools_find_their_names(run) -> None:
    state = TrainerState.load_from_json(str(run / "checkpoint-8" / "trainer_state.json"))
    assert (state.global_step, state.max_steps, state.logging_steps, state.eval_steps) == (8, 8, 1, 4)
    steps = [entry["step"] for entry in state.log_history if "loss" in entry]
    assert steps == list(range(1, 9))
    evaluated = [entry for entry in state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [4, 8]
    lines = read_metrics(run)
    assert evaluated[-1]["eval_loss"] == lines[-1]["eval/loss"] == lines[-1]["eval/reference_loss"]
    for entry in state.log_history:
        assert entry["epoch"] == pytest.approx(entry["step"] * 4 / 24)
        if "loss" in entry:
            assert {"grad_norm", "learning_rate"} < entry.keys()


class NotLoggedIn(Tracker):
    """A service that refuses, after it has written to the run's folder."""

    def __init__(self, run: TrackedRun) -> None:
        run.known_as("tensorboard", lambda: "new")
        raise PermissionError("log in first")

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def test_a_tracker_that_cannot_start_costs_nothing_of_the_run_that_it_would_replace(
    student, cache, tmp_path, monkeypatch
) -> None:
    train(student, cache, tmp_path / "run", max_steps=1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    monkeypatch.setitem(trackers_module.KINDS, "tensorboard", NotLoggedIn)
    again = {"report_to": "tensorboard", "overwrite": True, "max_steps": 2}
    with pytest.raises(ValueError, match="--report-to tensorboard could not be started: log in first"):
        train(student, cache, tmp_path / "run", **again)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    train(student, cache, tmp_path / "run", **again)
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    assert not (tmp_path / "run" / "checkpoint-1").exists()


def test_tensorboard_has_the_lines_of_the_metrics(run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name in ("train/loss", "eval/kl", "train/kept_mass/2:2"):
        found = [(one.step, pytest.approx(one.value)) for one in events.Scalars(name)]
        assert [(line["step"], line[name]) for line in read_metrics(run) if name in line] == found


SELECTING = {
    "eval_steps": 2, "max_steps": 40, "save_steps": 3, "early_stopping_patience": 2, "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss", "save_total_limit": 1, "learning_rate": 2e-2, "logging_steps": 3,
}  # fmt: skip


def test_a_run_stops_early_with_the_best_student_and_a_stopped_one_decides_alike(
    student, cache, tmp_path, monkeypatch, capsys
) -> None:
    whole = train(student, cache, tmp_path / "whole", eval_cache=cache, **SELECTING)
    losses = {line["step"]: line["eval/loss"] for line in whole if "eval/loss" in line}
    best, last = min(losses, key=lambda step: losses[step]), max(losses)
    assert last == best + 4 < 40
    assert f"eval/loss was best at step {best}" in capsys.readouterr().err
    state = state_of(tmp_path / "whole")
    assert (state["best_metric"], state["best_global_step"]) == (losses[best], best)
    assert state["best_model_checkpoint"] == str(tmp_path / "whole" / f"checkpoint-{best}")
    kept = {path.name for path in (tmp_path / "whole").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", f"checkpoint-{last}"}
    mine, theirs = weights(tmp_path / "whole"), weights(tmp_path / "whole" / f"checkpoint-{best}")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert json.loads((tmp_path / "whole" / "lens_samples.json").read_text())["step"] == best

    asked, calls = train_module.Engine.any, []
    monkeypatch.setattr(train_module.Engine, "any", lambda self, claim: calls.append(1) or len(calls) == best + 3)
    with pytest.raises(KeyboardInterrupt):
        train(student, cache, tmp_path / "stopped", eval_cache=cache, **SELECTING)
    monkeypatch.setattr(train_module.Engine, "any", asked)
    for _ in range(2):  # a finished run that is resumed is finished
        more = {"eval_cache": cache, "resume_from_checkpoint": "latest", **SELECTING}
        assert without_clock(train(student, cache, tmp_path / "stopped", **more)) == without_clock(whole)
    resumed = state_of(tmp_path / "stopped")
    assert without_clock(resumed["log_history"]) == without_clock(state["log_history"])
    mine = weights(tmp_path / "stopped")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_rouge_on_the_way_is_that_of_evaluate(student, cache, rows, tmp_path) -> None:
    settings = {
        "eval_dataset": str(rows),
        "eval_limit": 5,
        "eval_max_new_tokens": 12,
        "max_steps": 1,
        "max_length": 300,
    }
    lines = train(student, cache, tmp_path / "run", **settings)
    results = run_evaluate(
        EvaluateConfig(
            model=(str(tmp_path / "run"),),
            dataset=str(rows),
            limit=5,
            do_sample=False,
            max_new_tokens=12,
            max_length=300,
            device="cpu",
            output_dir=tmp_path / "results",
        )
    )
    (written,) = [model.written for model in results.models]
    assert written is not None
    assert lines[-1]["eval/rouge_l"] == pytest.approx(written.rouge_l.mean)
    assert state_of(tmp_path / "run")["log_history"][-1]["eval_rouge_l"] == lines[-1]["eval/rouge_l"]


def test_a_loss_that_leaves_for_good_stops_the_run_and_names_the_last_good_checkpoint(
    student, cache, tmp_path, monkeypatch
) -> None:
    good, calls, leaves = train_module.start_engine, [], FEWEST + 2

    def poisoned(*arguments, **settings):
        engine = good(*arguments, **settings)
        forward = engine.forward

        def rising(batch, **options):
            if "read" in options:  # the check before the first step
                return forward(batch, **options)
            calls.append(batch.ids)
            losses = forward(batch, **options)
            return {**losses, "total": losses["total"] * (50.0 if len(calls) > leaves else 1.0)}

        engine.forward = rising
        return engine

    monkeypatch.setattr(train_module, "start_engine", poisoned)
    settings = {"max_steps": 200, "save_steps": 5, "save_total_limit": 1, "per_device_train_batch_size": 1}
    with pytest.raises(ValueError, match="the loss has diverged") as error:
        train(student, cache, tmp_path / "run", **settings)
    assert len(calls) == leaves + PATIENCE
    assert f"Examples of step {leaves + 1}, where that began: {calls[leaves][0]}. " in str(error.value)
    kept = tmp_path / "run" / f"checkpoint-{FEWEST}"
    assert f"The last good checkpoint is {kept}" in str(error.value)
    assert all(torch.isfinite(value).all() for value in weights(kept).values())
    assert state_of(tmp_path / "run")["global_step"] > FEWEST  # later ones went into the same folder


def test_the_samples_of_a_teacher_as_its_own_student_agree_with_the_cache(
    teacher, rows, tmp_path_factory, tmp_path
) -> None:
    settings = {"layers": "2", "top_k": "320", "min_prob": "0", "codec": "arrow-fp32", "max_length": 300}
    whole = tmp_path_factory.mktemp("whole") / "cache"
    lossless = run_cache_teacher(
        CacheTeacherConfig(teacher=str(teacher), dataset=str(rows), output_dir=whole, device="cpu", **settings)
    )
    run_evaluate(
        EvaluateConfig(model=(str(teacher),), cache=lossless, pairs="2:2", device="cpu", output_dir=tmp_path / "own")
    )
    samples = json.loads((tmp_path / "own" / "lens_samples.json").read_text())
    assert samples["pairs"] == [[2, 2], [4, 4]]
    for example in samples["examples"]:
        for pair in example["pairs"]:
            assert max(map(abs, pair["jsd"])) < 1e-5
            for mine, theirs in zip(pair["student"], pair["teacher"], strict=True):
                assert [token for token, _ in mine["top"]] == [token for token, _ in theirs["top"]]
                assert mine["rank"] == theirs["rank"]
                for name in ("next", "entropy"):
                    assert mine[name] == pytest.approx(theirs[name], rel=0.02, abs=2e-3)


def test_the_page_of_a_run_shows_its_curves_and_both_lenses(run, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "report", "--run", str(run)])
    assert ended.value.code == 0
    assert (run / "report.html").stat().st_size > 10_000
    page = open_run_page(run, None, max_positions=5)
    assert [chart.title for chart in page.charts][:2] == ["Loss in training", "KL to the teacher on held-out rows"]
    samples = read_run(run).samples
    assert samples is not None
    for shown, example in zip(page.comparisons, samples["examples"], strict=True):
        assert [(pair.student_layer, pair.teacher_layer) for pair in shown.pairs] == [(3, 4), (2, 2)]
        assert len(shown.columns) == min(5, example["num_targets"])


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        (["--student", "{stranger}"], 1, "/cache has token ids of another tokenizer than the model's"),
        (["--pairs", "7:2"], 1, "pair 7:2: the student has lens layers 1 to 2"),
        (["--pairs", "1:3"], 1, "pair 1:3: the cache has no lens targets of teacher layer 3"),
        (["--pairs", "1:2=0.7,2:2=0.6"], 1, "the shares sum to 1.3, not 1"),
        (["--cache", "other", "--cache-weights", "0.7,0.2"], 1, "--cache-weights 0.7,0.2 sum to 0.9"),
        (["--deepspeed", "{deepspeed}"], 1, "zero_optimization.overlap_coms is not a DeepSpeed key that train takes"),
        (["--device", "cuda:99"], 1, "--device cuda:99: this machine has"),
        (["--output-dir", "/proc/nothing/run"], 1, "--output-dir /proc/nothing/run cannot be written to"),
        (["--output-dir", "{rows}/run"], 1, "is a file; give another one"),
        (["--eval-steps", "0"], 1, "eval_steps: Input should be greater than or equal to 1"),
        (["--early-stopping-patience", "2"], 1, "give --eval-steps"),
        (["--eval-steps", "2"], 1, "give --eval-cache or --eval-dataset"),
        (
            ["--metric-for-best-model", "rouge_l", "--eval-steps", "2", "--eval-cache", "{cache}"], 1,
            "rouge_l is measured on answers to held-out rows: give --eval-dataset",
        ),
        (
            ["--metric-for-best-model", "eval_kl", "--eval-steps", "2", "--eval-dataset", "{rows}"], 1,
            "kl is measured on a cache of held-out rows: give --eval-cache",
        ),
        (["--metric-for-best-model", "bleu"], 1, "'bleu' is not measured; expected one of loss,"),
        (["--report-to", "tensorbord"], 1, "--report-to 'tensorbord' is not known"),
        (["--max-loss-ratio", "0.5"], 1, "would stop any run"),
        (["--eval-steps"], 2, "requires an argument"),
        (
            ["--eval-cache", "{cache}", "--eval-steps", "2", "--metric-for-best-model", "lens_jsd/9:9"], 1,
            "lens_jsd/9:9 is not measured: pairs 2:2 are matched",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_a_sentence_before_any_training(
    student, stranger, cache, rows, tmp_path, capsys, flags: list[str], code: int, sentence: str
) -> None:
    deepspeed = tmp_path / "zero.json"
    deepspeed.write_text(json.dumps({"zero_optimization": {"overlap_coms": True}}))
    flags = [flag.format(rows=rows, cache=cache, stranger=stranger, deepspeed=deepspeed) for flag in flags]
    given = ["train", "--student", str(student), "--cache", str(cache), "--output-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        main([*given, *flags])
    said = capsys.readouterr().err
    assert ended.value.code == code
    assert sentence in said
    assert "Traceback" not in said
    assert "step 1" not in said
    assert not (tmp_path / "run").exists()


def test_a_disk_mounted_for_reading_is_found_before_the_model_is_opened(cache, tmp_path, monkeypatch) -> None:
    def full(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(train_module.tempfile, "TemporaryFile", full)
    with pytest.raises(ValueError, match=r"cannot be written to \(Read-only file system\)"):
        run_train(configured(Path("not-opened"), cache, tmp_path / "run"))


def test_a_moved_run_still_knows_its_best_checkpoint(student, cache, tmp_path) -> None:
    settings = {**SELECTING, "eval_cache": cache}
    train(student, cache, tmp_path / "run", **settings)
    best = state_of(tmp_path / "run")["best_global_step"]
    shutil.move(tmp_path / "run", tmp_path / "moved")
    train(student, cache, tmp_path / "moved", resume_from_checkpoint="latest", **settings)
    mine, theirs = weights(tmp_path / "moved"), weights(tmp_path / "moved" / f"checkpoint-{best}")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)

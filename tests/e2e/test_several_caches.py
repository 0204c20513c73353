"""Training from several caches on tiny models: weights hold, teachers are told apart, resume is exact."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, TrainerState

import distilllens.train as train_module
from distilllens.cache_teacher import run_cache_teacher
from distilllens.cli import cli
from distilllens.config import CacheTeacherConfig, TrainConfig, load_config
from distilllens.metrics import read_metrics
from distilllens.several_caches import open_caches
from distilllens.train import run_train
from distilllens_cache import CacheError, CacheReader

CACHE = {
    "layers": "2", "top_k": "16", "min_prob": "0", "store_tail": "profile", "max_length": 300, "examples_per_shard": 5,
    "device": "cpu",
}  # fmt: skip
TRAIN = {
    "max_steps": 4, "per_device_train_batch_size": 5, "logging_steps": 1, "learning_rate": 2e-3, "save_steps": 2,
    "device": "cpu",
}  # fmt: skip
CLOCK = ("train/tokens_per_s", "train/data_wait", "train/peak_memory_gb")
WHOLE = {"top_k": "320", "codec": "arrow-fp32"}
DEEPER = {"num_layers": 6, "seed": 5}


@pytest.fixture(scope="module")
def make_cache(tmp_path_factory, tiny_model_folder, tiny_rows, write_jsonl):
    """``make_cache(rows=(start, stop), teacher={...}, **settings)``; equal arguments give one cache."""
    made: dict[str, Path] = {}

    def make(rows: tuple[int, int] = (0, 24), teacher: dict | None = None, **settings: object) -> Path:
        key = json.dumps([rows, teacher, settings], sort_keys=True, default=id)
        if key not in made:
            folder = tmp_path_factory.mktemp("caches")
            data = write_jsonl(folder / "rows.jsonl", tiny_rows[slice(*rows)])
            source = tiny_model_folder("llama", **(teacher or {}))
            output = folder / f"cache-{len(made)}"
            config = {"teacher": str(source), "dataset": str(data), "output_dir": output, **CACHE, **settings}
            made[key] = run_cache_teacher(CacheTeacherConfig(**config))
        return made[key]

    return make


@pytest.fixture
def student(tiny_model_folder) -> Path:
    return tiny_model_folder("llama", num_layers=3, seed=1)


def train(student: Path, caches: list[Path], folder: Path, **settings: object) -> list[dict[str, float]]:
    run_train(TrainConfig(student=str(student), cache=tuple(caches), output_dir=folder, **{**TRAIN, **settings}))
    lines = read_metrics(folder)
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def seen_batches(monkeypatch) -> list[tuple[str, ...]]:
    """The ids of every batch that is trained on from now on."""
    found: list[tuple[str, ...]] = []
    start = train_module.start_engine

    def started(*arguments, **settings):
        engine = start(*arguments, **settings)
        forward = engine.forward

        def seen(batch, **options):
            if "read" not in options:  # the check before the first step
                found.append(batch.ids)
            return forward(batch, **options)

        engine.forward = seen
        return engine

    monkeypatch.setattr(train_module, "start_engine", started)
    return found


def test_the_weights_hold_in_the_ids_that_are_trained_on(student, make_cache, tmp_path, monkeypatch) -> None:
    caches = [make_cache((0, 16)), make_cache((16, 24))]
    batches = seen_batches(monkeypatch)
    lines = train(student, caches, tmp_path / "run", cache_weights=(0.7, 0.3))
    names = [cache.name for cache in caches]
    assert [len(batch) for batch in batches] == [5] * 4
    drawn = [id.partition("/")[0] for batch in batches for id in batch]
    for stop in range(1, len(drawn) + 1):
        assert abs(drawn[:stop].count(names[0]) - 0.7 * stop) < 1
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert "train/teacher_jsd/final" not in lines[0]
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert [
        (one["digest"], one["weight"])
        for one in state["stateful_callbacks"]["distilllens"]["attributes"]["identity"]["caches"]
    ] == [(CacheReader(cache).digest, weight) for cache, weight in zip(caches, (0.7, 0.3), strict=True)]


def test_by_default_an_epoch_has_every_example_of_every_cache_once(student, make_cache, tmp_path, monkeypatch) -> None:
    batches = seen_batches(monkeypatch)
    settings = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 8}
    lines = train(student, [make_cache((0, 16)), make_cache((16, 24))], tmp_path / "run", **settings)
    ids = [id for batch in batches for id in batch]
    assert len(ids) == len(set(ids)) == 24
    assert lines[-1]["train/epoch"] == 1


@pytest.mark.parametrize("mix", ["data", "losses", "probabilities"])
def test_a_run_from_two_caches_that_is_stopped_or_killed_resumes_to_the_same_losses_and_weights(
    student, make_cache, tmp_path, monkeypatch, mix: str
) -> None:
    parts = [make_cache((0, 16)), make_cache((16, 24))]
    caches = parts if mix == "data" else [make_cache(), make_cache(teacher=DEEPER, layers="3", examples_per_shard=7)]
    settings = {"mix": mix, "cache_weights": (0.6, 0.4), "lens_rows": 0.5}
    whole = train(student, caches, tmp_path / "whole", **settings)
    ask, calls = train_module.Engine.any, []

    def asked(self, claim: bool) -> bool:
        calls.append(1)
        return len(calls) == 1

    monkeypatch.setattr(train_module.Engine, "any", asked)
    with pytest.raises(KeyboardInterrupt):
        train(student, caches, tmp_path / "run", resume_from_checkpoint="latest", **settings)
    monkeypatch.setattr(train_module.Engine, "any", ask)
    resumed = train(student, caches, tmp_path / "run", resume_from_checkpoint="latest", **settings)
    assert resumed == whole
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")  # killed between two checkpoints
    assert train(student, caches, tmp_path / "run", resume_from_checkpoint="latest", **settings) == whole
    mine, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    changed = {**settings, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match=r"  caches: .*'weight': 0\.6.*'weight': 0\.5"):
        train(student, caches, tmp_path / "run", **{**changed, "cache_weights": (0.5, 0.5)})
    with pytest.raises(ValueError, match="  cache: the checkpoint has None"):
        train(student, caches[:1], tmp_path / "run", **{**changed, "cache_weights": None, "mix": "auto"})


def test_teachers_of_different_depths_are_losses_or_one_mixture_and_their_disagreement_is_logged(
    student, make_cache, tmp_path
) -> None:
    """With whole vocabularies the mean of the teachers' KLs is the KL of their mixture and their disagreement."""
    caches = [make_cache(**WHOLE), make_cache(teacher=DEEPER, layers="3", examples_per_shard=7, **WHOLE)]
    settings = {"cache_weights": (0.6, 0.4), "max_steps": 1}
    (losses,) = train(student, caches, tmp_path / "losses", **settings)
    (mixed,) = train(student, caches, tmp_path / "mixed", mix="probabilities", **settings)
    assert losses["train/teacher_jsd/final"] > 0.001
    for name in ("train/teacher_jsd/final", "train/teacher_jsd/2"):
        assert losses[name] == pytest.approx(mixed[name], abs=1e-6)
    assert losses["train/task"] == pytest.approx(mixed["train/task"] + mixed["train/teacher_jsd/final"], abs=1e-5)
    names = [cache.name for cache in caches]
    own = [losses[f"train/{name}/task"] for name in names]
    assert losses["train/task"] == pytest.approx(0.6 * own[0] + 0.4 * own[1], abs=1e-6)
    assert losses["train/loss"] == pytest.approx(losses["train/task"] + losses["train/lens"], abs=1e-6)
    assert {f"train/{names[0]}/lens/2:2", f"train/{names[1]}/lens/2:3"} <= losses.keys()
    assert "train/lens/2:2" in mixed
    state = TrainerState.load_from_json(str(tmp_path / "losses" / "checkpoint-1" / "trainer_state.json"))
    assert losses.items() <= state.log_history[0].items()


def test_one_cache_given_as_a_list_is_that_cache(student, make_cache, tmp_path) -> None:
    one = train(student, [make_cache()], tmp_path / "list", max_steps=2)
    config = {"student": str(student), "cache": make_cache(), **TRAIN, "max_steps": 2}
    run_train(TrainConfig(output_dir=tmp_path / "path", **config))
    same = [{k: v for k, v in line.items() if k not in CLOCK} for line in read_metrics(tmp_path / "path")]
    assert one == same
    state = json.loads((tmp_path / "path" / "checkpoint-2" / "trainer_state.json").read_text())
    assert (
        state["stateful_callbacks"]["distilllens"]["attributes"]["identity"]["cache"]
        == CacheReader(make_cache()).digest
    )
    assert (
        not {"caches", "mix", "cache_weights"}
        & state["stateful_callbacks"]["distilllens"]["attributes"]["identity"].keys()
    )


def test_the_command_line_repeats_the_flag_and_a_file_lists(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        yaml.safe_dump({"student": "s", "output_dir": "o", "cache": ["a", "b"], "cache_weights": [0.7, 0.3]})
    )
    listed = load_config(TrainConfig, file=file, flags={})
    assert (listed.cache, listed.cache_weights) == (("a", "b"), (0.7, 0.3))
    arguments = ["--student", "s", "--output-dir", "o", "--cache", "a", "--cache", "b", "--cache-weights", "0.7,0.3"]
    with cli.commands["train"].make_context("train", arguments) as context:
        assert context.params["cache"] == ("a", "b")
        flags = {name: value for name, value in context.params.items() if value is not None and name != "config_path"}
        assert load_config(TrainConfig, file=None, flags=flags) == listed
    file.write_text(yaml.safe_dump({"student": "s", "output_dir": "o", "cache": "a"}))
    assert load_config(TrainConfig, file=file, flags={}).cache == ("a",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_weights": "0.7,0.2"}, r"--cache-weights 0\.7,0\.2 sum to 0\.9"),
        ({"cache_weights": "1.5,-0.5"}, "numbers above 0 that sum to 1"),
        ({"cache_weights": "0.33,0.6"}, "sum to 0.93"),
        ({"cache_weights": "nan,1"}, "sum to nan"),
        ({"cache_weights": "0.2,0.3,0.5"}, "has 3 numbers for 2 caches"),
        ({"cache": ["a", "a"]}, "names a more than once"),
        ({"cache": ["a"], "cache_weights": "1"}, "are for several caches"),
        ({"cache": "a", "mix": "data"}, "are for several caches"),
        ({"mix": "logits"}, "'data', 'losses' or 'probabilities'"),
    ],
)
def test_weights_and_mixes_that_do_not_fit_are_mistakes_of_the_command_line(settings, message: str) -> None:
    config = {"student": "s", "output_dir": "o", "cache": ["a", "b"], **settings}
    with pytest.raises(ValueError, match=message):
        load_config(TrainConfig, file=None, flags=config)


def test_caches_that_do_not_go_together_get_a_sentence_before_anything_is_written(
    student, make_cache, tiny_chat_tokenizer, tmp_path
) -> None:
    a, b, deep = make_cache(), make_cache((0, 16)), make_cache(teacher=DEEPER, layers="3", examples_per_shard=7)
    chat = make_cache(teacher={"tokenizer": tiny_chat_tokenizer}, template="alpaca")
    copy = shutil.copytree(a, tmp_path / "copy")
    short = make_cache(max_length=108)
    drawn = make_cache(store_tail="sampled:4")
    cases = [
        ([a, copy], {}, "are copies of one cache"),
        ([a, b], {}, "share 16 examples and differ in others: --mix data takes them for different data"),
        ([a, b], {"mix": "losses"}, r"example 16 of .* is not in .*: teachers are mixed over the same examples"),
        ([b, a], {"mix": "losses"}, r"example 16 of .* is not in "),
        ([a, short], {"mix": "losses"}, r"example 0 of .* \(\d+ tokens, \d+ targets\).* has 108 tokens and 2 targets"),
        ([a, deep], {"mix": "data"}, "teachers of 4 and 6 layers and pairs 2:2 and 2:3"),
        ([a, deep], {"pairs": "2:2"}, r"cache-\d+: pair 2:2: the cache has no lens targets of teacher layer 2"),
        ([a, make_cache(layers="1,2")], {"mix": "probabilities"}, r"student's layers \[2\] and \[1, 2\]"),
        ([a, make_cache(lens_norm="none")], {}, "lens_norm is 'final' in the first and 'none' in the other"),
        ([a, chat], {}, r"tokenizer_digest is '\w+' in the first and '\w+' in the other"),
        ([a, drawn], {"mix": "probabilities"}, "cannot mix the tail sampled of"),
        ([a, b], {"method": "sft", "mix": "losses"}, "--method sft has none"),
        ([a, Path("absent")], {}, "absent is not a folder"),
    ]
    for caches, settings, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            train(student, caches, tmp_path / "run", **settings)
        assert str(caught.value).count("\n") == 0
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mix", ["data", "losses", "probabilities"])
def test_what_the_loss_does_not_read_of_the_caches_may_differ(student, make_cache, tmp_path, mix: str) -> None:
    """Of lens layers and their norm the final layer knows nothing, and of what teachers say the text."""
    rows = ((0, 16), (16, 24)) if mix == "data" else ((0, 24), (0, 24))
    first = make_cache(rows[0], layers="1,2")
    other = make_cache(rows[1], teacher=DEEPER, layers="3", lens_norm="none", examples_per_shard=7)
    (line,) = train(student, [first, other], tmp_path / "kd", method="kd", mix=mix, max_steps=1)
    assert line["train/task"] > 0
    assert not any("lens/" in name for name in line)
    with pytest.raises(CacheError, match="lens_norm is 'final' in the first and 'none' in the other"):
        train(student, [first, other], tmp_path / "run", mix=mix, max_steps=1)
    if mix == "data":
        warm = make_cache(rows[1], temperature=2.0)
        (line,) = train(student, [first, warm], tmp_path / "sft", method="sft", max_steps=1)
        assert line["train/loss"] == pytest.approx(line["train/ce"], rel=1e-5)
        with pytest.raises(CacheError, match=r"temperature: cache has 2\.0, this run has 1\.0"):
            train(student, [first, warm], tmp_path / "run", method="kd", mix=mix, max_steps=1)


def test_teachers_without_weights_count_alike(student, make_cache, tmp_path) -> None:
    caches = (make_cache(), make_cache(teacher=DEEPER))
    config = TrainConfig(student=str(student), cache=caches, output_dir=tmp_path / "run", **TRAIN)
    assert open_caches(config).weights == (0.5, 0.5)


def test_a_loss_that_is_not_finite_names_the_caches_of_its_examples(student, make_cache, tmp_path, monkeypatch) -> None:
    caches = [make_cache((0, 16)), make_cache((16, 24))]
    start = train_module.start_engine

    def poisoned(*arguments, **settings):
        engine = start(*arguments, **settings)
        forward = engine.forward
        engine.forward = lambda batch, **options: {n: v * float("nan") for n, v in forward(batch, **options).items()}
        return engine

    monkeypatch.setattr(train_module, "start_engine", poisoned)
    with pytest.raises(ValueError, match=rf"Examples of the batch: .*{caches[0].name}/\d+.*{caches[1].name}/\d+"):
        train(student, caches, tmp_path / "run", cache_weights=(0.5, 0.5))


def test_fine_tuning_reads_several_caches_as_data(student, make_cache, tmp_path) -> None:
    lines = train(student, [make_cache((0, 16)), make_cache((16, 24))], tmp_path / "run", method="sft", max_steps=2)
    assert lines[0]["train/loss"] == pytest.approx(lines[0]["train/ce"])

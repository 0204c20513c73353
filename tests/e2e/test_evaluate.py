"""The evaluate command on tiny models: what it writes, how it resumes, and what bad input gets."""

import importlib.metadata
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from distilllens import evaluate
from distilllens.config import CacheTeacherConfig, EvaluateConfig
from distilllens.data import load_examples
from distilllens.divergence import jensen_shannon
from distilllens.evaluate import run_evaluate
from distilllens.generate import generate
from distilllens.results import EvaluateResults
from distilllens.rouge import ROUGE_SETTINGS, RougeL
from distilllens_cache import CacheReader

FILES = ["config.resolved.yaml", "predictions.jsonl", "results.json", "settings.json"]


@pytest.fixture(scope="module")
def model(tiny_model_folder) -> Path:
    return tiny_model_folder("llama")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, write_jsonl, tiny_rows) -> Path:
    """Five rows; one has two references."""
    rows = [dict(row) for row in tiny_rows[:5]]
    rows[1]["output"] = [rows[1]["output"], "the cat and the dog"]
    rows[0]["output"] = [rows[0]["output"]]
    return write_jsonl(
        tmp_path_factory.mktemp("data") / "valid.jsonl",
        [row if isinstance(row["output"], list) else row | {"output": [row["output"]]} for row in rows],
    )


@pytest.fixture
def config(model, dataset, tmp_path):
    """Two seeds, a few tokens, batches of two."""

    def config(**changes) -> EvaluateConfig:
        settings = {
            "model": (str(model),),
            "dataset": str(dataset),
            "seeds": (10, 20),
            "max_new_tokens": 6,
            "batch_size": 2,
            "device": "cpu",
            "output_dir": tmp_path / "results",
        }
        return EvaluateConfig.model_validate(settings | changes)

    return config


def predictions_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]


def test_results_and_predictions_are_kept_and_agree(config, model, tmp_path, capsys):
    results = run_evaluate(config())
    folder = tmp_path / "results"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert EvaluateResults.model_validate_json((folder / "results.json").read_text()) == results

    lines = predictions_of(folder)
    assert [(line["seed"], line["id"]) for line in lines] == [(seed, str(n)) for seed in (10, 20) for n in range(5)]
    rouge = RougeL()
    assert all(line["rouge_l"] == rouge.score(line["prediction"], line["references"]) for line in lines)
    assert len(lines[1]["references"]) == 2
    assert all(0 < line["num_tokens"] <= 6 or line["ended"] for line in lines)
    assert "### Response:" in lines[0]["prompt"]

    (scores,) = results.models
    assert scores.model == str(model)
    assert scores.num_rows == 5
    assert scores.written is not None
    means = {seed: sum(x["rouge_l"] for x in lines if x["seed"] == seed) / 5 for seed in (10, 20)}
    assert scores.written.rouge_l.per_seed == pytest.approx(means)
    assert scores.written.rouge_l.mean == pytest.approx(sum(means.values()) / 2)
    assert scores.written.rouge_l.std == pytest.approx(abs(means[10] - means[20]) / math.sqrt(2))
    assert scores.written.num_tokens == pytest.approx(sum(x["num_tokens"] for x in lines) / 10)
    assert scores.written.ended == sum(x["ended"] for x in lines) / 10
    assert results.settings["rouge"] == ROUGE_SETTINGS
    assert results.settings["no_repeat_ngram_size"] == 6
    assert results.settings["versions"]["torch"] == importlib.metadata.version("torch")
    printed = capsys.readouterr().out
    assert "ROUGE-L (2 seeds)" in printed
    assert f"{scores.written.rouge_l.mean:.2f}" in printed


def test_a_row_whose_reference_is_what_the_model_writes_scores_100_under_that_seed_only(
    config, dataset, write_jsonl, tmp_path
):
    run_evaluate(config(max_new_tokens=30))
    lines = predictions_of(tmp_path / "results")
    rows = [json.loads(line) for line in dataset.read_text("utf-8").splitlines()]
    for row, written in zip(rows[1:4], lines[1:4], strict=True):  # seed 10
        row["output"] = ["no such words", written["prediction"]]
    same = write_jsonl(tmp_path / "same.jsonl", rows)
    results = run_evaluate(config(max_new_tokens=30, dataset=str(same), output_dir=tmp_path / "other"))
    (scores,) = results.models
    assert scores.written is not None
    found = [line["rouge_l"] for line in predictions_of(tmp_path / "other")]
    assert found[1:4] == [100.0] * 3
    assert max(found[0], *found[4:]) < 50
    assert scores.written.rouge_l.per_seed[10] == pytest.approx(sum(found[:5]) / 5)
    assert scores.written.rouge_l.per_seed[10] >= 60


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_loss_on_the_references_is_that_of_single_unpadded_rows(
    architecture, tiny_model_folder, tiny_model, tiny_tokenizer, config, dataset
):
    folder = tiny_model_folder(architecture)
    (scores,) = run_evaluate(config(model=(str(folder),), seeds=(1,), max_new_tokens=1)).models
    model = tiny_model(architecture, vocab_size=len(tiny_tokenizer))
    loss, count = 0.0, 0
    for example in load_examples(str(dataset), tiny_tokenizer, max_prompt_length=256).examples:
        ids = torch.tensor([example.token_ids])
        with torch.no_grad():
            log_q = model(ids).logits[0].double().log_softmax(-1)
        for position in example.target_positions:
            loss -= float(log_q[position, example.token_ids[position + 1]])
            count += 1
    assert scores.references is not None
    assert scores.references.num_targets == count
    assert scores.references.loss == pytest.approx(loss / count, rel=1e-5)
    assert scores.references.perplexity == pytest.approx(math.exp(loss / count), rel=1e-4)


def test_predictions_do_not_depend_on_the_batch_size(config, tmp_path):
    run_evaluate(config())
    run_evaluate(config(batch_size=5, output_dir=tmp_path / "other"))
    assert predictions_of(tmp_path / "other") == predictions_of(tmp_path / "results")


def test_one_seed_gives_the_predictions_it_gives_among_several(config, tmp_path):
    run_evaluate(config())
    results = run_evaluate(config(seeds=(20,), output_dir=tmp_path / "other"))
    assert predictions_of(tmp_path / "other") == predictions_of(tmp_path / "results")[5:]
    assert results.models[0].written is not None
    assert results.models[0].written.rouge_l.std is None


def test_greedy_text_is_written_once_whatever_the_seeds(config, tmp_path):
    results = run_evaluate(config(do_sample=False))
    assert results.settings["seeds"] == [10]
    assert len(predictions_of(tmp_path / "results")) == 5


@pytest.mark.parametrize("num_batches", [0, 1, 3, 4, 5])
def test_a_stopped_evaluation_continues_to_the_same_bytes(config, tmp_path, monkeypatch, num_batches):
    run_evaluate(config(output_dir=tmp_path / "undisturbed"))
    calls = []

    def stopping(*arguments, **keywords):
        if len(calls) == num_batches:
            raise KeyboardInterrupt
        calls.append(keywords["seed"])
        return generate(*arguments, **keywords)

    monkeypatch.setattr(evaluate, "generate", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_evaluate(config())
    assert not (tmp_path / "results" / "results.json").exists()
    with open(tmp_path / "results" / "predictions.jsonl", "a") as stream:
        stream.write('{"id": "half a li')
    monkeypatch.setattr(evaluate, "generate", lambda *a, **k: calls.append(k["seed"]) or generate(*a, **k))
    run_evaluate(config())
    assert calls == [10, 10, 10, 20, 20, 20]  # nothing is generated twice
    for name in ("predictions.jsonl", "results.json", "settings.json"):
        assert (tmp_path / "results" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_a_finished_evaluation_is_not_run_again_and_a_damaged_result_is_made_from_the_predictions(
    config, tmp_path, monkeypatch, capsys
):
    first = run_evaluate(config())
    monkeypatch.setattr(evaluate, "generate", None)
    assert run_evaluate(config()) == first
    assert "is finished, nothing was run again" in capsys.readouterr().err
    (tmp_path / "results" / "results.json").write_text("{")
    assert run_evaluate(config()) == first


def test_other_settings_or_another_model_in_the_same_place_are_refused_without_overwrite(config, tmp_path, model):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    here = {"model": (str(copy),), "seeds": (1,), "max_new_tokens": 1}
    run_evaluate(config(**here))
    before = (tmp_path / "results" / "predictions.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"other settings.*--overwrite(.|\n)*max_new_tokens: there 1, now 2"):
        run_evaluate(config(**here | {"max_new_tokens": 2}))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ValueError, match=r"copy\.weights: there"):
        run_evaluate(config(**here))
    assert (tmp_path / "results" / "predictions.jsonl").read_bytes() == before
    run_evaluate(config(**here | {"overwrite": True, "max_new_tokens": 2}))
    assert all(line["num_tokens"] <= 2 for line in predictions_of(tmp_path / "results"))


def test_several_models_give_a_column_each_in_the_order_given(config, model, tiny_model_folder, tmp_path, capsys):
    other = tiny_model_folder("gpt2")
    results = run_evaluate(config(model=(str(other), str(model)), seeds=(1,), max_new_tokens=2))
    assert [scores.model for scores in results.models] == [str(other), str(model)]
    assert [line["model"] for line in predictions_of(tmp_path / "results")] == [str(other)] * 5 + [str(model)] * 5
    printed = capsys.readouterr().out
    for scores in results.models:
        assert scores.references is not None
        assert f"{scores.references.loss:.4f}" in printed


def test_a_model_scored_against_its_own_cache_agrees_with_itself(config, model, dataset, tmp_path, capsys):
    from distilllens.cache_teacher import run_cache_teacher

    cache = tmp_path / "cache"
    run_cache_teacher(
        CacheTeacherConfig.model_validate(
            {"teacher": str(model), "dataset": str(dataset), "layers": "2", "device": "cpu", "top_k": "320"}
            | {"min_prob": "0", "store_tail": "profile", "codec": "arrow-fp32", "output_dir": cache}
        )
    )
    results = run_evaluate(config(cache=cache, pairs="2:2", seeds=(1,), max_new_tokens=1))
    (scores,) = results.models
    assert scores.teacher_forced["kl"] == pytest.approx(0, abs=1e-5)
    assert scores.teacher_forced["lens_jsd/2:2"] == pytest.approx(0, abs=1e-5)
    assert scores.teacher_forced["top1_agreement"] == 1.0
    assert scores.references is not None
    # The same rows through both doors.
    assert scores.teacher_forced["reference_loss"] == pytest.approx(scores.references.loss, rel=1e-4)
    assert scores.teacher_forced["num_targets"] == scores.references.num_targets
    assert "KL to the teacher (nats)" in capsys.readouterr().out
    alone = run_evaluate(config(dataset=None, cache=cache, pairs="2:2", output_dir=tmp_path / "forced"))
    assert alone.models[0].teacher_forced == scores.teacher_forced
    assert alone.models[0].written is None


@pytest.mark.parametrize("top_k", ["6", "320"])
def test_the_dense_jsd_lies_between_the_limits_that_the_cache_certifies(
    config, model, tiny_model_folder, dataset, tmp_path, capsys, top_k: str
):
    """The dense value is computed here, with the teacher in memory; with every token stored nothing is uncertain."""
    from distilllens.cache_teacher import run_cache_teacher

    cache, student = tmp_path / "cache", tiny_model_folder("llama", num_layers=3, seed=1)
    settings = {"layers": "1,3", "top_k": top_k, "min_prob": "0", "store_tail": "profile", "codec": "arrow-fp32"}
    settings |= {"device": "cpu", "output_dir": cache}
    run_cache_teacher(CacheTeacherConfig.model_validate({"teacher": str(model), "dataset": str(dataset), **settings}))
    (scores,) = run_evaluate(config(model=(str(student),), dataset=None, cache=cache, pairs="1:1,2:3")).models
    theirs, mine = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, student))
    table = capsys.readouterr().out
    for pair in ((1, 1), (2, 3)):
        values = torch.cat([dense_jsd(mine, theirs, example, pair) for example in CacheReader(cache)])
        name = f"{pair[0]}:{pair[1]}"
        jsd, low, high = (scores.teacher_forced[f"lens_jsd{which}/{name}"] for which in ("", "_low", "_high"))
        assert jsd is not None
        assert low is not None
        assert high is not None
        assert low - 1e-5 <= values.mean().item() <= high + 1e-5
        if top_k == "320":
            assert (low, jsd, high) == (pytest.approx(values.mean().item(), abs=1e-5),) * 3
        else:
            assert high > low + 0.01
        assert f"{jsd:.4f} ({low:.4f} - {high:.4f})" in table
    assert "(low - high): limits of the JSD" in table


def dense_jsd(student, teacher, example, pair: tuple[int, int]) -> torch.Tensor:
    """Per target position, from the distributions over the whole vocabulary."""
    ids = torch.tensor(example.token_ids.astype("int64"))[None]
    where = torch.tensor(example.target_positions.astype("int64"))
    logs = []
    with torch.no_grad():
        for model, layer in zip((teacher, student), (pair[1], pair[0]), strict=True):
            hidden = model(ids, output_hidden_states=True).hidden_states[layer]
            logs.append(model.lm_head(model.model.norm(hidden))[0, where].log_softmax(-1))
    return jensen_shannon(*logs)


def test_a_cache_of_another_tokenizer_is_refused_before_anything_is_generated(
    config, tiny_model_folder, tiny_chat_tokenizer, dataset, tmp_path, monkeypatch
):
    from distilllens.cache_teacher import run_cache_teacher

    teacher = tiny_model_folder("llama", tokenizer=tiny_chat_tokenizer)
    cache = tmp_path / "cache"
    run_cache_teacher(
        CacheTeacherConfig.model_validate(
            {
                "teacher": str(teacher),
                "dataset": str(dataset),
                "layers": "2",
                "top_k": "8",
                "store_tail": "profile",
                "output_dir": cache,
            }
        )
    )
    monkeypatch.setattr(evaluate, "generate", None)
    with pytest.raises(ValueError, match="tokenizer_digest"):
        run_evaluate(config(cache=cache))
    assert not (tmp_path / "results").exists()


def test_a_chats_end_of_turn_ends_an_answer_though_no_configuration_names_it(
    config, tiny_model_folder, tiny_chat_tokenizer, tmp_path, monkeypatch
):
    tokenizer = type(tiny_chat_tokenizer)(
        tokenizer_object=tiny_chat_tokenizer.backend_tokenizer,
        eos_token="<|endoftext|>",
        chat_template=tiny_chat_tokenizer.chat_template,
    )
    folder = tmp_path / "chat"
    shutil.copytree(tiny_model_folder("llama", tokenizer=tiny_chat_tokenizer), folder)
    tokenizer.save_pretrained(folder)
    seen: list[frozenset[int]] = []
    monkeypatch.setattr(evaluate, "generate", lambda *a, **k: seen.append(k["ends"]) or generate(*a, **k))
    run_evaluate(config(model=(str(folder),), seeds=(1,), max_new_tokens=1))
    ends = tiny_chat_tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert set(seen) == {frozenset(ends)}


def test_special_tokens_that_a_cut_off_answer_ends_with_by_chance_end_no_answer(
    config, tiny_model_folder, tiny_chat_tokenizer, write_jsonl, tmp_path
):
    from distilllens.subjects import ends_of_references, open_subject

    folder = tiny_model_folder("llama", tokenizer=tiny_chat_tokenizer)
    turns = [{"role": role, "content": "one two"} for role in ("user", "assistant", "user", "assistant")]
    rows = write_jsonl(tmp_path / "chat.jsonl", [{"messages": turns}])
    start = tiny_chat_tokenizer.convert_tokens_to_ids("<|im_start|>")
    whole = load_examples(str(rows), tiny_chat_tokenizer).examples[0].token_ids
    third = [position for position, token in enumerate(whole) if token == start][2]
    subject = open_subject(str(folder), config(dataset=str(rows), max_length=third + 1, max_prompt_length=100))
    assert subject.examples is not None
    assert subject.examples.examples[0].token_ids[-1] == start
    assert ends_of_references(subject) == frozenset()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ("/nowhere/model",)}, "/nowhere/model does not exist"),
        ({"model": ("MODEL", "MODEL")}, "--model has .* more than once"),
        ({"model": ()}, "--model is empty"),
        ({"seeds": ()}, "--seeds is empty"),
        ({"seeds": (1, 2, 1)}, "--seeds has 1 more than once"),
        ({"dataset": "/nowhere/rows.jsonl"}, "/nowhere/rows.jsonl"),
        ({"max_prompt_length": 3}, "no row can be used(.|\n)*prompt over the limit"),
        ({"max_new_tokens": 4000}, "exceed the 256 positions of the model. Lower --max-new-tokens"),
        ({"device": "cuda:7"}, "--device cuda:7"),
        ({"cache": Path("/nowhere/cache")}, "/nowhere/cache"),
    ],
)
def test_bad_input_gets_a_sentence(config, model, changes, message):
    if "model" in changes:
        changes = changes | {"model": tuple(name.replace("MODEL", str(model)) for name in changes["model"])}
    with pytest.raises(ValueError, match=message):
        run_evaluate(config(**changes))


def test_rows_without_references_are_refused(config, write_jsonl, tmp_path):
    with pytest.raises(ValueError, match=r"plain text.*without prompts and references"):
        run_evaluate(config(dataset=str(write_jsonl(tmp_path / "text.jsonl", [{"text": "the cat sat"}]))))
    with pytest.raises(ValueError, match=r"no row can be used(.|\n)*empty response"):
        run_evaluate(config(dataset=str(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "the", "completion": ""}]))))


def test_a_folder_with_something_else_is_refused_before_anything_is_loaded(config, model):
    before = sorted(path.name for path in model.iterdir())
    with pytest.raises(ValueError, match="holds something else than evaluation results"):
        run_evaluate(config(output_dir=model, model=("/nowhere/model",), overwrite=True))
    assert sorted(path.name for path in model.iterdir()) == before


def test_rows_that_cannot_be_used_are_counted_and_said(config, write_jsonl, tiny_rows, tmp_path, capsys):
    rows = [*tiny_rows[:2], tiny_rows[2] | {"output": " "}, tiny_rows[3] | {"instruction": "long " * 300}]
    results = run_evaluate(
        config(dataset=str(write_jsonl(tmp_path / "rows.jsonl", rows)), seeds=(1,), max_new_tokens=1)
    )
    assert results.models[0].num_rows == 2
    assert results.models[0].unusable == {"empty response": 1, "prompt over the limit": 1}
    assert "1 of 4 rows are not used: empty response" in capsys.readouterr().err

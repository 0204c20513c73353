"""The output folder of an evaluation: resumed, refused, never damaged."""

import json
from pathlib import Path

import pytest

from distilllens.predictions import EvaluationFolder, Prediction, write_json

SETTINGS = {"model": ["m"], "max_new_tokens": 4}
BATCHES = [[("m", 1, "a"), ("m", 1, "b")], [("m", 1, "c")], [("m", 2, "a"), ("m", 2, "b")], [("m", 2, "c")]]


def predictions(batch) -> list[Prediction]:
    return [
        Prediction(
            id=row, model=model, seed=seed, prompt="ask\u2028é\r", references=["r\n"], prediction=f"{row} 中",
            rouge_l=12.5, num_tokens=3, ended=True,
        )
        for model, seed, row in batch
    ]  # fmt: skip


def fill(folder: Path, num_batches: int) -> EvaluationFolder:
    output = EvaluationFolder(folder, SETTINGS, overwrite=False)
    for batch in BATCHES[:num_batches]:
        output.append(predictions(batch))
    return output


def test_predictions_come_back_as_they_were_written(tmp_path):
    fill(tmp_path / "out", 4)
    output = EvaluationFolder(tmp_path / "out", SETTINGS, overwrite=False)
    assert output.resume(BATCHES) == [one for batch in BATCHES for one in predictions(batch)]


@pytest.mark.parametrize("cut", [0, 1, 30, 200, 250, 400, 500, 700, 900, 1000])
def test_a_file_cut_anywhere_is_continued_from_its_last_whole_batch(tmp_path, cut):
    fill(tmp_path / "whole", 4)
    whole = (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    fill(tmp_path / "out", 4)
    file = tmp_path / "out" / "predictions.jsonl"
    file.write_bytes(whole[:cut])
    output = EvaluationFolder(tmp_path / "out", SETTINGS, overwrite=False)
    kept = output.resume(BATCHES)
    sizes = {0: 0, 2: 1, 3: 2, 5: 3, 6: 4}
    assert len(kept) in sizes
    for batch in BATCHES[sizes[len(kept)] :]:
        output.append(predictions(batch))
    assert file.read_bytes() == whole


def test_other_settings_are_refused_by_name_and_nothing_is_touched(tmp_path):
    fill(tmp_path / "out", 2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match=r"other settings.*--overwrite(.|\n)*max_new_tokens: there 4, now 5"):
        EvaluationFolder(tmp_path / "out", SETTINGS | {"max_new_tokens": 5}, overwrite=False)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_run_refused_before_its_first_batch_does_not_bind_the_next_one_to_its_settings(tmp_path):
    EvaluationFolder(tmp_path / "out", SETTINGS, overwrite=False)
    output = EvaluationFolder(tmp_path / "out", SETTINGS | {"max_new_tokens": 5}, overwrite=False)
    output.append(predictions(BATCHES[0]))
    with pytest.raises(ValueError, match="max_new_tokens: there 5, now 4"):
        EvaluationFolder(tmp_path / "out", SETTINGS, overwrite=False)


def test_overwrite_begins_anew(tmp_path):
    fill(tmp_path / "out", 2)
    output = EvaluationFolder(tmp_path / "out", SETTINGS | {"max_new_tokens": 5}, overwrite=True)
    assert output.resume(BATCHES) == []


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "settings.json", "predictions.jsonl"])
def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path, overwrite, name):
    (tmp_path / name).write_text('{"other": 1}')
    with pytest.raises(ValueError, match=f"holds something else.*{name}.*give a new --output-dir"):
        EvaluationFolder(tmp_path, SETTINGS, overwrite=overwrite)
    assert (tmp_path / name).read_text() == '{"other": 1}'
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(ValueError, match="is a file: --output-dir takes a folder"):
        EvaluationFolder(tmp_path / "out", SETTINGS, overwrite=True)


def test_what_a_killed_process_left_half_written_does_not_make_a_folder_foreign(tmp_path):
    (tmp_path / "settings.json.tmp-1").write_text("{")
    assert EvaluationFolder(tmp_path, SETTINGS, overwrite=False).resume(BATCHES) == []


def test_lines_that_were_changed_are_refused_by_number(tmp_path):
    output = fill(tmp_path / "out", 2)
    file = tmp_path / "out" / "predictions.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    file.write_text("\n".join([lines[0], lines[2], lines[1], ""]))
    with pytest.raises(ValueError, match="line 2 is model m, seed 1, row c, where m, 1, b belongs"):
        output.resume(BATCHES)
    file.write_text("\n".join([lines[0], '{"id": 3}', ""]))
    with pytest.raises(ValueError, match="line 2 is no prediction"):
        output.resume(BATCHES)
    file.write_text("\n".join([*lines, ""]))
    with pytest.raises(ValueError, match="3 lines, 2 belong there"):
        output.resume(BATCHES[:1])


def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "r.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "r.json", {"a": float("nan")})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]

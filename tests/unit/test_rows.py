"""Rows come out of every kind of file alike, and what cannot be read is named with its file and line."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from distilllens.rows import open_rows

ROWS = [
    {"instruction": "Say hello.", "input": "", "output": "Hello!"},
    {"instruction": "Zähle bis drei.", "input": "auf Japanisch", "output": "一、二、三 🙂"},
    {"instruction": "Nothing?", "input": "x", "output": "No."},
]


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_as(kind: str, folder: Path, rows: list[dict]) -> Path:
    path = folder / f"rows.{kind.split('-')[0]}"
    table = pa.Table.from_pylist(rows)
    if kind == "jsonl":
        return write_lines(path, rows)
    if kind == "json-list":
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    elif kind == "json-lines":
        return write_lines(path, rows)
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    elif kind in ("arrow-file", "arrow-stream"):
        new = pa.ipc.new_file if kind == "arrow-file" else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        import datasets

        path = folder / "saved"
        saved = datasets.Dataset.from_list(rows)
        (datasets.DatasetDict({"train": saved}) if kind == "saved-dict" else saved).save_to_disk(str(path))
    return path


KINDS = ("jsonl", "json-list", "json-lines", "parquet", "arrow-file", "arrow-stream", "saved", "saved-dict")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows_in_the_same_order(kind: str, tmp_path: Path) -> None:
    rows = open_rows(str(write_as(kind, tmp_path, ROWS)))
    assert rows.columns == ("instruction", "input", "output")
    assert len(rows) == 3
    assert list(rows) == [("0", ROWS[0]), ("1", ROWS[1]), ("2", ROWS[2])]
    assert list(rows) == list(rows), "rows can be read twice"


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_takes_the_first_rows(kind: str, tmp_path: Path) -> None:
    path = str(write_as(kind, tmp_path, ROWS))
    assert list(open_rows(path, limit=2)) == list(open_rows(path))[:2]
    assert len(open_rows(path, limit=100)) == 3


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (["a", "b", "c"], ["a", "b", "c"]),
        ([7, 9, 8], ["7", "9", "8"]),
        (["a", "b", "a"], ["0", "1", "2"]),
        (["a", "", "c"], ["0", "1", "2"]),
        (["a", None, "c"], ["0", "1", "2"]),
        ([0.5, 1.5, 2.5], ["0", "1", "2"]),
    ],
)
def test_a_datasets_own_ids_are_kept_only_where_they_tell_rows_apart(
    kind: str, own: list, expected: list[str], tmp_path: Path
) -> None:
    rows = [{"id": id, "text": "some text"} for id in own]
    assert [id for id, _ in open_rows(str(write_as(kind, tmp_path, rows)))] == expected


def test_numbers_and_texts_that_look_alike_are_no_ids(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"id": 1, "text": "a"}, {"id": "1", "text": "b"}])
    assert [id for id, _ in open_rows(str(path))] == ["0", "1"]


def test_columns_that_only_some_lines_have_are_found(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}, ROWS[1]])
    assert open_rows(str(path)).columns == ("instruction", "output", "input")


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert [row for _, row in open_rows(str(path))] == [{"text": "a"}, {"text": "b"}]


def test_the_files_of_a_folder_are_read_by_name_and_numbered_through(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("not rows")
    (tmp_path / ".hidden").mkdir()
    write_lines(tmp_path / ".hidden" / "old.jsonl", [{"text": "hidden"}])
    write_lines(tmp_path / "b.jsonl", [{"text": "third"}])
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"text": "first"}, {"text": "second"}]), tmp_path / "a.parquet")
    rows = list(open_rows(str(tmp_path)))
    assert rows == [("0", {"text": "first"}), ("1", {"text": "second"}), ("2", {"text": "third"})]
    assert list(open_rows(str(tmp_path), limit=1)) == rows[:1]


def test_the_splits_of_a_folder_are_not_mixed(tmp_path: Path) -> None:
    write_lines(tmp_path / "dolly_train.jsonl", [{"text": "learnt"}])
    write_lines(tmp_path / "dolly_valid.jsonl", [{"text": "held out"}])
    with pytest.raises(ValueError, match=r"the splits train, valid.*--split"):
        open_rows(str(tmp_path))
    assert [row["text"] for _, row in open_rows(str(tmp_path), split="valid")] == ["held out"]
    with pytest.raises(ValueError, match=r"no file of split 'test': found train, valid"):
        open_rows(str(tmp_path), split="test")


def test_a_saved_dataset_dict_gives_its_train_split_and_names_its_splits(tmp_path: Path) -> None:
    import datasets

    saved = datasets.DatasetDict()
    for name in ("train", "held_out"):
        saved[name] = datasets.Dataset.from_list([{"text": name}])
    saved.save_to_disk(str(tmp_path / "saved"))
    assert [row for _, row in open_rows(str(tmp_path / "saved"))] == [{"text": "train"}]
    assert [row for _, row in open_rows(str(tmp_path / "saved"), split="held_out")] == [{"text": "held_out"}]
    with pytest.raises(ValueError, match=r"no split 'valid': found train, held_out"):
        open_rows(str(tmp_path / "saved"), split="valid")


def test_a_shuffled_saved_dataset_keeps_its_shuffled_order_and_plain_types(tmp_path: Path) -> None:
    import datasets

    saved = datasets.Dataset.from_list([{"text": str(n), "number": n} for n in range(9)]).shuffle(seed=1)
    saved.with_format("numpy").save_to_disk(str(tmp_path / "saved"))
    rows = [row for _, row in open_rows(str(tmp_path / "saved"))]
    assert rows == saved.to_list()
    assert type(rows[0]["number"]) is int


def refusal(dataset: Path | str, **options) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        open_rows(str(dataset), **options)
    assert type(caught.value) is ValueError, "not the library's own error"
    return str(caught.value)


def test_a_missing_file_is_not_taken_for_a_hub_id(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "nothing.jsonl")
    assert "no such file or folder" in refusal(tmp_path / "nothing")
    assert "no such file or folder" in refusal("nothing.jsonl")
    assert "no such file or folder" in refusal("./some/where/else")


def test_a_hub_id_without_network_is_a_sentence_that_says_what_to_give_instead() -> None:
    for dataset in ("nobody/no-such-dataset", "nobody/no-such-dataset:main"):
        message = refusal(dataset)
        assert dataset in message
        assert "the hub cannot be reached" in message
        assert "Give a local file" in message


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow"])
def test_an_empty_file_is_said_to_be_empty(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"rows{suffix}").touch()
    assert f"rows{suffix} is empty" in refusal(tmp_path / f"rows{suffix}")


def test_a_file_of_blank_lines_or_an_empty_list_holds_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    (tmp_path / "b.json").write_text("[]")
    table = pa.table({"text": pa.array([], pa.string())})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.json", "c.parquet"):
        assert "holds no rows" in refusal(tmp_path / name)


def test_a_half_written_line_is_named_with_its_number(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: text.index("bis drei") + 3], encoding="utf-8")
    message = refusal(path)
    assert f"{path}, line 2: not whole JSON" in message
    assert "remove that line" in message


def test_a_broken_line_of_a_json_list_is_named_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[\n{"text": "a"},\n{"text": }\n]')
    assert "rows.json, line 3: not whole JSON" in refusal(tmp_path / "rows.json")


def test_what_is_not_an_object_is_named_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n["text", "b"]\n')
    assert "line 2: a row is a JSON object" in refusal(tmp_path / "rows.jsonl")
    assert "found a list" in refusal(tmp_path / "rows.jsonl")
    (tmp_path / "rows.json").write_text('[{"text": "a"}, 3]')
    assert "item 2: a row is a JSON object" in refusal(tmp_path / "rows.json")


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    assert "line 2: not UTF-8 (byte 0xe9)" in refusal(tmp_path / "rows.jsonl")
    (tmp_path / "rows.json").write_bytes(b'[{"text": "a"},\n{"text": "caf\xe9"}]')
    assert "line 2: not UTF-8 (byte 0xe9)" in refusal(tmp_path / "rows.json")


def test_json_nested_too_deeply_is_refused_without_a_crash(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n")
    assert "line 1" in refusal(tmp_path / "rows.jsonl")


def test_a_wrong_suffix_is_refused_and_the_right_ones_are_listed(tmp_path: Path) -> None:
    for name in ("rows.csv", "rows"):
        (tmp_path / name).write_text("text\na\n")
        assert ".jsonl, .json, .parquet, .arrow" in refusal(tmp_path / name)


@pytest.mark.parametrize("kind", ["parquet", "arrow-file", "arrow-stream"])
def test_a_truncated_binary_file_is_named(kind: str, tmp_path: Path) -> None:
    path = write_as(kind, tmp_path, ROWS)
    path.write_bytes(path.read_bytes()[:100])
    assert f"{path} cannot be read as" in refusal(path)


def test_a_folder_without_rows_and_a_damaged_saved_dataset_are_sentences(tmp_path: Path) -> None:
    assert "holds no .jsonl" in refusal(tmp_path)
    saved = write_as("saved", tmp_path, ROWS)
    (saved / "data-00000-of-00001.arrow").unlink()
    assert "is no whole save_to_disk dataset" in refusal(saved)
    shutil.rmtree(saved)


def test_a_split_of_one_file_or_of_one_dataset_is_refused(tmp_path: Path) -> None:
    assert "drop --split" in refusal(write_as("jsonl", tmp_path, ROWS), split="train")
    assert "drop --split" in refusal(write_as("saved", tmp_path, ROWS), split="test")


def test_a_limit_below_one_is_refused(tmp_path: Path) -> None:
    assert "limit is 0" in refusal(write_as("jsonl", tmp_path, ROWS), limit=0)

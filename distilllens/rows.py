"""Where rows come from: JSONL, JSON, Parquet and Arrow files, folders of them, saved datasets and the hub."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

Row = dict[str, Any]
Part = Any
"""What one file holds: a list of dicts, a ``pyarrow.Table`` or a ``datasets.Dataset``."""

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
SPLITS = ("train", "test", "valid", "validation", "dev", "eval")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Rows:
    """The rows of a dataset, in the order of the dataset; iterating gives ``(id, row)``.

    The id is the dataset's own ``id`` column where that holds unique texts or integers, else the number of
    the row, from 0.
    """

    name: str
    columns: tuple[str, ...]
    ids: tuple[str, ...]
    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        return zip(self.ids, (row for part in self.parts for row in _rows_of(part)), strict=True)


def open_rows(dataset: str, *, split: str | None = None, revision: str | None = None, limit: int | None = None) -> Rows:
    """The first ``limit`` rows of a file, a folder of files, a ``save_to_disk`` folder or a hub id.

    A hub id may name a configuration after a colon (``openai/gsm8k:main``). ``split`` is a split of a hub
    dataset or of a saved ``DatasetDict`` ("train" when not given), or the files of a folder named after it.

    Raises ValueError, with the file and the line where there is one, for whatever cannot be read.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: it is a number of rows, 1 or more")
    path = Path(dataset).expanduser()
    if path.is_dir():
        saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
        parts = [_read_saved(path, split)] if saved else _read_folder(path, split, limit)
    elif path.exists():
        if split is not None:
            raise ValueError(f"split {split!r} was asked for, but {path} is one file: drop --split")
        parts = [_read_file(path, limit)]
    else:
        parts = [_read_hub(dataset, split=split, revision=revision)]
    parts = _first(parts, limit)
    num_rows = sum(len(part) for part in parts)
    if num_rows == 0:
        raise ValueError(f"{dataset} holds no rows: expected at least one")
    columns = tuple(dict.fromkeys(name for part in parts for name in _columns_of(part)))
    return Rows(name=dataset, columns=columns, ids=_ids(parts, num_rows), parts=tuple(parts))


def _rows_of(part: Part) -> Iterator[Row]:
    if isinstance(part, pa.Table):
        for batch in part.to_batches(max_chunksize=1024):
            yield from batch.to_pylist()
    else:
        yield from part


def _columns_of(part: Part) -> Sequence[str]:
    if isinstance(part, list):
        return list(dict.fromkeys(name for row in part for name in row))
    return part.column_names


def _first(parts: list[Part], limit: int | None) -> list[Part]:
    if limit is None:
        return parts
    kept = []
    for part in parts:
        wanted = min(limit, len(part))
        limit -= wanted
        if isinstance(part, list):
            kept.append(part[:wanted])
        else:
            kept.append(part.slice(0, wanted) if isinstance(part, pa.Table) else part.select(range(wanted)))
    return kept


def _ids(parts: list[Part], num_rows: int) -> tuple[str, ...]:
    numbers = tuple(map(str, range(num_rows)))
    if any("id" not in _columns_of(part) for part in parts):
        return numbers
    own: list[Any] = []
    for part in parts:
        if isinstance(part, list):
            own += [row.get("id") for row in part]
        else:
            own += part.column("id").to_pylist() if isinstance(part, pa.Table) else list(part["id"])
    names = tuple(map(str, own))
    usable = all(isinstance(value, str | int) and not isinstance(value, bool) for value in own)
    return names if usable and len(set(names)) == num_rows and all(names) else numbers


def _read_file(path: Path, limit: int | None) -> Part:
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path} ends in {path.suffix or 'no suffix'!r}: rows are read from {', '.join(SUFFIXES)} files. "
            f"Convert it, or rename it if it is one of these."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: expected rows. Was the download or the copy stopped?")
    if path.suffix in (".json", ".jsonl"):
        return _read_json(path, limit)
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path, memory_map=True)
        return _read_arrow(path)
    except pa.ArrowException as error:
        kind = "Parquet" if path.suffix == ".parquet" else "Arrow"
        raise ValueError(f"{path} cannot be read as {kind}, it may be incomplete: {error}") from None


def _read_arrow(path: Path) -> pa.Table:
    """Arrow's file format, or its stream format, which is what ``datasets`` writes."""
    with pa.memory_map(str(path)) as source:
        try:
            return pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            return pa.ipc.open_stream(source).read_all()


def _read_json(path: Path, limit: int | None) -> list[Row]:
    """One object a line; in a ``.json`` file also one list of objects."""
    with path.open("rb") as file:
        if path.suffix == ".json" and file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            return _read_json_list(path)
        file.seek(0)
        rows: list[Row] = []
        for number, line in enumerate(file, start=1):
            if limit is not None and len(rows) == limit:
                break
            if line.strip():
                value = _parse(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, path, number)
                rows.append(_as_object(value, f"{path}, line {number}"))
    return rows


def _read_json_list(path: Path) -> list[Row]:
    values = _parse(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), path, 1)
    return [_as_object(value, f"{path}, item {number}") for number, value in enumerate(values, start=1)]


def _parse(text: bytes, path: Path, line: int) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {line + error.lineno - 1}: not whole JSON ({error.msg}, character {error.colno}). "
            f"Half a line is what a stopped download or copy leaves: get the file again, or remove that line."
        ) from None
    except UnicodeDecodeError as error:
        line += text.count(b"\n", 0, error.start)
        raise ValueError(
            f"{path}, line {line}: not UTF-8 (byte {text[error.start]:#x}). Convert the file to UTF-8."
        ) from None
    except RecursionError:
        raise ValueError(f"{path}, line {line}: nested too deeply to be a row of text") from None


def _as_object(value: Any, where: str) -> Row:
    if isinstance(value, dict):
        return value
    found = type(value).__name__
    raise ValueError(f'{where}: a row is a JSON object such as {{"text": "..."}}, found a {found}')


def _read_folder(folder: Path, split: str | None, limit: int | None) -> list[Part]:
    found_files = (file for file in sorted(folder.rglob("*")) if file.suffix in SUFFIXES and file.is_file())
    files = [file for file in found_files if not str(file.relative_to(folder)).startswith(".")]
    if not files:
        raise ValueError(
            f"{folder} holds no {', '.join(SUFFIXES)} file and no dataset saved with save_to_disk: "
            f"give a file, a folder of such files, or a hub id"
        )
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    found = sorted({name for name in splits.values() if name})
    if split is not None:
        files = [file for file in files if splits[file] == split or file.stem == split]
        if not files:
            names = ", ".join(found) or "no splits"
            raise ValueError(f"{folder} has no file of split {split!r}: found {names}")
    elif len(found) > 1:
        raise ValueError(
            f"{folder} holds the splits {', '.join(found)}: mixing them would train on what is held out. "
            f"Name one with --split."
        )
    parts: list[Part] = []
    for file in files:
        missing = None if limit is None else limit - sum(len(part) for part in parts)
        if missing == 0:
            break
        parts.append(_read_file(file, missing))
    return parts


def _split_of(file: Path) -> str | None:
    """``train.jsonl``, ``dolly_train.jsonl`` and ``train-00000-of-00002.parquet`` are of split "train"."""
    words = re.split(r"[-._/]", file.with_suffix("").as_posix().lower())
    return next((word for word in reversed(words) if word in SPLITS), None)


def _read_saved(folder: Path, split: str | None) -> Part:
    import datasets  # seconds of import that files do not need

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise ValueError(f"{folder} is no whole save_to_disk dataset: {_first_line(error)}") from None
    if isinstance(saved, datasets.Dataset):
        own = str(saved.split) if saved.split is not None else None
        if split not in (None, own):
            raise ValueError(f"split {split!r} was asked for, but {folder} is one dataset: drop --split")
        return saved.with_format(None)
    wanted = split or "train"
    if wanted not in saved:
        found = ", ".join(map(str, saved))
        raise ValueError(f"{folder} has no split {wanted!r}: found {found}. Name one with --split.")
    return saved[wanted].with_format(None)


def _read_hub(dataset: str, *, split: str | None, revision: str | None) -> Part:
    path = Path(dataset)
    has_parent = len(path.parts) > 1 and path.parent.is_dir()
    if path.suffix in (*SUFFIXES, ".txt", ".csv") or has_parent or not HUB_ID.fullmatch(dataset):
        raise ValueError(f"no such file or folder: {dataset}")
    import datasets

    name, _, configuration = dataset.partition(":")
    at = f" at revision {revision}" if revision else ""
    try:
        loaded = datasets.load_dataset(name, configuration or None, split=split or "train", revision=revision)
    except ConnectionError:
        raise ValueError(
            f"{dataset} is no file or folder here, so it looks like a hub id, and the hub cannot be reached. "
            f"Give a local file (JSONL, Parquet, Arrow) or a save_to_disk folder, or try again with network."
        ) from None
    except Exception as error:  # whatever a hub or its local copy can raise: one sentence either way
        raise ValueError(f"the hub dataset {dataset}{at} cannot be read: {_first_line(error)}") from None
    assert isinstance(loaded, datasets.Dataset)
    return loaded.with_format(None)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""Predictions on disk: appended batch by batch, so that a stopped evaluation continues where it was."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from distilllens.run_config import RESOLVED
from distilllens.text_file import write_text

SETTINGS = "settings.json"
PREDICTIONS = "predictions.jsonl"
RESULTS = "results.json"
SAMPLES = "lens_samples.json"
OUR_FILES = (SETTINGS, PREDICTIONS, RESULTS, RESOLVED, SAMPLES)

BEGIN_ANEW = "The file was changed: use --overwrite to begin anew."


class Prediction(BaseModel):
    """One line of predictions.jsonl."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    model: str
    seed: int
    prompt: str
    references: list[str]
    prediction: str
    rouge_l: float
    num_tokens: int
    """Tokens of the prediction, the end token not counted."""
    ended: bool
    """The model ended it itself."""


Key = tuple[str, int, str]
"""Model, seed and row of a prediction."""


def settings_digest(settings: dict[str, Any]) -> str:
    """sha256 of everything that decides the predictions and scores."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, allow_nan=False).encode()).hexdigest()


def differing(there: dict[str, Any], now: dict[str, Any]) -> str:
    """A line for each setting that is another now, settings within settings by their dotted names."""
    # As JSON has them: a file tells no tuple from a list.
    old, new = (_flat(json.loads(json.dumps(settings, allow_nan=False))) for settings in (there, now))
    return "\n".join(
        f"  {name}: there {_short(old.get(name))}, now {_short(new.get(name))}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    )


class EvaluationFolder:
    """The output folder of one evaluation, identified by its settings.

    The settings are written first, predictions are appended in a fixed order, results.json comes last.
    What is there of an earlier run with the same settings is kept. With other settings, or with files
    that no evaluation wrote, ValueError is raised and nothing is touched; ``overwrite`` removes an
    earlier evaluation and nothing else.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
        self.path = folder
        self.settings = settings
        self.digest = settings_digest(settings)
        check_folder(folder)
        if overwrite:
            for name in OUR_FILES:
                (folder / name).unlink(missing_ok=True)
        if any((folder / name).is_file() for name in (PREDICTIONS, RESULTS)):
            self._compare()
            return
        # A run that was refused before its first batch left nothing that other settings could spoil.
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, {"settings": settings, "settings_digest": self.digest})

    def results(self) -> str | None:
        """Content of results.json where the evaluation is finished."""
        file = self.path / RESULTS
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def resume(self, expected: Sequence[Sequence[Key]]) -> list[Prediction]:
        """Predictions already there, of whole batches only; the rest of the file is cut off.

        ``expected`` are the keys of all batches in the order they are written.
        """
        file = self.path / PREDICTIONS
        if not file.is_file():
            return []
        content = file.read_bytes()
        lines = content.splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # the run was stopped while writing it
            lines.pop()
        found = [_parse(line, file, number) for number, line in enumerate(lines, start=1)]
        num_kept = 0
        for batch in expected:
            if num_kept + len(batch) > len(found):
                break
            num_kept += len(batch)
        order = [key for batch in expected for key in batch]
        for number, (prediction, key) in enumerate(zip(found, order, strict=False), start=1):
            if (prediction.model, prediction.seed, prediction.id) != key:
                raise ValueError(
                    f"{file}, line {number} is model {prediction.model}, seed {prediction.seed}, row "
                    f"{prediction.id}, where {key[0]}, {key[1]}, {key[2]} belongs. {BEGIN_ANEW}"
                )
        if len(found) > len(order):
            raise ValueError(f"{file} has {len(found)} lines, {len(order)} belong there. {BEGIN_ANEW}")
        os.truncate(file, sum(map(len, lines[:num_kept])))
        return found[:num_kept]

    def append(self, batch: Sequence[Prediction]) -> None:
        """Add the predictions of one batch, on disk when this returns."""
        append_lines(self.path / PREDICTIONS, batch)

    def _compare(self) -> None:
        found = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))["settings"]
        if differences := differing(found, self.settings):
            raise ValueError(
                f"{self.path} holds an evaluation with other settings. Use --overwrite to replace it, or another "
                f"--output-dir.\n{differences}"
            )


def append_lines(file: Path, rows: Iterable[BaseModel]) -> None:
    """Add a line of JSON for each row, on disk when this returns."""
    lines = "".join(row.model_dump_json() + "\n" for row in rows)
    with open(file, "ab") as stream:
        stream.write(lines.encode())
        stream.flush()
        os.fsync(stream.fileno())


def check_folder(folder: Path) -> None:
    """Raise ValueError when ``folder`` holds something that no evaluation wrote."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: --output-dir takes a folder for the results")
    if not folder.is_dir():
        return
    others = sorted(path.name for path in folder.iterdir() if ".tmp-" not in path.name)
    if others and not _is_ours(folder):
        raise ValueError(
            f"{folder} holds something else than evaluation results ({_few(others)}): give a new --output-dir"
        )


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write ``content`` whole or not at all."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _is_ours(folder: Path) -> bool:
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        return {"settings", "settings_digest"} <= found.keys()
    except (OSError, ValueError, AttributeError):
        return False


def _parse(line: bytes, file: Path, number: int) -> Prediction:
    try:
        return Prediction.model_validate_json(line)
    except ValidationError:
        raise ValueError(f"{file}, line {number} is no prediction. {BEGIN_ANEW}") from None


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings within settings by their dotted names."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        inner = _flat(value) if isinstance(value, dict) else {"": value}
        result |= {f"{name}.{key}".rstrip("."): part for key, part in inner.items()}
    return result


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."

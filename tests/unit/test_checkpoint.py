"""A checkpoint belongs to runs with the very settings of the one that wrote it."""

from pathlib import Path

import pytest

from distilllens.checkpoint import STATE, RunState, _write_state, load_state
from distilllens.config import TrainConfig

CONFIG = TrainConfig.model_validate({"method": "sft", "student": "s", "dataset": "d", "output_dir": "o"})


@pytest.mark.parametrize(
    ("theirs", "ours", "sentence"),
    [
        ({"task": "fkl"}, {"task": "rkl"}, "task: the checkpoint has 'fkl', this run has 'rkl'"),
        ({"task": "fkl", "lora_base": "a"}, {"task": "fkl"}, "lora_base: the checkpoint has 'a', this run has None"),
        ({"task": "fkl"}, {"task": "fkl", "lora_base": "a"}, "lora_base: the checkpoint has None, this run has 'a'"),
    ],
)
def test_a_setting_that_either_side_lacks_or_changed_is_named(
    tmp_path: Path, theirs: dict, ours: dict, sentence: str
) -> None:
    written = RunState(global_step=3, max_steps=9, identity=theirs, pending={"total": 1.5})
    _write_state(tmp_path / STATE, written, CONFIG)
    assert load_state(tmp_path, theirs) == written
    with pytest.raises(ValueError, match="other settings") as error:
        load_state(tmp_path, ours)
    assert sentence in str(error.value)

"""The demo on a tiny teacher, through the real commands: stopped while training, then continued to its table."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_demo_stopped_while_training_continues_there_and_ends_with_its_table(
    tmp_path: Path, tiny_model_folder, tiny_chat_tokenizer
) -> None:
    teacher = tiny_model_folder(tokenizer=tiny_chat_tokenizer)
    command = [sys.executable, "-m", "distilllens", "demo", "--output-dir", "demo", "--teacher", str(teacher)]
    command += ["--student-layers", "2", "--layers", "2", "--max-steps", "200"]
    command += ["--num-train-rows", "32", "--num-valid-rows", "12"]
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "demo/run/metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=300)
    assert first.returncode == 130, said
    assert "$ distilllens train " in said
    stopped_at = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert stopped_at < 200

    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("(finished before)") == 5
    assert "Resuming from demo/run/checkpoint-" in second.stderr
    assert "The student before and after" in second.stdout
    results = json.loads((tmp_path / "demo/results.json").read_text())
    names = [row["metric"] for row in results["metrics"]]
    assert {name.split(",")[0].split(" (")[0] for name in names} == {
        "validation loss",
        "KL to the teacher",
        "lens JSD",
        "top-1 agreement with the teacher",
        "calibration error",
        "ROUGE-L of greedy answers",
    }
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()][-1] == 200
    assert (tmp_path / "demo/report.html").stat().st_size > 10_000
    assert set(results["cache"]["bytes_per_target_by_layer"]) == {"2", "4"}

    third = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert third.stdout.count("(finished before)") == 8

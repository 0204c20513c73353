"""A cache in an object store: trained from, evaluated and inspected through a local server that speaks S3."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from distilllens.cache_teacher import run_cache_teacher
from distilllens.cli import main
from distilllens.config import CacheTeacherConfig
from distilllens.metrics import read_metrics
from distilllens_cache import remote_folder


@pytest.fixture(scope="module")
def local(tmp_path_factory, tiny_model_folder, tiny_rows, write_jsonl) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    rows = write_jsonl(folder / "rows.jsonl", tiny_rows)
    config = CacheTeacherConfig(
        teacher=str(tiny_model_folder("llama")), dataset=str(rows), output_dir=folder / "cache", layers="2",
        max_length=300, examples_per_shard=5, device="cpu",
    )  # fmt: skip
    return run_cache_teacher(config)


@pytest.fixture(scope="module")
def s3(local: Path) -> Iterator[str]:
    """The cache in a bucket of a server on this machine."""
    server = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    with pytest.MonkeyPatch.context() as patch:
        running = server.ThreadedMotoServer(port=0, verbose=False)
        running.start()
        host, port = running.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host.replace('0.0.0.0', '127.0.0.1')}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "*",
        }.items():
            patch.setenv(name, value)
        store = s3fs.S3FileSystem()
        store.mkdir("teachers")
        store.put(str(local), "teachers/tiny", recursive=True)
        yield "s3://teachers/tiny"
        running.stop()


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def losses(folder: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(folder) if "train/loss" in line]


def test_a_student_trains_from_a_bucket_to_the_same_losses(
    s3: str, local: Path, tiny_model_folder, tmp_path: Path
) -> None:
    student = tiny_model_folder("llama", num_layers=3, seed=1)
    train = ("train", "--student", student, "--max-steps", 4, "--logging-steps", 1, "--device", "cpu")
    spool = ("--spool-dir", tmp_path / "spool", "--spool-bytes", 1 << 20)
    assert run(*train, "--cache", local, "--output-dir", tmp_path / "near") == 0
    assert run(*train, "--cache", s3, "--eval-cache", s3, *spool, "--output-dir", tmp_path / "far") == 0
    assert losses(tmp_path / "far") == losses(tmp_path / "near")
    kept = [path.stat().st_size for path in (tmp_path / "spool" / "files").iterdir()]
    assert 0 < sum(kept) <= 1 << 20
    # A checkpoint knows its cache by the digest, wherever it lies.
    moved = ("--cache", local, "--eval-cache", local, "--output-dir", tmp_path / "far", "--resume-from-checkpoint")
    assert run(*train, *moved) == 0
    measured = ("--model", student, "--cache", s3, *spool, "--device", "cpu")
    assert run("evaluate", *measured, "--output-dir", tmp_path / "scores") == 0
    assert json.loads((tmp_path / "scores" / "results.json").read_text())


def test_a_bucket_is_inspected_like_a_folder(s3: str, local: Path, tmp_path: Path, capfd) -> None:
    spool = ("inspect", "--spool-dir", tmp_path / "spool")
    assert run(*spool, "summary", s3, "--json") == 0
    far = json.loads(capfd.readouterr().out)
    assert run("inspect", "summary", local, "--json") == 0
    assert json.loads(capfd.readouterr().out) == far
    assert run(*spool, "show", s3, "--example", 3) == 0
    assert run(*spool, "verify", s3) == 0
    assert f"{s3} is sound" in capfd.readouterr().out
    assert run(*spool, "report", s3, "--output", tmp_path / "report.html") == 0
    assert run(*spool, "export", s3, "--output", tmp_path / "cache.parquet") == 0
    assert list((tmp_path / "spool" / "files").iterdir())


def test_a_server_that_is_gone_is_told_in_one_sentence(
    s3: str, tiny_model_folder, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_folder, "PAUSES", ())
    assert run("inspect", "--spool-dir", tmp_path / "spool", "summary", "s3://teachers/absent") == 1
    assert "s3://teachers/absent has no manifest.json" in capfd.readouterr().err
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    assert run("inspect", "--spool-dir", tmp_path / "spool", "summary", "s3://teachers/tiny") == 1
    told = capfd.readouterr().err
    assert told.startswith("Error: manifest.json in s3://teachers/tiny could not be read: ")
    assert told.count("\n") == 1
    s3fs.S3FileSystem.clear_instance_cache()


def test_outputs_are_written_to_a_local_folder(local: Path, tmp_path: Path, capfd, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("cache-teacher", "--teacher", "t", "--dataset", "d", "--output-dir", "s3://bucket/cache") == 1
    assert "remote address" in capfd.readouterr().err
    assert run("train", "--student", "s", "--cache", local, "--output-dir", "s3://bucket/run") == 1
    assert "copy it there after" in capfd.readouterr().err
    assert os.listdir(tmp_path) == []

"""A cache in an object store: trained from, evaluated and inspected through a local server that speaks S3."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distilllens import remote_output
from distilllens.cache_teacher import run_cache_teacher
from distilllens.cli import main
from distilllens.config import CacheTeacherConfig
from distilllens.metrics import read_metrics
from distilllens_cache import CacheError, remote_folder, remote_lock, upload
from distilllens_cache.remote_files import RemoteFiles


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


@pytest.fixture
def pass_to(local: Path, tiny_model_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The teacher pass of ``local``, to another place."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(remote_lock, "SECONDS_TO_SETTLE", 0.0)
    rows = local.parent / "rows.jsonl"
    settings = ("--layers", 2, "--max-length", 300, "--examples-per-shard", 5, "--device", "cpu")

    def run_pass(url: str, *more: object) -> int:
        teacher = tiny_model_folder("llama")
        return run("cache-teacher", "--teacher", teacher, "--dataset", rows, *settings, "--output-dir", url, *more)

    return run_pass


def files_at(url: str) -> dict[str, bytes]:
    import s3fs

    store = s3fs.S3FileSystem()
    store.invalidate_cache()
    folder = url.removeprefix("s3://")
    return {name.removeprefix(f"{folder}/"): store.cat_file(name) for name in store.find(folder)}


def of_cache(files: dict[str, bytes]) -> dict[str, bytes]:
    """All but what names the place of the run."""
    return {name: data for name, data in files.items() if name != "config.resolved.yaml"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_teacher_pass_into_a_bucket_gives_the_bytes_of_a_local_one(
    s3: str, local: Path, pass_to: Callable[..., int], tiny_model_folder, tmp_path: Path, capfd
) -> None:
    url = "s3://teachers/written"
    assert pass_to(url) == 0
    told = capfd.readouterr()
    assert told.out.startswith(f"{url}: 24 examples")
    assert f"files went up to {url}" in told.err
    assert of_cache(files_at(url)) == of_cache(files_of(local))
    assert f"output_dir: {url}" in files_at(url)["config.resolved.yaml"].decode()
    assert list((tmp_path / "user" / "distilllens" / "staging").iterdir()) == []
    assert pass_to(url) == 0
    assert f"{url} is finished already" in capfd.readouterr().out
    assert pass_to(url, "--seed", 1) == 1
    assert "seed: " in capfd.readouterr().err
    student = tiny_model_folder("llama", num_layers=3, seed=1)
    train = ("train", "--student", student, "--max-steps", 2, "--logging-steps", 1, "--device", "cpu")
    assert run(*train, "--cache", local, "--output-dir", tmp_path / "near") == 0
    assert run(*train, "--cache", url, "--output-dir", tmp_path / "far") == 0
    assert losses(tmp_path / "far") == losses(tmp_path / "near")


def test_a_pass_into_a_bucket_goes_on_from_another_machine(
    s3: str, local: Path, pass_to: Callable[..., int], tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "s3://teachers/continued"
    original, written = upload.Upload._put, []

    def put(self: Any, name: str, *more: Any) -> bool:
        if name == "shards/00002.json":
            raise KeyboardInterrupt
        written.append(name)
        return original(self, name, *more)

    with monkeypatch.context() as here:
        here.setattr(upload.Upload, "_put", put)
        here.setattr(remote_output, "SECONDS_BETWEEN_PUSHES", 1e9)  # the last push puts it all up
        assert pass_to(url) == 130
    assert "manifest.json" not in files_at(url)
    assert run("inspect", "summary", url) == 1
    assert "no manifest.json, so its writer was stopped" in capfd.readouterr().err
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert pass_to(url, "--staging-dir", tmp_path / "stage") == 0
    assert "Continuing: 2 of 5 shards are finished" in capfd.readouterr().err
    assert of_cache(files_at(url)) == of_cache(files_of(local)) == of_cache(files_of(tmp_path / "stage"))


def test_rows_are_added_to_a_cache_in_a_bucket_from_another_machine(
    s3: str, pass_to: Callable[..., int], tiny_rows, write_jsonl, tiny_model_folder, tmp_path: Path, capfd
) -> None:
    url, near = "s3://teachers/appended", tmp_path / "near"
    more = write_jsonl(tmp_path / "more.jsonl", tiny_rows[:7])
    append = ("--append", more)
    assert pass_to(url, *append) == 1
    assert f"{url} holds no cache to add examples to" in capfd.readouterr().err
    assert pass_to(url) == pass_to(str(near)) == 0
    assert pass_to(str(near), *append, "--dry-run") == 0
    estimated = capfd.readouterr().out.splitlines()
    before = files_at(url)
    assert pass_to(url, *append, "--dry-run") == 0
    told = capfd.readouterr().out.splitlines()
    same = ("rows ", "tokens ", "target positions ", "shards ")
    assert [line for line in told if line.startswith(same)] == [line for line in estimated if line.startswith(same)]
    assert any(line.startswith("free space") and line.endswith("to fetch first") for line in told)
    assert files_at(url) == before
    assert list((tmp_path / "user" / "distilllens" / "staging").iterdir()) == []
    assert pass_to(url, *append, "--seed", 1) == 1
    assert f"{url} holds a cache of something else:\n  seed" in capfd.readouterr().err
    assert pass_to(url, *append) == pass_to(str(near), *append) == 0
    assert of_cache(files_at(url)) == of_cache(files_of(near))
    student = tiny_model_folder("llama", num_layers=3, seed=1)
    train = ("train", "--student", student, "--max-steps", 2, "--logging-steps", 1, "--device", "cpu")
    assert run(*train, "--cache", near, "--output-dir", tmp_path / "near-run") == 0
    assert run(*train, "--cache", url, "--output-dir", tmp_path / "far-run") == 0
    assert losses(tmp_path / "far-run") == losses(tmp_path / "near-run")


def test_responses_go_up_with_their_cache_and_are_not_written_again_elsewhere(
    s3: str, pass_to: Callable[..., int], tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, near = "s3://teachers/generated", tmp_path / "near"
    settings = ("--generate", "--max-new-tokens", 5, "--limit", 6)
    assert pass_to(str(near), *settings) == 0
    original = upload.Upload._put

    def put(self: Any, name: str, *more: Any) -> bool:
        if name == "shards/00001.json":
            raise KeyboardInterrupt
        return original(self, name, *more)

    with monkeypatch.context() as here:
        here.setattr(upload.Upload, "_put", put)
        assert pass_to(url, *settings) == 130
    assert "manifest.json" not in files_at(url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    capfd.readouterr()
    assert pass_to(url, *settings) == 0
    assert "The teacher writes" not in capfd.readouterr().err
    found = of_cache(files_at(url))
    assert found.pop("generated.jsonl") == near.with_name("near.generated.jsonl").read_bytes()
    assert found == of_cache(files_of(near))
    staging = tmp_path / "elsewhere" / "distilllens" / "staging"
    assert list(staging.iterdir()) == []
    assert pass_to(url, *settings, "--dry-run") == 0
    assert pass_to(url, *settings) == 0
    assert f"{url} is finished already" in capfd.readouterr().out
    assert pass_to(url, *settings, "--max-new-tokens", 6) == 1
    assert "holds responses of other settings:\n" in capfd.readouterr().err
    next(staging.glob("*.generated.jsonl")).write_text("of another run\n")
    assert pass_to(url, *settings) == 0  # what is there decides
    assert list(staging.iterdir()) == []


def test_a_folder_that_begins_to_be_is_no_file(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where s3fs finds no file it asks for the folder itself, which there is if another rank was faster."""
    import s3fs

    s3fs.S3FileSystem().pipe_file("teachers/begun/file", b"bytes")

    async def before(*args: Any, **options: Any) -> list[dict[str, Any]]:
        return []

    with monkeypatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "_lsdir", before)
        assert RemoteFiles("s3://teachers/begun").sizes() == {}
    assert RemoteFiles("s3://teachers/begun").sizes() == {"file": 5}
    with pytest.raises(CacheError, match="it is a file, and a cache is a folder"):
        RemoteFiles("s3://teachers/begun/file").sizes()


@pytest.mark.slow
def test_two_ranks_write_one_cache_into_a_bucket(s3: str, local: Path, tiny_model_folder, tmp_path: Path) -> None:
    url = "s3://teachers/ranks"
    command = "-m torch.distributed.run --standalone --nproc-per-node=2 -m distilllens cache-teacher"
    paths = [
        f"--output-dir={url}",
        f"--teacher={tiny_model_folder('llama')}",
        f"--dataset={local.parent / 'rows.jsonl'}",
    ]
    settings = "--layers=2 --max-length=300 --examples-per-shard=5 --device=cpu"
    environment = dict(os.environ) | {"XDG_CACHE_HOME": str(tmp_path / "user")}
    for told in ("24 examples", "is finished already"):
        done = subprocess.run(
            [sys.executable, *command.split(), *paths, *settings.split()],
            capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(told) == 1
    assert of_cache(files_at(url)) == of_cache(files_of(local))
    assert list((tmp_path / "user" / "distilllens" / "staging").iterdir()) == []


def test_a_damaged_cache_in_a_bucket_is_repaired_and_overwritten(
    s3: str, local: Path, pass_to: Callable[..., int], capfd
) -> None:
    import s3fs

    url = "s3://teachers/damaged"
    assert pass_to(url) == 0
    assert pass_to(url, "--repair") == 0
    assert f"{url} is sound: nothing to repair" in capfd.readouterr().out
    s3fs.S3FileSystem().pipe_file(f"{url}/shards/00003.arrow", bytes((local / "shards" / "00003.arrow").stat().st_size))
    s3fs.S3FileSystem().rm_file(f"{url}/plan.json")
    assert pass_to(url, "--repair", "--dry-run") == 0
    assert "2 problems; without --dry-run it would be repaired" in capfd.readouterr().out
    assert pass_to(url, "--repair") == 0
    told = capfd.readouterr()
    assert "Damaged: plan.json is missing" in told.err
    assert "Damaged: shards/00003.arrow" in told.err
    assert f"{url} is sound again" in told.out
    assert of_cache(files_at(url)) == of_cache(files_of(local))
    assert pass_to(url, "--seed", 1, "--overwrite") == 0
    assert of_cache(files_at(url)) != of_cache(files_of(local))
    assert run("inspect", "verify", url) == 0


def test_a_bucket_that_cannot_be_written_is_told_before_the_teacher_is_loaded(
    s3: str, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(remote_folder, "PAUSES", ())
    command = ("cache-teacher", "--teacher", "no-teacher", "--dataset", "no-rows", "--output-dir")
    for url, reason in {
        "s3://absent/cache": "in s3://absent/cache could not be written: The specified bucket does not exist",
        "nosuch://bucket/cache": "Protocol not known: nosuch",
        "hf://datasets/me/cache": "`hf upload`",
    }.items():
        assert run(*command, url) == 1
        told = capfd.readouterr().err
        assert reason in told
        assert told.count("\n") == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert run(*command, "s3://teachers/cache") == 1
    assert "takes the ranks of one host" in capfd.readouterr().err


def test_outputs_of_training_are_written_to_a_local_folder(local: Path, tmp_path: Path, capfd, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, told in {"s3:/bucket/cache": "has lost a slash", tmp_path / "cache": "--staging-dir is for"}.items():
        command = ("cache-teacher", "--teacher", "t", "--dataset", "d", "--staging-dir", "x", "--output-dir", folder)
        assert run(*command) == 1
        assert told in capfd.readouterr().err
    assert run("train", "--student", "s", "--cache", local, "--output-dir", "s3://bucket/run") == 1
    assert "copy it there after" in capfd.readouterr().err
    assert os.listdir(tmp_path) == []

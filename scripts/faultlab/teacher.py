"""Faults around a real teacher pass: a small random model, its cache, and a student that never sees it."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

from faultlab import child
from faultlab.material import Files, files_of
from faultlab.outcome import Outcome
from faultlab.surroundings import FOLDERS, draw, paths
from faultlab.writing import rng_of

NUM_ROWS = 16

WORDS = "the cat sat on a mat and dog ran under old house where new fish swam in red water not far from here".split()


def make_teacher(folder: Path) -> Path:
    """A random Llama of two layers with a tokenizer of whole words, saved below ``folder``."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<eos>", "#", ":", ".", ",", "\n"]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(path: Path) -> Path:
    """Instructions in those words."""
    rows = [
        {
            "instruction": " ".join(WORDS[(3 * n + k) % len(WORDS)] for k in range(4)),
            "input": "",
            "output": " ".join(WORDS[(5 * n + 2 * k) % len(WORDS)] for k in range(3 + n % 5)),
        }
        for n in range(NUM_ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pass_flags(teacher: Path, rows: Path, folder: Path) -> list[str]:
    """The command line of the pass, without the program."""
    flags = {
        "teacher": teacher,
        "dataset": rows,
        "output-dir": folder,
        "layers": "1",
        "top-k": "8",
        "store-tail": "lens=sampled:4,final=profile+sketch:4",
        "examples-per-shard": 2,
        "device": "cpu",
    }
    return ["cache-teacher", *(f"--{name}={value}" for name, value in flags.items())]


def start(arguments: list[str], *, before: str = "", **environment: str) -> "subprocess.Popen[str]":
    """The program with some flags, as a process of its own; ``before`` is code that it runs first."""
    code = f"{before}\nfrom distilllens.cli import main\nmain()"
    own = {
        "PYTHONPATH": os.pathsep.join(map(str, paths())),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(arguments: list[str], *, before: str = "", **environment: str) -> str:
    """What the program printed; AssertionError if it failed."""
    process = start(arguments, before=before, **environment)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed[-2000:]
    return printed


def cache_files(folder: Path) -> Files:
    """Every file of a cache. The run's config beside it names the folder, and is left out."""
    return {name: data for name, data in files_of(folder).items() if name != "config.resolved.yaml"}


@dataclass
class TeacherPass:
    """What trials with a whole teacher pass share."""

    seed: int
    scratch: Path
    teacher: Path = field(init=False)
    rows: Path = field(init=False)
    wanted: Files = field(init=False)
    seconds: float = field(init=False)
    """What an undisturbed pass takes."""

    def __post_init__(self) -> None:
        self.teacher = make_teacher(self.scratch / "teacher")
        self.rows = make_rows(self.scratch / "rows.jsonl")
        started = time.monotonic()
        finished(pass_flags(self.teacher, self.rows, self.scratch / "undisturbed"))
        self.seconds = time.monotonic() - started
        self.wanted = cache_files(self.scratch / "undisturbed")

    def difference(self, folder: Path) -> str:
        found = cache_files(folder)
        names = sorted(name for name in found.keys() | self.wanted.keys() if found.get(name) != self.wanted.get(name))
        return f"these files differ from an undisturbed cache's: {names}" if names else ""


@dataclass
class KilledPass(TeacherPass):
    """A pass killed twice, once so and so many of its files are there, and then left to finish.

    The passes run in forks of a process that has loaded torch already, which takes far longer than the rest.
    """

    def __call__(self, number: int) -> Outcome:
        rng = rng_of(self.seed, "pass", number)
        folder = Path(mkdtemp(dir=self.scratch)) / "cache"
        killed = 0
        for wanted in sorted(rng.sample(range(1, len(self.wanted)), 2)):
            started = child.start(lambda: self.in_process(folder))
            while sum(path.is_file() for path in folder.rglob("*")) < wanted and os.path.exists(
                f"/proc/{started[0]}/mem"
            ):
                if (folder / "manifest.json").exists():
                    break
                time.sleep(0.001)
            ended = child.wait_for(started, kill_after=0)
            if ended.how not in ("killed", "done"):
                return Outcome("raised", ended.text)
            killed += ended.how == "killed"
        ended = child.in_child(lambda: self.in_process(folder))
        if ended.how != "done":
            return Outcome("raised", ended.text)
        return Outcome(f"killed {killed} times, then finished", self.difference(folder))

    def in_process(self, folder: Path) -> None:
        """The pass without a new interpreter."""
        from click.testing import CliRunner

        from distilllens.cli import cli

        result = CliRunner().invoke(cli, pass_flags(self.teacher, self.rows, folder), catch_exceptions=False)
        assert result.exit_code == 0, result.output


@dataclass
class OtherSurroundings(TeacherPass):
    """A whole pass under another hash seed, locale, time zone and folder."""

    def __call__(self, number: int) -> Outcome:
        rng = rng_of(self.seed, "passes", number)
        folder = Path(mkdtemp(dir=self.scratch), rng.choice(FOLDERS), rng.choice(FOLDERS))
        finished(pass_flags(self.teacher, self.rows, folder), **draw(rng))
        return Outcome("the same bytes", self.difference(folder))


WITNESS = """
import atexit, sys

touched = []

def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"):
        touched.append(event + str(arguments))
        raise PermissionError("no network here")
    if event in ("open", "os.listdir", "os.scandir") and {teacher!r} in str(arguments[0]):
        touched.append(event + str(arguments))

sys.addaudithook(hook)
atexit.register(lambda: print("touched:", touched))
"""
"""Denies the network, and tells at the end who asked for it or for the teacher's folder."""


@dataclass
class TeacherGone(TeacherPass):
    """The teacher's files deleted, the network denied, then a student trained."""

    def __call__(self, number: int) -> Outcome:
        student, run = (self.scratch / f"{what}{number}" for what in ("student", "run"))
        finished(["new-student", f"--from={self.teacher}", "--layers=1", f"--output-dir={student}"])
        gone = self.teacher.rename(self.teacher.with_name("elsewhere"))
        try:
            printed = finished(
                [
                    "train", f"--student={student}", f"--cache={self.scratch / 'undisturbed'}", f"--output-dir={run}",
                    "--max-steps=2", "--device=cpu",
                ],
                before=WITNESS.format(teacher=str(self.teacher)),
            )  # fmt: skip
        finally:
            gone.rename(self.teacher)
        assert (run / "model.safetensors").is_file(), printed
        return Outcome("trained", "" if "touched: []" in printed else printed[printed.find("touched:") :][:500])

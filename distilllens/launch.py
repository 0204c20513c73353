"""How a process finds its place among ranks (torchrun, deepspeed, SLURM, or alone), its device and its engine."""

import os
import re
from collections.abc import Mapping

import torch
from torch import nn

from distilllens.config import TrainConfig
from distilllens.deepspeed_config import RunFacts
from distilllens.deepspeed_engine import DeepSpeedEngine
from distilllens.engine import Engine
from distilllens.models import pick_device
from distilllens.torch_engine import TorchEngine

FIRST_PORT, PORTS = 20000, 10000
"""Ports for jobs of SLURM, one by a job's number."""


def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of ``environment`` that say which rank this process is, in the names that torch reads.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT and, where it is known, LOCAL_WORLD_SIZE: what torchrun and
    deepspeed set, else what follows from srun's variables, else nothing, for a process alone. Raises ValueError where
    some are missing, or contradict each other.
    """
    found = _from_launcher(environment) or _from_slurm(environment)
    if not found:
        return {}
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    numbers = {name: int(found[name]) for name in names if found.get(name, "").isdecimal()}
    local_size = numbers.get("LOCAL_WORLD_SIZE", numbers.get("WORLD_SIZE", 0))
    if not (
        len(numbers) == len(found) - 1  # all but the address are numbers
        and numbers["RANK"] < numbers["WORLD_SIZE"]
        and numbers["LOCAL_RANK"] < local_size <= numbers["WORLD_SIZE"]
    ):
        said = ", ".join(f"{name}={value!r}" for name, value in found.items())
        raise ValueError(f"the launcher's variables make no sense together: {said}. Start with torchrun or srun")
    return found


def _from_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return {}
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in environment]:
        given = ", ".join(f"{name}={environment[name]}" for name in names if name in environment)
        raise ValueError(
            f"set by the launcher or by hand: {given}; not set: {', '.join(missing)}. Start with torchrun, deepspeed "
            f"or srun, or set all of {', '.join(names)}"
        )
    # The deepspeed launcher has its own name for it.
    local_size = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")
    return {
        **{name: environment[name] for name in names},
        "LOCAL_RANK": environment.get("LOCAL_RANK", "0"),
        **({"LOCAL_WORLD_SIZE": local_size} if local_size else {}),
    }


def _from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    # Of the step where srun says it, else of the job.
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE")
    names = names if environment.get(names[0]) else ("SLURM_NTASKS", "SLURM_TASKS_PER_NODE")
    tasks, by_node = environment.get(names[0], "1"), environment.get(names[1], "")
    # The script of sbatch, outside srun, is one process of a job that has several tasks.
    is_script = "SLURM_STEP_ID" not in environment and "SLURM_SUBMIT_DIR" in environment
    if tasks == "1" or is_script or "SLURM_PROCID" not in environment:
        return {}
    lists = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    hosts = next((environment[name] for name in lists if environment.get(name)), "")
    port = FIRST_PORT + int(environment.get("SLURM_JOB_ID", "0")) % PORTS
    local_size = tasks_on(int(environment.get("SLURM_NODEID", "0")), by_node)
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        **({} if local_size is None else {"LOCAL_WORLD_SIZE": str(local_size)}),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(hosts),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def first_host(hosts: str) -> str:
    """The first of SLURM's hosts: ``gpu03`` of ``gpu[03-05,7],login1``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else "") or "localhost"


def tasks_on(node: int, counts: str) -> int | None:
    """SLURM's number of tasks on a node, by its place: 1 on node 2 of ``4(x2),1``; None where ``counts`` lacks it."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    nodes = [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]
    return nodes[node] if node < len(nodes) else None


def join_ranks() -> None:
    """Take this process's place among the ranks; before anything asks for it."""
    os.environ.update(rank_environment(os.environ))


def world_size() -> int:
    """Number of ranks."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Number of ranks on this host; that of all where the launcher does not say it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_distributed() -> bool:
    """Whether a launcher (torchrun, deepspeed, srun) started this process as one of several ranks."""
    return world_size() > 1


def choose_device(name: str) -> torch.device:
    """The device of this rank: the one asked for, and under a launcher the CUDA device of the local rank.

    Raises ValueError where there is none, and where one GPU is named and several ranks share the machine.
    """
    if name.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) > 1:
        raise ValueError(
            f"--device {name} puts all ranks of this machine on one GPU: give --device cuda, and each takes the GPU of "
            "its own number"
        )
    device = pick_device(name)
    if device.type == "cuda":
        if device.index is None:
            # A launcher may show each rank its own device only.
            device = pick_device(f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}")
        # What NCCL takes to be a rank's device.
        torch.cuda.set_device(device)
    return device


def uses_deepspeed(config: TrainConfig) -> bool:
    """Whether a run is DeepSpeed's: several ranks, or a DeepSpeed file."""
    return is_distributed() or config.deepspeed is not None


def start_engine(student: nn.Module, config: TrainConfig, device: torch.device, facts: RunFacts) -> Engine:
    """Plain torch for one process; DeepSpeed for several, or where a DeepSpeed file is given."""
    if uses_deepspeed(config):
        return DeepSpeedEngine(student, config, device, facts)
    return TorchEngine(student, config, device)

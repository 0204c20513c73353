"""A process's place among ranks is a function of its environment."""

import os
from contextlib import nullcontext

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from distilllens.cli import cli
from distilllens.device_map import require_device_map
from distilllens.launch import first_host, rank_environment

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0",
    "SLURM_NODELIST": "gpu[03-05,7],login1", "SLURM_SUBMIT_DIR": "/home/me",
}  # fmt: skip


def test_what_a_launcher_says_is_taken() -> None:
    assert rank_environment(TORCHRUN) == TORCHRUN
    assert rank_environment({**TORCHRUN, **SRUN}) == TORCHRUN
    here = {**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}
    assert rank_environment(here) == here
    assert rank_environment({**TORCHRUN, "LOCAL_SIZE": "2"}) == here  # as the deepspeed launcher calls it


def test_what_srun_says_is_translated() -> None:
    wanted = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu03", "MASTER_PORT": "23456"}
    assert rank_environment(SRUN) == wanted
    assert rank_environment({**SRUN, "MASTER_ADDR": "other", "MASTER_PORT": "1"})["MASTER_ADDR"] == "other"
    step = {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NODELIST": "gpu09"}
    assert rank_environment({**SRUN, **step})["WORLD_SIZE"] == "6"
    assert rank_environment({**SRUN, **step})["MASTER_ADDR"] == "gpu09"


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=4), st.booleans())
def test_how_many_tasks_share_a_node_of_slurm_is_found(counts: list[tuple[int, int]], has_step: bool) -> None:
    nodes = [tasks for tasks, times in counts for _ in range(times)]
    text = ",".join(f"{tasks}(x{times})" if times > 1 else str(tasks) for tasks, times in counts)
    job = {**SRUN, "SLURM_NTASKS": str(max(2, sum(nodes))), "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    if has_step:
        job |= {"SLURM_STEP_NUM_TASKS": job["SLURM_NTASKS"], "SLURM_STEP_TASKS_PER_NODE": text}
        job |= {"SLURM_NTASKS": "99", "SLURM_TASKS_PER_NODE": "99"}  # of the job, which may have other steps
    else:
        job["SLURM_TASKS_PER_NODE"] = text
    for node, tasks in enumerate(nodes):
        assert rank_environment({**job, "SLURM_NODEID": str(node)})["LOCAL_WORLD_SIZE"] == str(tasks)
    assert "LOCAL_WORLD_SIZE" not in rank_environment({**job, "SLURM_NODEID": str(len(nodes))})


@pytest.mark.parametrize(
    ("said", "is_refused"),
    [
        ({**SRUN, "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1"}, True),
        ({**SRUN, "SLURM_TASKS_PER_NODE": "1(x4)", "SLURM_NODEID": "3", "SLURM_LOCALID": "0"}, False),
        ({**TORCHRUN, "LOCAL_RANK": "0"}, True),  # all four may be on this machine
        ({**TORCHRUN, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, False),
        ({}, False),
    ],
)
def test_ranks_that_share_a_machine_do_not_each_spread_a_teacher_over_it(
    said: dict[str, str], is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    for name in os.environ:
        if name.startswith(("SLURM_", "LOCAL_", "RANK", "WORLD_SIZE", "MASTER_")):
            monkeypatch.delenv(name)
    for name, value in rank_environment(said).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="ranks on this machine") if is_refused else nullcontext():
        require_device_map("auto")


@pytest.mark.parametrize("size", [2, 5])
def test_all_ranks_of_srun_agree(size: int) -> None:
    places = [rank_environment({**SRUN, "SLURM_NTASKS": str(size), "SLURM_PROCID": str(n)}) for n in range(size)]
    assert [place.pop("RANK") for place in places] == [str(n) for n in range(size)]
    assert all(place == places[0] for place in places)


@pytest.mark.parametrize(
    "alone",
    [
        {},
        {**SRUN, "SLURM_NTASKS": "1"},
        {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"},  # the script of sbatch
    ],
)
def test_a_process_alone_is_told_nothing(alone: dict[str, str]) -> None:
    assert rank_environment(alone) == {}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4; not set: RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0, WORLD_SIZE=2; not set: MASTER_ADDR, MASTER_PORT"),
        ({**TORCHRUN, "LOCAL_RANK": "first"}, "LOCAL_RANK='first'"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK='1', LOCAL_WORLD_SIZE='1'"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "5"}, "make no sense together"),
        ({**TORCHRUN, "RANK": "4"}, "RANK='4', WORLD_SIZE='4'"),
        ({**TORCHRUN, "WORLD_SIZE": "four"}, "make no sense together"),
        ({**SRUN, "SLURM_PROCID": "9"}, "make no sense together"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_environment(environment)


@given(st.text("abc-", min_size=1, max_size=5), st.integers(0, 20), st.sampled_from(["", ",x", "-9,x[1-2]", ",3"]))
def test_the_first_host_of_a_list_is_found(name: str, number: int, more: str) -> None:
    inside = more if not more.startswith(",x") else ""
    assert first_host(f"{name}[{number:02}{inside.split(',x')[0]}],z") == f"{name}{number:02}"
    assert first_host(f"{name}{number}{',x' if more else ''}") == f"{name}{number}"
    assert first_host(f"r[{number}-9]n[4,5]-ib,z") == f"r{number}n4-ib"


def test_what_the_deepspeed_launcher_writes_before_the_command_is_taken() -> None:
    assert CliRunner().invoke(cli, ["--local_rank=1", "train", "--help"]).exit_code == 0

"""Who a process is: the variables of every launcher, also nested, incomplete or contradictory."""

from __future__ import annotations

import os
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megasparse.launching import (
    LaunchEnvironment,
    choose_accelerator,
    leave_warnings_to_rank_0,
    process_group,
)
from megasparse.launching.environment import expand_hosts
from megasparse.launching.rendezvous import open_store

TORCH = {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
MPICH = {"PMI_RANK": "3", "MPI_LOCALRANKID": "1", "PMI_SIZE": "4"}
BATCH_SCRIPT = {
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "n[01-02]",
}
SRUN = {
    **BATCH_SCRIPT,
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[01-02]",
}


def identity(variables: dict[str, str]) -> tuple[int, int, int]:
    environment = LaunchEnvironment.from_variables(variables)
    return environment.rank, environment.local_rank, environment.world_size


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


def test_each_launcher_says_who_we_are() -> None:
    assert identity({}) == (0, 0, 1)
    assert identity(TORCH) == (2, 0, 4)
    assert identity(OPEN_MPI) == identity(MPICH) == identity(SRUN) == (3, 1, 4)


def test_a_plain_process_inside_an_allocation_is_a_run_of_one() -> None:
    alone = LaunchEnvironment.from_variables(BATCH_SCRIPT)
    assert alone == LaunchEnvironment(0, 0, 1)


def test_the_inner_launcher_wins() -> None:
    one_task_per_node = SRUN | {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    assert identity(one_task_per_node | TORCH) == (2, 0, 4)  # torchrun under srun
    # Open MPI starts its daemons with srun, and the ranks inherit their variables.
    assert identity(one_task_per_node | OPEN_MPI) == (3, 1, 4)
    assert identity(SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"}) == (3, 1, 4)  # srun --mpi=pmi2
    assert identity(SRUN | {"WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == (3, 1, 4)  # exported by the batch script


def test_where_the_ranks_meet() -> None:
    def master(variables: dict[str, str]) -> tuple[str | None, int | None]:
        environment = LaunchEnvironment.from_variables(variables)
        return environment.master_address, environment.master_port

    assert master(TORCH) == ("n1", 29500)
    assert master(OPEN_MPI) == master(MPICH) == (None, None)
    assert master(OPEN_MPI | {"MASTER_ADDR": "n9"}) == ("n9", None)
    assert master(SRUN) == ("n01", 20000 + 1717)
    assert master(SRUN | {"SLURM_STEP_ID": "1"}) == ("n01", 20000 + 1718)
    assert master(without(SRUN, "SLURM_STEP_NODELIST") | {"SLURM_JOB_NODELIST": "n7,n1"})[0] == "n7"
    assert master(SRUN | {"SLURM_STEP_NODELIST": "n02"})[0] == "127.0.0.1"
    assert master(SRUN | {"MASTER_ADDR": "10.0.0.5", "MASTER_PORT": "4711"}) == ("10.0.0.5", 4711)


@given(job=st.integers(1, 2**32), step=st.integers(0, 2**32))
def test_the_port_of_a_step_is_legal_and_the_same_on_all_ranks(job: int, step: int) -> None:
    step_variables = SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
    ports = {
        LaunchEnvironment.from_variables(step_variables | {"SLURM_PROCID": str(rank)}).master_port for rank in range(4)
    }
    assert len(ports) == 1
    assert 1024 < ports.pop() < 32768


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (TORCH | {"RANK": "x"}, "RANK: 'x' in the environment is not a whole number"),
        (TORCH | {"RANK": "-1"}, "RANK: '-1'"),
        (TORCH | {"RANK": "4"}, "RANK: 4 must be below WORLD_SIZE 4"),
        (TORCH | {"LOCAL_RANK": "4"}, "LOCAL_RANK: 4 must be below WORLD_SIZE 4"),
        (TORCH | {"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE: 0 in the environment; must be 1 or more"),
        (without(TORCH, "LOCAL_RANK"), "LOCAL_RANK: not in the environment.*RANK, LOCAL_RANK, WORLD_SIZE"),
        (without(TORCH, "RANK"), "LOCAL_RANK|WORLD_SIZE: 4 in the environment without a RANK"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: 2 in the environment without a RANK, but it can only be 1 here"),
        (without(TORCH, "MASTER_ADDR"), "MASTER_ADDR: not in the environment, though WORLD_SIZE is 4"),
        (without(TORCH, "MASTER_PORT"), "MASTER_PORT: not in the environment, though WORLD_SIZE is 4"),
        (TORCH | {"MASTER_PORT": "70000"}, "MASTER_PORT: 70000 in the environment; must be 1 to 65535"),
        (TORCH | {"MASTER_PORT": "http"}, "MASTER_PORT: 'http'"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_RANK: not in the environment"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "4"}, "OMPI_COMM_WORLD_RANK: 4 must be below OMPI_COMM_WORLD_SIZE 4"),
        (without(MPICH, "MPI_LOCALRANKID"), "MPI_LOCALRANKID: not in the environment"),
        (without(MPICH, "PMI_SIZE"), "PMI_SIZE: not in the environment"),
        (without(SRUN, "SLURM_LOCALID"), "SLURM_LOCALID: not in the environment"),
        (SRUN | {"SLURM_PROCID": "1.5"}, "SLURM_PROCID: '1.5'"),
        (SRUN | {"SLURM_STEP_NODELIST": "n[1-"}, r"SLURM_STEP_NODELIST: 'n\[1-' is no list of hosts"),
        (without(SRUN, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "SLURM_STEP_NODELIST: not in the environment"),
        # RANK and others left over in the shell that calls mpirun or srun.
        (OPEN_MPI | TORCH | {"RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE: 1 .* started 4 processes .OMPI_COMM_WORLD_"),
        (SRUN | TORCH | {"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE: 2 .* srun has started 4 processes"),
        (SRUN | {"WORLD_SIZE": "8"}, "WORLD_SIZE: 8 in the environment without a RANK, but it can only be 4 here"),
        # DeepSpeed would fail of it later, with an assertion.
        (OPEN_MPI | TORCH, "LOCAL_RANK: 0 in the environment, but OMPI_COMM_WORLD_LOCAL_RANK is 1"),
    ],
)
def test_nonsense_from_the_launcher_is_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LaunchEnvironment.from_variables(variables)


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("m5", ["m5"]),
        ("n[01-03,07],m5", ["n01", "n02", "n03", "n07", "m5"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("r[1-2]n[01,07]-ib.site", ["r1n01-ib.site", "r1n07-ib.site", "r2n01-ib.site", "r2n07-ib.site"]),
    ],
)
def test_node_lists_of_slurm(nodelist: str, hosts: list[str]) -> None:
    assert expand_hosts(nodelist) == hosts


@pytest.mark.parametrize("nodelist", ["", "n[", "n]", "n[1-2", "n[]", "n[2-1]", "n[a-b]", "n1,,n2", "n1, n2", "n[[1]]"])
def test_what_is_no_node_list_is_refused(nodelist: str) -> None:
    with pytest.raises(ValueError, match="it must look like"):
        expand_hosts(nodelist)


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """os.environ without the variables of launchers, restored afterwards."""
    for name in TORCH:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_torch_and_deepspeed_read_what_was_found(clean_environment: pytest.MonkeyPatch) -> None:
    environment = LaunchEnvironment.from_variables(SRUN)
    environment.export(os.environ, environment.master_address or "", environment.master_port)
    found = {name: os.environ[name] for name in TORCH}
    expected = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "n01", "MASTER_PORT": "21717"}
    assert found == expected


def test_a_process_alone_meets_itself_without_a_port(clean_environment: pytest.MonkeyPatch) -> None:
    store = open_store(LaunchEnvironment.from_variables({}))
    assert isinstance(store, torch.distributed.HashStore)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and "MASTER_PORT" not in os.environ
    assert os.environ["RANK"] == os.environ["LOCAL_RANK"] == "0"


def test_under_mpirun_without_mpi4py_the_error_says_what_to_do(clean_environment: pytest.MonkeyPatch) -> None:
    clean_environment.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ValueError, match=r"mpi4py cannot be imported .*megasparse\[mpi\].* or set MASTER_ADDR"):
        open_store(LaunchEnvironment.from_variables(OPEN_MPI))
    told = OPEN_MPI | {"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "4711"}
    with pytest.raises(ValueError, match="cannot reach nowhere.invalid:4711: .*MASTER_ADDR must be"):
        open_store(LaunchEnvironment.from_variables(told))
    assert (os.environ["MASTER_ADDR"], os.environ["RANK"]) == ("nowhere.invalid", "3")


def test_the_user_chooses_the_accelerator_before_the_machine() -> None:
    variables = {"DS_ACCELERATOR": "cpu"}
    assert choose_accelerator(variables) == "cpu" == variables["DS_ACCELERATOR"]
    unset: dict[str, str] = {}
    assert choose_accelerator(unset) == unset["DS_ACCELERATOR"]


@pytest.mark.parametrize(("rank", "asked_for", "heard"), [(0, [], 1), (1, [], 0), (3, [], 0), (3, ["default"], 1)])
def test_a_warning_is_told_once(monkeypatch, rank: int, asked_for: list[str], heard: int) -> None:
    monkeypatch.setattr(sys, "warnoptions", asked_for)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        leave_warnings_to_rank_0(rank)
        warnings.warn("data.train: other tokens", stacklevel=1)
    assert len(told) == heard


@pytest.mark.parametrize(
    ("local_rank", "count", "visible", "wanted"),
    [(3, 8, None, 3), (0, 1, None, 0), (3, 1, "GPU-d0b4", 0), (3, 1, "3", 0), (1, 4, "4,5,6,7", 1)],
)
def test_each_rank_has_a_gpu(clean_environment, monkeypatch, local_rank, count, visible, wanted) -> None:
    chosen, variables = [], os.environ
    monkeypatch.setitem(variables, "DS_ACCELERATOR", "cuda")
    if visible is not None:
        monkeypatch.setitem(variables, "CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert process_group._device(local_rank) == (torch.device("cuda", wanted), "nccl") and chosen == [wanted]
    # DeepSpeed has its own idea of the device, and compares it.
    told = {"LOCAL_RANK": str(local_rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(local_rank), "RANK": "7"}
    process_group.tell_deepspeed(wanted, told)
    assert told == {"LOCAL_RANK": str(wanted), "OMPI_COMM_WORLD_LOCAL_RANK": str(wanted), "RANK": "7"}


@pytest.mark.parametrize(
    ("local_rank", "count", "visible"), [(1, 1, None), (4, 4, None), (2, 2, "0,1"), (0, 0, ""), (1, 1, "0,9")]
)
def test_ranks_without_a_gpu_are_refused(local_rank, count, visible) -> None:
    variables = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    with pytest.raises(ValueError, match=f"CUDA_VISIBLE_DEVICES: .*local rank {local_rank}, .*finds {count} GPU"):
        process_group.device_index(local_rank, count, variables)

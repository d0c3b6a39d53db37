"""The same run on two hosts: a hostfile over ssh, mpirun over ssh, and launchers that need no ssh.

The hosts are name spaces of this machine (hosts.py); what runs between them goes over a network of theirs.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import runs
from hosts import Host, require, two_hosts

SHORT = ["train.stop_after=5", "train.micro_batch_size=2"]
# With another cache, whose tables choose other kernels, the last bits are others.
EXPORTED = ("PYTHONPATH", "DS_ACCELERATOR", "OMP_NUM_THREADS", "MEGASPARSE_CACHE")


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """The curve on two ranks of one host."""
    require()
    folder = tmp_path_factory.mktemp("expected")
    runs.run(runs.command(corpus, folder, *SHORT, ranks=2))
    return runs.curve(folder / "run")


def hostfile(folder: Path) -> list[str]:
    path = folder / "hostfile"
    path.write_text("n1 slots=1\nn2 slots=1\n")
    return ["--hostfile", str(path)]


def deepspeed(folder: Path, *options: str) -> list[str]:
    return [str(Path(sys.executable).with_name("deepspeed")), *hostfile(folder), *options]


def run_on_each(hosts: list[Host], commands: list[list[str]], variables: list[dict[str, str]]) -> None:
    """One command per host at the same time."""
    with ExitStack() as stack:
        processes = [
            stack.enter_context(runs.start(host.command(command), own))
            for host, command, own in zip(hosts, commands, variables, strict=True)
        ]
        for process in processes:
            runs.finish(process)


def test_deepspeed_with_a_hostfile_over_ssh(corpus: Path, tmp_path: Path, expected: list[tuple]) -> None:
    require("pdsh")
    script = runs.command(corpus, tmp_path, *SHORT, ranks=1)[1:]
    # DeepSpeed hands on only some variables to the hosts; others are named in this file.
    lines = [f"{name}={os.environ[name]}\n" for name in EXPORTED if name in os.environ]
    (tmp_path / "deepspeed_env").write_text("".join(lines))
    with two_hosts(tmp_path, with_ssh=True) as (first, _):
        command = first.command([*deepspeed(tmp_path), *script])
        output = runs.run(command, variables={"DS_ENV_FILE": str(tmp_path / "deepspeed_env")}).stdout
    for name in ("n1", "n2"):
        assert any(line.startswith(f"{name}: ") and "exits successfully" in line for line in output.splitlines()), (
            output
        )
    assert runs.curve(tmp_path / "run") == expected


@pytest.mark.exhaustive
def test_deepspeed_started_on_each_host(corpus: Path, tmp_path: Path, expected: list[tuple]) -> None:
    script = runs.command(corpus, tmp_path, *SHORT, ranks=1)[1:]
    commands = [
        [*deepspeed(tmp_path, "--no_ssh", "--node_rank", str(rank), "--master_addr", "n1"), *script] for rank in (0, 1)
    ]
    with two_hosts(tmp_path, with_ssh=False) as hosts:
        run_on_each(hosts, commands, [{}, {}])
    assert runs.curve(tmp_path / "run") == expected


@pytest.mark.exhaustive
def test_mpirun_over_ssh(corpus: Path, tmp_path: Path, expected: list[tuple]) -> None:
    pytest.importorskip("mpi4py")
    mpirun = Path(sys.executable).with_name("mpirun")
    if not mpirun.exists():
        pytest.skip(f"there is no mpirun beside {sys.executable}")
    exports = [word for name in EXPORTED for word in ("-x", name)]
    launcher = [str(mpirun), "--allow-run-as-root", "--host", "n1:1,n2:1", "-np", "2", *exports]
    with two_hosts(tmp_path, with_ssh=True) as (first, _):
        runs.run(first.command([*launcher, *runs.command(corpus, tmp_path, *SHORT, ranks=1)]))
    assert runs.curve(tmp_path / "run") == expected


@pytest.mark.exhaustive
def test_srun_meets_at_the_first_host_of_the_step(corpus: Path, tmp_path: Path, expected: list[tuple]) -> None:
    task = {
        "SLURM_JOB_ID": "17",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_LOCALID": "0",
    }
    with two_hosts(tmp_path, with_ssh=False) as hosts:
        command = runs.command(corpus, tmp_path, *SHORT, ranks=1)
        run_on_each(hosts, [command, command], [task | {"SLURM_PROCID": str(rank)} for rank in (0, 1)])
    assert runs.curve(tmp_path / "run") == expected

"""The same run under every launcher: it ends well, and the curve is the same bit for bit."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import runs
from processes import LIMIT_SECONDS

STOP_AFTER = 5
SHORT = [f"train.stop_after={STOP_AFTER}", "train.micro_batch_size=2"]


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[tuple]]:
    """The curve of the short run on so many ranks, started without a launcher."""
    known: dict[int, list[tuple]] = {}

    def curve(ranks: int) -> list[tuple]:
        if ranks not in known:
            folder = tmp_path_factory.mktemp("expected")
            runs.run(runs.command(corpus, folder, *SHORT, ranks=ranks))
            known[ranks] = runs.curve(folder / "run")
            assert [row[0] for row in known[ranks]] == list(range(1, STOP_AFTER + 1))
        return known[ranks]

    return curve


def beside_python(name: str) -> str:
    """A program that a wheel has installed; the test is skipped where it is missing."""
    program = Path(sys.executable).with_name(name)
    if not program.exists():
        pytest.skip(f"there is no {name} beside {sys.executable}")
    return str(program)


def mpirun(*options: str) -> list[str]:
    """mpirun refuses root unless it is told."""
    pytest.importorskip("mpi4py")
    as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return [beside_python("mpirun"), *as_root, *options]


def slurm_step(rank: int, num_tasks: int) -> dict[str, str]:
    """What srun would tell a task of a step on one node."""
    return {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NTASKS": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(num_tasks),
        "SLURM_STEP_NODELIST": "n01",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


def run_as_srun(arguments: list[str], num_tasks: int, *, expect: int = 0) -> list[str]:
    """Start the tasks of a step, and give back what each of them printed."""
    with ExitStack() as stack:
        tasks = [stack.enter_context(runs.start(arguments, slurm_step(rank, num_tasks))) for rank in range(num_tasks)]
        return [runs.finish(task, expect=expect).stdout for task in tasks]


def test_torchrun(corpus: Path, tmp_path: Path, expected: Callable[[int], list[tuple]]) -> None:
    script = runs.command(corpus, tmp_path, *SHORT, ranks=1)[1:]
    runs.run([beside_python("torchrun"), "--standalone", "--nproc_per_node", "2", *script])
    assert runs.curve(tmp_path / "run") == expected(2)


@pytest.mark.exhaustive
def test_mpirun(corpus: Path, tmp_path: Path, expected: Callable[[int], list[tuple]]) -> None:
    runs.run([*mpirun("-np", "2"), *runs.command(corpus, tmp_path, *SHORT, ranks=1)])
    assert runs.curve(tmp_path / "run") == expected(2)


@pytest.mark.exhaustive
def test_mpirun_with_more_ranks_than_cores(
    corpus: Path, tmp_path: Path, expected: Callable[[int], list[tuple]]
) -> None:
    # Here Open MPI numbers the ranks of a host in another order than the ranks of the run.
    runs.run([*mpirun("--oversubscribe", "-np", "4"), *runs.command(corpus, tmp_path, *SHORT, ranks=1)])
    assert runs.curve(tmp_path / "run") == expected(4)


# A real one starts the jobs of test_slurm.py.
@pytest.mark.exhaustive
def test_srun(corpus: Path, tmp_path: Path, expected: Callable[[int], list[tuple]]) -> None:
    run_as_srun(runs.command(corpus, tmp_path, *SHORT, ranks=1), 2)
    assert runs.curve(tmp_path / "run") == expected(2)


def test_a_plain_process_in_a_batch_script_does_not_wait_for_others(corpus: Path, tmp_path: Path) -> None:
    batch_script = slurm_step(0, 2) | {"SLURM_NTASKS": "2"}
    del batch_script["SLURM_STEP_NUM_TASKS"]
    runs.run(runs.command(corpus, tmp_path, *SHORT, ranks=1), variables=batch_script)
    assert len(runs.curve(tmp_path / "run")) == STOP_AFTER


def test_a_mistake_is_told_once_and_no_rank_waits(corpus: Path, tmp_path: Path) -> None:
    wrong = runs.command(corpus, tmp_path, "optimizer.lr=-1", ranks=1)
    output = runs.run([*mpirun("-np", "2"), *wrong], expect=2).stdout
    assert output.count("optimizer.lr") == 1, output
    first, second = run_as_srun(wrong, 2, expect=2)
    assert first.startswith("error: optimizer.lr")
    # No launcher has ended it when rank 0 was refused, so it may be the only one: it says so, later.
    assert second.startswith("error on rank 1: optimizer.lr")
    leftover = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    output = runs.run([*mpirun("-np", "2"), *wrong], expect=2, variables=leftover).stdout
    assert "error: WORLD_SIZE: 1 in the environment, but mpirun (Open MPI) has started 2 processes" in output
    assert not (tmp_path / "run").exists()


def test_mpi4py_of_another_mpi_is_refused(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    # MPICH's mpirun says so; this Open MPI sees a process that it has not started.
    of_mpich = {"PMI_RANK": "0", "MPI_LOCALRANKID": "0", "PMI_SIZE": "2"}
    output = runs.run(runs.command(corpus, tmp_path, *SHORT, ranks=1), expect=2, variables=of_mpich).stdout
    assert "it sees rank 0 of 1, the environment says 0 of 2" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.exhaustive
def test_mpirun_hands_sigusr1_on_to_the_ranks(corpus: Path, tmp_path: Path) -> None:
    arguments = [*mpirun("-np", "2"), *runs.command(corpus, tmp_path, runs.LONG, ranks=1)]
    with runs.start(arguments) as process:
        runs.wait_for_steps(process, tmp_path / "run", 1)
        process.send_signal(signal.SIGUSR1)
        output = runs.finish(process).stdout
    assert "SIGUSR1" in output, output
    assert (tmp_path / "run" / "checkpoints").is_dir()


@pytest.mark.parametrize(
    "launcher", ["deepspeed", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("torchrun", "mpirun"))]
)
def test_ctrl_c_leaves_no_rank(corpus: Path, tmp_path: Path, launcher: str) -> None:
    """Sent to all processes in the foreground, as the terminal does."""
    ranks = 2 if launcher == "deepspeed" else 1
    arguments = runs.command(corpus, tmp_path, runs.LONG, ranks=ranks, launcher="deepspeed")
    if launcher == "torchrun":
        arguments = [beside_python("torchrun"), "--standalone", "--nproc_per_node", "2", *arguments[1:]]
    elif launcher == "mpirun":
        arguments = [*mpirun("-np", "2"), *arguments]
    with runs.start(arguments) as process:
        runs.wait_for_steps(process, tmp_path / "run", 3)
        os.killpg(process.pid, signal.SIGINT)
        # Its end is the end of all who hold this pipe: of the ranks, too.
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
        psutil.wait_procs(process.left(), timeout=LIMIT_SECONDS)
        assert not process.left()
    # mpirun ends its ranks without giving them the time to save.
    assert launcher == "mpirun" or "stopped by" in output, output

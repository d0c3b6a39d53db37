"""Runs a function on several ranks: real processes, gloo, a hard time-out.

    def work(mesh, scale):                                   # at module level, so that children can import it
        return {"sum": mesh.data_parallel.sum_(torch.tensor(scale))}

    results = run_distributed(work, 2, 1.5, timeout=60)      # one entry per rank

Imports of torch and DeepSpeed cost seconds of a core, so ranks are forked from a server process that has made them
(and has no thread or process group yet). Starting ranks still costs: put many cases into one call.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

GRACE_SECONDS = 3.0
"""How long the other ranks may go on after one has failed: enough to report an error of their own."""


class RankFailure(AssertionError):
    """A rank raised, died or hung; the message holds rank and traceback."""


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120, with_mesh: bool = True
) -> list[Any]:
    """Call ``function(mesh, *args)`` on `world_size` ranks and return what each of them returned.

    function: importable by name. args: picklable. Results are plain data or tensors (``torch.save``, read back with
    ``weights_only``). with_mesh=False: call ``function(*args)`` with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT in the environment, as launchers do, and no process group.
    Raises RankFailure where a rank fails, or where one is not done after `timeout` seconds; no process is left behind.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "deepspeed"])
    with tempfile.TemporaryDirectory() as name:
        folder, port, deadline = Path(name), _free_port(), time.monotonic() + timeout
        processes = [
            context.Process(
                target=_rank_main,
                args=(rank, world_size, port, folder, deadline, with_mesh, function, args),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            timed_out = not _wait(processes, deadline)
        finally:
            for process in processes:
                process.kill()
                process.join()
        failures = _failures(processes, folder, timed_out, timeout)
        if failures:
            raise RankFailure("\n".join(failures))
        return [torch.load(folder / f"{rank}.result", weights_only=True) for rank in range(world_size)]


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    folder: Path,
    deadline: float,
    with_mesh: bool,
    function: Callable[..., Any],
    args: Sequence[Any],
) -> None:
    """What a child does: write `<rank>.result`, or `<rank>.error` and a non-zero exit code."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    torch.manual_seed(1234)
    # A rank that hangs says where, shortly before it is killed. Monotonic clocks agree between processes.
    stacks, left = (folder / f"{rank}.stacks").open("w"), deadline - time.monotonic()
    faulthandler.dump_traceback_later(max(left - 1.5, 0.1), file=stacks)
    try:
        result = _call(function, args, left) if with_mesh else function(*args)
        torch.save(result, folder / f"{rank}.part")
        (folder / f"{rank}.part").rename(folder / f"{rank}.result")
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)
    # Destructors of process groups may wait for peers; the result is on disk.
    os._exit(0)


def _call(function: Callable[..., Any], args: Sequence[Any], timeout: float) -> Any:
    from megasparse.launching import LaunchEnvironment, open_mesh

    environment = LaunchEnvironment.from_variables(os.environ)
    with open_mesh(environment, timeout_seconds=max(int(timeout), 1)) as mesh:
        result = function(mesh, *args)
        mesh.barrier()
    return result


def _wait(processes: Sequence[BaseProcess], deadline: float) -> bool:
    """Until all are done, or one has failed and the others had their grace. False: the time is up."""
    failed_at = None
    while any(process.is_alive() for process in processes):
        now = time.monotonic()
        if failed_at is None and any(process.exitcode not in (None, 0) for process in processes):
            failed_at = now
        if failed_at is not None and now > failed_at + GRACE_SECONDS:
            return True
        if now > deadline:
            return False
        time.sleep(0.02)
    return True


def _failures(processes: Sequence[BaseProcess], folder: Path, timed_out: bool, timeout: float) -> list[str]:
    """One paragraph per rank without a result; the first cause before its consequences."""
    reports = []
    for rank, process in enumerate(processes):
        if (folder / f"{rank}.result").exists():
            continue
        error, stacks = folder / f"{rank}.error", folder / f"{rank}.stacks"
        if error.exists():
            reports.append((error.stat().st_mtime, f"rank {rank} raised:\n{error.read_text()}"))
        elif timed_out:
            where = stacks.read_text() if stacks.exists() else ""
            reports.append((float("inf"), f"rank {rank} was not done after {timeout} s:\n{where}"))
        else:
            reports.append((float("inf"), f"rank {rank} ended with exit code {process.exitcode} and no result"))
    return [text for _, text in sorted(reports)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

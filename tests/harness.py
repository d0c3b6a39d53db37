"""Runs a function on several ranks: real processes, gloo, a hard time-out.

    def work(mesh, scale):                                   # at module level, so that children can import it
        return {"sum": mesh.data_parallel.sum_(torch.tensor(scale))}

    results = run_distributed(work, 2, 1.5, timeout=60)      # one entry per rank

Imports of torch and DeepSpeed cost seconds of a core, so ranks are forked from a server process that has made them
(and has no thread or process group yet). Starting ranks still costs: put many cases into one call.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
from pages import leave_out_figures
from ports import port_of, reserve_port

TESTS = Path(__file__).parent

START_SECONDS = 600.0
"""How long the start of the ranks may take; `timeout` counts from there, however busy the machine is."""

PRELOADED = "imported_once"
"""The module that the server imports: imported_once.py."""

GRACE_SECONDS = 30.0
"""How long the other ranks may go on after one has failed: enough to report an error of their own."""

STACKS_SECONDS = 10.0
"""How long a rank that hangs may take to say where."""


class RankFailure(AssertionError):
    """A rank raised, died or hung; the message holds rank and traceback."""


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 600, with_mesh: bool = True
) -> list[Any]:
    """Call ``function(mesh, *args)`` on `world_size` ranks and return what each of them returned.

    function: importable by name. args: picklable. Results are plain data or tensors (``torch.save``, read back with
    ``weights_only``). with_mesh=False: call ``function(*args)`` with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT in the environment, as launchers do, and no process group.
    Raises RankFailure where a rank fails, or where one is not done `timeout` seconds after all have started. No process
    is left behind, nor one that a rank has started, whatever ends this, Ctrl-C too.
    """
    context = multiprocessing.get_context("forkserver")
    with _server(), tempfile.TemporaryDirectory() as name, reserve_port() as reserved:
        folder = Path(name)
        common = (world_size, port_of(reserved), folder, timeout, with_mesh, function, args)
        processes = [
            context.Process(target=_rank_main, args=(rank, *common), daemon=True) for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            timed_out = not _wait(processes, folder, timeout)
        finally:
            for process in processes:
                _end(process)
        failures = _failures(processes, folder, timed_out, timeout)
        if failures:
            raise RankFailure("\n".join(failures))
        return [torch.load(folder / f"{rank}.result", weights_only=True) for rank in range(world_size)]


@cache
def _start_server() -> None:
    """Python 3.11 imports what is preloaded along the path of a new interpreter, and passes over what is not there."""
    multiprocessing.set_forkserver_preload([PRELOADED])
    path = os.environ.get("PYTHONPATH")
    folders = [str(TESTS), str(TESTS.parent), *([path] if path else [])]
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(folders), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu"):
        forkserver.ensure_running()


@contextlib.contextmanager
def _server() -> Iterator[None]:
    """It ends with this process by itself, but not while it imports: Ctrl-C is lost where an import passes over all
    exceptions, and whoever reads the output of the tests would wait for it. So Ctrl-C ends it here, after its ranks."""
    try:
        _start_server()
        yield
    except KeyboardInterrupt:
        _start_server.cache_clear()
        server = forkserver._forkserver
        if server._forkserver_pid is not None:
            os.kill(server._forkserver_pid, signal.SIGKILL)
            server._stop()
        raise


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    folder: Path,
    timeout: float,
    with_mesh: bool,
    function: Callable[..., Any],
    args: Sequence[Any],
) -> None:
    """What a child does: write `<rank>.result`, or `<rank>.error` and a non-zero exit code."""
    # A session of its own: Ctrl-C reaches the test alone, which then ends the rank and all that it has started.
    os.setsid()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    torch.manual_seed(1234)
    with (folder / f"{rank}.stacks").open("w") as stacks:
        faulthandler.dump_traceback_later(timeout, file=stacks)
        (folder / f"{rank}.started").touch()
        leave_out_figures()
        try:
            result = _call(function, args, timeout) if with_mesh else function(*args)
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


def _wait(processes: Sequence[BaseProcess], folder: Path, timeout: float) -> bool:
    """Until all are done, or one has failed and the others had their grace. False: the time is up."""
    failed_at, deadline, all_started = None, time.monotonic() + START_SECONDS, False
    while active := [rank for rank, process in enumerate(processes) if process.is_alive()]:
        now = time.monotonic()
        if not all_started and all((folder / f"{rank}.started").exists() for rank in range(len(processes))):
            all_started, deadline = True, now + timeout
        if failed_at is None and any(process.exitcode not in (None, 0) for process in processes):
            failed_at = now
        if failed_at is not None and (now > failed_at + GRACE_SECONDS or all(map(_is_stopped, processes))):
            return True
        if now > deadline:
            have_said = all((folder / f"{rank}.stacks").read_text() for rank in active if all_started)
            if have_said or now > deadline + STACKS_SECONDS:
                return False
        time.sleep(0.02)
    return True


def _is_stopped(process: BaseProcess) -> bool:
    """Whether it will do nothing more by itself: it has ended, or was stopped by a signal."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return not process.is_alive() or psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    return True


def _end(process: BaseProcess) -> None:
    """Kill a rank and what it has started, whether it has begun or not."""
    if process.pid is not None:
        # It may not have come to its setsid, or it and its session may have ended.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


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

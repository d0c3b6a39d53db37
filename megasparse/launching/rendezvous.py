"""Where the ranks of a run meet: the store of rank 0, found or opened, and a start that does not wait for ever.

    store = open_store(environment, start_seconds=600)      # writes the variables that torch and DeepSpeed read

An address that cannot be looked up, or a port that somebody else has, is for the user to mend: ValueError. Ranks that
do not come are lost peers: ``dist.DistError`` with a note that names them.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import threading
from datetime import timedelta

import torch.distributed as dist

from megasparse.config.loader import ConfigError
from megasparse.launching.environment import LOOPBACK, LaunchEnvironment

START_SECONDS = 600
"""How long ranks wait for each other at the start, where nobody says (`train.start_timeout_seconds`)."""

OTHER_FILES = 512
"""Files and connections that rank 0 has open besides those to other ranks, at most."""

MAX_NAMED = 8
"""Missing ranks that a message names."""


def open_store(environment: LaunchEnvironment, start_seconds: float = START_SECONDS) -> dist.Store:
    """The store where the ranks meet, once all of them have come to it.

    Writes the variables that torch and DeepSpeed read into os.environ. A process alone meets itself in memory, without
    a port. Under mpirun the ranks learn the address of rank 0 through mpi4py, unless the user gave MASTER_ADDR and
    MASTER_PORT; ValueError where they cannot.
    """
    timeout = timedelta(seconds=start_seconds)
    address, port, store = environment.master_address, environment.master_port, None
    if environment.world_size == 1:
        environment.export(os.environ, address or LOOPBACK, port)
        return dist.HashStore()
    if address is None or port is None:
        address, port, store = _meet_by_mpi(environment, timeout)
    environment.export(os.environ, address, port)
    if store is None:
        store = _meet_at(environment, address, port, timeout)
    _wait_for_all(dist.PrefixStore("megasparse/start", store), environment, timeout)
    return store


def _meet_at(environment: LaunchEnvironment, address: str, port: int, timeout: timedelta) -> dist.Store:
    """The store at an address that all ranks were told."""
    is_kept_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listens = environment.rank == 0 and not is_kept_by_launcher
    _check_address(address, port, "listen at" if listens else "reach")
    if listens:
        return _listen(address, port, environment.world_size, timeout)
    store = _connect(address, port, environment.world_size, timeout)
    if is_kept_by_launcher:
        # torchrun keeps one store for all its starts of the ranks.
        return dist.PrefixStore(f"/worker/attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store


def _check_address(address: str, port: int, purpose: str) -> None:
    """Torch would look again and again until its time-out."""
    try:
        socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"cannot {purpose} {address}:{port}: {error}; MASTER_ADDR must be a name or an address of the host of "
            "rank 0, known on all hosts"
        ) from None


def _connect(address: str, port: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store of another process.

    In a thread, because torch 2.13 waits without end for the answer of a program that listens there and says nothing.
    """
    seconds = timeout.total_seconds()
    found: list[dist.Store] = []
    failed = dist.DistNetworkError("connection timed out")

    def connect() -> None:
        nonlocal failed
        try:
            found.append(dist.TCPStore(address, port, world_size, False, timeout, wait_for_workers=False))
        except dist.DistError as error:
            failed = error

    thread = threading.Thread(target=connect, name="rendezvous", daemon=True)
    thread.start()
    thread.join(seconds + 1)
    if not found:
        failed.add_note(f"rank 0 does not answer at {address}:{port} within {seconds:g} s")
        raise failed
    return found[0]


def _wait_for_all(store: dist.Store, environment: LaunchEnvironment, timeout: timedelta) -> None:
    """Until every rank has come here."""
    try:
        store.set(str(environment.rank), "")
        if store.add("number", 1) == environment.world_size:
            store.set("all", "")
        store.wait(["all"], timeout)
    except dist.DistError as error:
        with contextlib.suppress(dist.DistError):  # rank 0 has gone, and the store with it
            missing = [rank for rank in range(environment.world_size) if not store.check([str(rank)])]
            if missing:
                named = ", ".join(map(str, missing[:MAX_NAMED])) + (" ..." if len(missing) > MAX_NAMED else "")
                error.add_note(f"not started within {timeout.total_seconds():g} s: rank {named}")
        raise


def _meet_by_mpi(environment: LaunchEnvironment, timeout: timedelta) -> tuple[str, int, dist.Store]:
    """Address, port and store of rank 0, known to all ranks; MPI is ended again, for nothing else here uses it."""
    MPI = _import_mpi()
    started_here = not MPI.Is_initialized()
    if started_here:
        MPI.Init()
    world = MPI.COMM_WORLD
    if (world.rank, world.size) != (environment.rank, environment.world_size):
        raise ValueError(
            f"mpi4py uses another MPI than the mpirun that started this process: it sees rank {world.rank} of "
            f"{world.size}, the environment says {environment.rank} of {environment.world_size}; install mpi4py for "
            "this MPI, or set MASTER_ADDR and MASTER_PORT"
        )
    same_host = world.Split_type(MPI.COMM_TYPE_SHARED).size == world.size
    found = store = error = None
    if world.rank == 0:
        try:
            address = environment.master_address or (LOOPBACK if same_host else _own_address())
            store = _listen(address, environment.master_port, world.size, timeout)
            found = (address, store.port)
        except ValueError as raised:
            error = str(raised)
    # An error of rank 0 is sent as well: the others must not wait for it.
    found, error = world.bcast((found, error))
    if started_here:
        # mpirun takes a process that leaves without this for a crashed one.
        MPI.Finalize()
    if error is not None:
        raise ValueError(error)
    if store is None:
        store = _connect(found[0], found[1], environment.world_size, timeout)
    return *found, store


def _listen(address: str, port: int | None, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """The store of rank 0.

    Without a port the system chooses a free one in the moment in which the store begins to listen: one that is looked
    for first and opened later may be somebody else's by then.
    """
    _allow_connections(world_size)
    try:
        return dist.TCPStore(address, port or 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
    except RuntimeError as error:
        reason = "the port is in use" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        raise ValueError(
            f"cannot listen at {address}:{port or 'any port'}: {reason}; MASTER_PORT must be a free port of the host "
            "of rank 0"
        ) from error


def _allow_connections(world_size: int) -> None:
    """The store of rank 0 keeps a connection to every rank: systems allow a process 1,024 open files, until it asks for
    more. Raises ConfigError where it may not have enough."""
    needed = world_size + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ConfigError(
                f"ulimit -n: {hard} open files at most on the host of rank 0, which keeps a connection to each of "
                f"{world_size} ranks; must be at least {needed}"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _import_mpi():
    """mpi4py's MPI module, which starts MPI by itself only where it is told to."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library on this machine
        raise ValueError(
            f"started by mpirun, but mpi4py cannot be imported ({error}): pip install 'megasparse[mpi]', or set "
            "MASTER_ADDR and MASTER_PORT to address and a free port of the host of rank 0"
        ) from error
    return MPI


def _own_address() -> str:
    """The first address of this host that is not its loopback."""
    try:
        answer = subprocess.run(
            ["hostname", "-I"], capture_output=True, encoding="utf-8", check=True, timeout=10
        ).stdout
        return answer.split()[0]
    except (OSError, ValueError, subprocess.SubprocessError, IndexError) as error:
        raise ValueError(
            f"`hostname -I` tells no address of the host of rank 0 ({error}); set MASTER_ADDR to one"
        ) from error

"""A private SLURM cluster of two nodes on this machine, from the installed binaries.

    reason = why_not()                     # None where a cluster can be started
    with SlurmCluster() as cluster:
        cluster.run("sinfo")               # any SLURM command, against this cluster
        cluster.job_state(17)

The nodes are the loopback addresses 127.0.0.1 and 127.0.0.2, so that their names are addresses which ranks can reach.
All files lie in a temporary folder, all ports are nobody else's, and all daemons end with the block, as do their jobs.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from ports import port_of, reserve_port
from processes import LIMIT_SECONDS

BINARIES = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
NODES = ("127.0.0.1", "127.0.0.2")

# Debian keeps the daemons where the PATH of a user may not look.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# Jobs are looked for and started every second; a warning or time limit is noticed within 30 seconds, which is fixed.
CONFIGURATION = """
ClusterName=megasparse
FirstJobId={first_job}
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
JobRequeue=1
KillWait=20
MinJobAge=300
ReturnToService=2
SlurmdTimeout=300
{nodes}
PartitionName=test Nodes={names} Default=YES MaxTime=10 State=UP
"""


def why_not() -> str | None:
    """Why no cluster can be started here, or None."""
    missing = [name for name in BINARIES if shutil.which(name, path=SEARCH_PATH) is None]
    if missing:
        return f"SLURM is not installed (Debian: apt-get install slurm-wlm munge); missing: {', '.join(missing)}"
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "a private SLURM cluster needs to be started by root on Linux"
    return None


class SlurmCluster:
    """munged, slurmctld and two slurmd; they live inside the `with` block."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-cluster-"))
        self.folder.chmod(0o755)  # munged runs as a user of its own
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._ports = [reserve_port() for _ in range(1 + len(NODES))]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))},
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": SEARCH_PATH,
        }

    def __enter__(self) -> SlurmCluster:
        try:
            self._start_munge()
            self._configure()
            for name in ("state", "spool-" + NODES[0], "spool-" + NODES[1]):
                (self.folder / name).mkdir()
            self._start("slurmctld", ["slurmctld", "-D", "-i", "-c"])
            self.controller_started_at = time.monotonic()
            for node in NODES:
                self._start(f"slurmd-{node}", ["slurmd", "-D", "-N", node])
            self._wait_for(self._is_up, "two idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if any(daemon.poll() is None for daemon in self._daemons):
            self._end_jobs()
        for daemon in reversed(self._daemons):
            _end_tree(daemon.pid)
            daemon.wait(timeout=LIMIT_SECONDS)
        self._end_strays()
        for reserved in self._ports:
            reserved.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str, check: bool = True) -> str:
        """Standard output of a SLURM command."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says, such as {"JobState": "RUNNING", "Restarts": "1"}."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "--oneliner", "job", str(number))))

    def wait_for_job(self, number: int, condition: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        """Wait until the job's description meets the condition; returns it."""
        return self._wait_for(lambda: found if condition(found := self.job(number)) else None, f"job {number}")

    def start_soon(self, number: int, minutes: int | None = None) -> None:
        """Start a requeued job, with another time limit where one is given.

        SLURM lets it wait for two minutes, so that what is left of its last start is gone. Here that is looked for;
        and a credential is refused that was made in the second in which the last one was revoked.
        """
        self._wait_for(lambda: self._is_up() and not self._step_daemons(), f"the end of job {number}")
        limit = [] if minutes is None else [f"TimeLimit={minutes}"]
        self.run("scontrol", "update", f"JobId={number}", *limit, "StartTime=now+3")
        started = ("RUNNING", "COMPLETING", "COMPLETED")
        self.wait_for_job(number, lambda job: job["JobState"] in started)

    def wait_for_end(self, number: int) -> dict[str, str]:
        """Wait until the job will not run again; returns its description."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.wait_for_job(number, lambda job: job["JobState"] in ended)

    def logs(self) -> str:
        """The ends of the daemons' logs, for the message of a failed test."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.mkdir(mode=0o755)
        (folder / "key").write_bytes(secrets.token_bytes(128))
        (folder / "key").chmod(0o400)
        for path in (folder, folder / "key"):
            shutil.chown(path, "munge", "munge")
        options = [f"--{name}={folder / name}" for name in ("socket", "log-file", "pid-file", "seed-file")]
        command = ["munged", "--foreground", f"--key-file={folder / 'key'}", "--num-threads=2", *options]
        self._start("munged", command, user="munge", group="munge", extra_groups=[])
        self._wait_for((folder / "socket").exists, "munged")

    def _configure(self) -> None:
        controller, *others = map(port_of, self._ports)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname=localhost NodeAddr={name} Port={port} CPUs=2 State=UNKNOWN"
            for name, port in zip(NODES, others, strict=True)
        )
        text = CONFIGURATION.format(
            folder=self.folder,
            # Where the ranks of a job meet follows from its number: two clusters on a machine must not count alike.
            first_job=secrets.randbelow(1_000_000) + 1,
            controller_port=controller,
            nodes=nodes,
            names=",".join(NODES),
        )
        (self.folder / "slurm.conf").write_text(text)

    def _start(self, name: str, command: list[str], **options: object) -> None:
        program = shutil.which(command[0], path=SEARCH_PATH)
        assert program is not None
        with (self.folder / f"{name}.start.log").open("wb") as log:
            daemon = subprocess.Popen(
                [program, *command[1:]],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **options,
            )
        self._daemons.append(daemon)

    def _is_up(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()
        return states == ["idle"] * len(NODES)

    def _wait_for(self, condition: Callable[[], object], what: str) -> object:
        deadline = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < deadline:
            if result := condition():
                return result
            for daemon in self._daemons:
                assert daemon.poll() is None, f"{daemon.args} ended\n{self.logs()}"
            time.sleep(0.3)
        queue = self.run("squeue", "--all", check=False)
        raise AssertionError(f"waited {LIMIT_SECONDS} s in vain for {what}\n{queue}\n{self.logs()}")

    def _end_jobs(self) -> None:
        try:
            numbers = self.run("squeue", "--noheader", "--format=%A", check=False).split()
            if numbers:
                self.run("scancel", "--signal=KILL", "--full", *numbers, check=False)
                self.run("scancel", *numbers, check=False)
        except subprocess.TimeoutExpired:
            pass  # what is left is ended by its processes

    def _end_strays(self) -> None:
        """Job steps are no children of the daemons; the cluster's configuration in their environment tells them."""
        for process in self._processes():
            process.kill()

    def _step_daemons(self) -> list[psutil.Process]:
        return [process for process in self._processes() if process.name().startswith("slurmstepd")]

    def _processes(self) -> list[psutil.Process]:
        """All processes of this cluster that are no children of this one."""
        daemons, found = {daemon.pid for daemon in self._daemons}, []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if ours and process.pid not in daemons and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


def _end_tree(number: int) -> None:
    try:
        process = psutil.Process(number)
        processes = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    process.send_signal(signal.SIGTERM)
    _, active = psutil.wait_procs(processes, timeout=30)
    for left in active:
        left.kill()

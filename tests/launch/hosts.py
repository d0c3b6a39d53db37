"""Two hosts on one machine: network, host name, mounts and processes of their own, a virtual cable, and sshd.

    with two_hosts(folder, with_ssh=True) as (first, second):
        runs.run(first.command(["deepspeed", "--hostfile", ...]))  # on n1, where `ssh n2` asks for no password

Linux name spaces, so root is needed. They live in one process per host and vanish with it: nothing on the machine is
changed, and what runs inside a host ends with the host.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from processes import LIMIT_SECONDS

ADDRESSES = {"n1": "10.99.0.1", "n2": "10.99.0.2"}
UNSHARE = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# The first process of a host. All mounts are seen by this host alone.
BOOT = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
if [ -e "$2/ssh_config" ]; then
    mount --bind "$2/ssh_config" /etc/ssh/ssh_config
    mount -t tmpfs none /run
    mkdir /run/sshd
fi
ip link set lo up
shift 2
echo booted >&2
exec "$@"
"""

SSH_CONFIG = """Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking yes
"""

SSHD_CONFIG = """HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""


@dataclass(frozen=True)
class Host:
    """A booted host."""

    name: str
    process_id: int
    """Of its first process, as seen from outside."""

    def command(self, arguments: list[str]) -> list[str]:
        """The command line that runs `arguments` on this host."""
        return ["nsenter", "--target", str(self.process_id), "--net", "--uts", "--mount", "--pid", *arguments]


def require(*programs: str) -> None:
    """Skip the test where a program or a right is missing."""
    if os.geteuid() != 0:
        pytest.skip("two hosts on one machine need root, for network name spaces")
    for program in ("unshare", "nsenter", "ip", *programs):
        if shutil.which(program, path=SYSTEM_PATH) is None:
            pytest.skip(f"two hosts on one machine need {program}, which is not installed")
    cable = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1"]
    attempt = subprocess.run([*UNSHARE, *cable], capture_output=True, text=True, timeout=LIMIT_SECONDS)
    if attempt.returncode != 0:
        pytest.skip(f"this machine gives no network name spaces: {attempt.stderr.strip()}")


@contextlib.contextmanager
def two_hosts(folder: Path, *, with_ssh: bool) -> Iterator[list[Host]]:
    """Boot n1 and n2, connect them, and end them with all that runs there; skips where the machine cannot."""
    require(*(["ssh", "sshd", "ssh-keygen"] if with_ssh else []))
    addresses = {"localhost": "127.0.0.1", **ADDRESSES}
    (folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in addresses.items()))
    daemon = ["sleep", "infinity"]
    if with_ssh:
        _write_ssh_files(folder)
        sshd = shutil.which("sshd", path=SYSTEM_PATH)
        assert sshd
        daemon = [sshd, "-D", "-e", "-f", str(folder / "sshd_config")]
    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(_boot(name, folder, daemon)) for name in ADDRESSES]
        _connect(*hosts)
        yield hosts


@contextlib.contextmanager
def _boot(name: str, folder: Path, daemon: list[str]) -> Iterator[Host]:
    log = folder / f"{name}.log"
    with log.open("w") as output:
        boot = [*UNSHARE, "sh", "-c", BOOT, "sh", name, str(folder), *daemon]
        outer = subprocess.Popen(boot, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    try:
        signs = ["booted", *(["Server listening"] if len(daemon) > 2 else [])]
        deadline = time.monotonic() + LIMIT_SECONDS
        while not all(sign in log.read_text() for sign in signs):
            assert outer.poll() is None and time.monotonic() < deadline, f"{name} did not boot: {log.read_text()}"
            time.sleep(0.05)
        yield Host(name, psutil.Process(outer.pid).children()[0].pid)
    finally:
        # --kill-child: the first process of the host dies of this, and with it all others there.
        outer.kill()
        outer.wait(timeout=LIMIT_SECONDS)


def _connect(first: Host, second: Host) -> None:
    """A cable from eth0 to eth0."""
    cable = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(second.process_id)]
    # Process ids are those of outside, so this one must not enter the host's processes.
    commands = [["nsenter", "--target", str(first.process_id), "--net", *cable]]
    for host in (first, second):
        commands.append(host.command(["ip", "address", "add", f"{ADDRESSES[host.name]}/24", "dev", "eth0"]))
        commands.append(host.command(["ip", "link", "set", "eth0", "up"]))
    for command in commands:
        subprocess.run(command, check=True, capture_output=True, timeout=LIMIT_SECONDS)


def _write_ssh_files(folder: Path) -> None:
    """Keys and settings for both hosts: each knows the other and lets it in."""
    for name in ("key", "host_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True, capture_output=True, timeout=LIMIT_SECONDS)
    (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
    host_key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"{name} {host_key}" for name in ADDRESSES))

"""The ranks of a run on this machine, without the launcher's own start: python ranks.py RANKS PORT SCRIPT WORDS...

A run under the `deepspeed` launcher imports torch and DeepSpeed twice more than its ranks do, which is a third of the
time of a small run. Where the launcher itself is not tested, ranks get from here what it would give them. Signals go on
to all ranks; the first status other than 0 ends the others and is the status of all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

GRACE_SECONDS = 30
"""As long as the launcher waits for the others before it kills them."""


def main() -> int:
    world_size, port, *words = sys.argv[1:]
    ranks = [start(words, rank, world_size, port) for rank in range(int(world_size))]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda received, _: [rank.send_signal(received) for rank in ranks])
    while any(rank.poll() is None for rank in ranks):
        failed = [rank for rank in ranks if rank.poll()]
        if failed:
            return end(failed[0], ranks)
        time.sleep(0.02)
    return next((rank.returncode for rank in ranks if rank.returncode), 0)


def start(words: list[str], rank: int, world_size: str, port: str) -> subprocess.Popen[bytes]:
    of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    environment = {**os.environ, **of_rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    script, *settings = words
    command = [sys.executable, script, f"--local_rank={rank}", *settings]
    # Forked where this program is: its ranks need not import either.
    server = sys.modules.get("fork_server")
    return server.fork(command, environment) if server else subprocess.Popen(command, env=environment)


def end(failed: subprocess.Popen[bytes], ranks: list[subprocess.Popen[bytes]]) -> int:
    """Ends the others as the launcher does; the status of the failed rank, as a shell gives it."""
    for rank in ranks:
        rank.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
        rank.wait()
    return failed.returncode if failed.returncode > 0 else 128 - failed.returncode


if __name__ == "__main__":
    sys.exit(main())

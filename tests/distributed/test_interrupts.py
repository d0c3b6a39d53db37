"""Ctrl-C while tests run: the ranks, launchers and whatever they have started end with the test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import LIMIT_SECONDS, Process

TESTS = Path(__file__).resolve().parents[1]

# Test modules as people write them; they note the ids of their processes as files of that name.
RANKS = """
import os, pathlib, subprocess, time
from harness import run_distributed

def hang(folder):
    sleeper = subprocess.Popen(["sleep", "3600"])
    for number in (os.getpid(), sleeper.pid):
        (pathlib.Path(folder) / str(number)).touch()
    time.sleep(3600)

def test_ranks():
    run_distributed(hang, 2, {folder!r}, with_mesh=False)
"""

# The launcher puts its rank into a session of its own: what ends the one does not reach the other.
LAUNCHER = """
import pathlib, sys
import processes

RANK = "import os, pathlib, time; (pathlib.Path({folder!r}) / str(os.getpid())).touch(); time.sleep(3600)"
LAUNCHER = (
    "import subprocess, sys;"
    "subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True).wait()"
)

def test_launcher():
    processes.run([sys.executable, "-c", LAUNCHER, RANK])
"""


@pytest.mark.parametrize(
    ("text", "number", "options"),
    [
        pytest.param(RANKS, 4, [], marks=pytest.mark.exhaustive, id="ranks"),
        pytest.param(RANKS, 4, ["-n", "1"], id="ranks of a worker"),
        pytest.param(LAUNCHER, 1, [], id="launcher"),
    ],
)
def test_ctrl_c_leaves_no_process(tmp_path: Path, text: str, number: int, options: list[str]) -> None:
    folder = tmp_path / "started"
    folder.mkdir()
    (tmp_path / "test_hanging.py").write_text(text.format(folder=str(folder)))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", *options]
    # Its modules are found as this suite finds them.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    with Process(
        [*command, tmp_path], environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path
    ) as tests:
        deadline = time.monotonic() + LIMIT_SECONDS
        while len(list(folder.iterdir())) < number:
            assert tests.poll() is None and time.monotonic() < deadline, tests.communicate()[0]
            time.sleep(0.05)
        # As the terminal does: to all processes in its foreground.
        os.killpg(tests.pid, signal.SIGINT)
        output, _ = tests.communicate(timeout=LIMIT_SECONDS)
        for path in folder.iterdir():
            with pytest.raises(ProcessLookupError):
                os.kill(int(path.name), 0)
        # The server of which ranks are forked ends by itself once the test is gone.
        while left := tests.left():
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
    assert "KeyboardInterrupt" in output, output

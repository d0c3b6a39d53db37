"""Ctrl-C while tests run: the ranks, launchers and whatever they have started end with the test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import LIMIT_SECONDS, Process

TESTS = Path(__file__).resolve().parents[1]

END_SECONDS = 180
"""From Ctrl-C to the end of all output: pytest reads its sources to tell where it was, which takes seconds."""

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

# Interrupted while the server imports, by what passes over that, as some libraries do.
IMPORTS = """
import pathlib
import harness
from harness import run_distributed

(pathlib.Path(__file__).parent / "long_import.py").write_text(
    "import os, pathlib, time\\n"
    "(pathlib.Path({folder!r}) / str(os.getpid())).touch()\\n"
    "while True:\\n"
    "    try: time.sleep(3600)\\n"
    "    except BaseException: pass\\n"
)
harness.PRELOADED = "long_import"

def test_ranks():
    run_distributed(print, 2, with_mesh=False)
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


def is_running(number: int) -> bool:
    """What has ended may wait for the first process of the machine to take note of it."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


BACKGROUND = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
"""Before a command: it starts with Ctrl-C ignored, as shells without job control start what ends in `&`."""


@pytest.mark.parametrize(
    ("text", "number", "options", "shell"),
    [
        pytest.param(RANKS, 4, [], [], marks=pytest.mark.exhaustive, id="ranks"),
        pytest.param(RANKS, 4, ["-n", "1"], [], id="ranks of a worker"),
        # With the settings of this suite, which are otherwise not those of a module elsewhere.
        pytest.param(RANKS, 4, ["-p", "conftest"], BACKGROUND, id="ranks in the background"),
        pytest.param(IMPORTS, 1, [], [], id="server that imports"),
        pytest.param(LAUNCHER, 1, [], [], id="launcher"),
    ],
)
def test_ctrl_c_leaves_no_process(tmp_path: Path, text: str, number: int, options: list[str], shell: list[str]) -> None:
    folder = tmp_path / "started"
    folder.mkdir()
    (tmp_path / "test_hanging.py").write_text(text.format(folder=str(folder)))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", *options]
    # Its modules are found as this suite finds them.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent, tmp_path)))}
    with Process(
        [*shell, *command, tmp_path], environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path
    ) as tests:
        deadline = time.monotonic() + LIMIT_SECONDS
        while len(list(folder.iterdir())) < number:
            assert tests.poll() is None and time.monotonic() < deadline, tests.communicate()[0]
            time.sleep(0.05)
        # As the terminal does: to all processes in its foreground.
        os.killpg(tests.pid, signal.SIGINT)
        output, _ = tests.communicate(timeout=END_SECONDS)
        assert not [path.name for path in folder.iterdir() if is_running(int(path.name))]
        # The server of which ranks are forked ends by itself once the test is gone.
        while left := tests.left():
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
    assert "KeyboardInterrupt" in output, output

"""A program that is forked without its imports is like one that is started."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import runs

TELL = """
import json, os, sys
import psutil
me = psutil.Process()
print(json.dumps({
    "words": sys.argv, "shown words": [word for word in me.cmdline() if word], "path": sys.path[0], "name": __name__,
    "folder": os.getcwd(), "leads a session": os.getsid(0) == os.getpid(), "parent": os.getppid(),
    "given": os.environ["COLUMNS"], "shown": me.environ()["COLUMNS"],
    "variables": sorted(name for name in os.environ if not name.startswith("STARTED_BY_TEST_")),
}))
print("error", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""

WAIT = """
import os, subprocess, sys, time
print(subprocess.Popen(["sleep", "3600"], start_new_session=True).pid, flush=True)
while True:
    time.sleep(0.01)
"""


def told(words: list[str], *, fresh: bool) -> tuple[Any, list[str]]:
    process = runs.start(words, {"COLUMNS": "77"}, fresh=fresh)
    assert isinstance(process, runs.forked.Process) != fresh
    output = runs.finish(process, expect=3).stdout.splitlines()
    (facts,) = [line for line in output if line.startswith("{")]
    return json.loads(facts), [line for line in output if line != facts]


def test_it_has_what_a_started_one_has(tmp_path: Path) -> None:
    (tmp_path / "tell.py").write_text(TELL)
    words = [sys.executable, str(tmp_path / "tell.py"), "3", "two words", "--local_rank=0"]
    one, other = (told(words, fresh=fresh) for fresh in (False, True))
    for facts, _ in (one, other):
        # Python sets it when it starts in the C locale.
        facts["variables"] = [name for name in facts["variables"] if name != "LC_CTYPE"]
    assert one == other and one[1] == ["error"]
    assert one[0]["given"] == one[0]["shown"] == "77" and one[0]["shown words"] == words


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_end_it_as_a_started_one_and_what_it_has_started_is_known(
    tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "wait.py").write_text(WAIT)
    with runs.start([sys.executable, str(tmp_path / "wait.py")]) as process:
        assert isinstance(process, runs.forked.Process)
        sleeper = int(process.stdout.readline())
        assert {process.pid, sleeper} == {each.pid for each in process.left()}
        process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            # The sleeper holds the pipe.
            process.communicate(timeout=0.5)
        process.wait(timeout=runs.LIMIT_SECONDS)
        assert process.returncode == -number
    # It may go between two looks.
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(sleeper).status() == psutil.STATUS_ZOMBIE

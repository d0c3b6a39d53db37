"""A locale that is not UTF-8: what a console cannot show is replaced, and files are UTF-8 all the same."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).resolve().parents[2]
# By hand, as systems without a Latin-1 locale have the C locale, without Python's own remedy.
C_LOCALE = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
COMMANDS = {
    "pretrain": ["launch/pretrain.py", "--config", "configs/gpt2-124m.yaml", "--dry-run"],
    "plan": ["tools/plan.py", "--config", "configs/gpt2-124m.yaml", "--chip", "h100", "--count", "8"],
}


@pytest.mark.parametrize("variables", [C_LOCALE, {"PYTHONIOENCODING": "latin-1"}])
@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_console_cannot_show_is_replaced(name: str, variables: dict[str, str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = processes.run([sys.executable, *COMMANDS[name], "run.folder=" + "r\u00fc\u2581n"], env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_tool_bears_names_that_the_locale_has_not(tmp_path: Path) -> None:
    (tmp_path / "r\u00fc\u2581n").mkdir()
    command = [sys.executable, "tools/inspect_checkpoint.py", str(tmp_path / "r\u00fc\u2581n")]
    done = processes.run(command, env={**os.environ, "PYTHONPATH": str(ROOT), **C_LOCALE}, cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "error: " in done.stderr, done.stderr


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_a_number_of_ranks_below_one_is_refused(number: str) -> None:
    for words in (["launch/pretrain.py", "--dry-run", "--world-size"], ["tools/plan.py", "--chip", "h100", "--count"]):
        done = processes.run([sys.executable, *words, number], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT)
        assert done.returncode == 2 and number in done.stderr and "Traceback" not in done.stderr, done.stderr

"""The scripts in tools/, called in this process: importing torch and DeepSpeed anew would take longer than most do."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from pathlib import Path
from unittest import mock

TOOLS = Path(__file__).resolve().parents[1] / "tools"


def call(tool: str, *words: str | Path) -> tuple[int, str]:
    """Exit status and output of a tool, run in this process."""
    output, status = io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [f"{tool}.py", *map(str, words)]),
        mock.patch.dict("os.environ", {"COLUMNS": "200"}),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            runpy.run_path(str(TOOLS / f"{tool}.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return status, output.getvalue()

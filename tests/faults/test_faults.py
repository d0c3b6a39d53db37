"""A short selection of injected faults: none diverges silently, hangs, ends in a traceback or loses a committed step.

The driver also shows that it finds a run that trains on wrong weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import processes

DRIVER = Path(__file__).with_name("drive.py")


def test_selected_faults(tmp_path: Path) -> None:
    done = processes.run([sys.executable, DRIVER, "--selection", "--folder", tmp_path])
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "without checksums: silent" in done.stdout
    assert not list(tmp_path.iterdir())

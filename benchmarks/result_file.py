"""One JSON per benchmark run, in benchmarks/results: hardware, versions, command, numbers."""

from __future__ import annotations

import datetime
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from megasparse.utils.files import write_at_once
from megasparse.utils.hardware import describe_hardware, package_versions

RESULTS = Path(__file__).resolve().parent / "results"


def write_result(benchmark: str, numbers: dict[str, Any], *, suffix: str, folder: Path = RESULTS) -> Path:
    """Write the numbers of a run under a name of benchmark, suffix, hardware and date; returns the file."""
    hardware = _hardware()
    result = {
        "benchmark": benchmark,
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/{benchmark}.py {' '.join(sys.argv[1:])}".strip(),
        "hardware": hardware,
        "load_average_before": round(os.getloadavg()[0], 2),
        "versions": package_versions(),
        **numbers,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = result_path(benchmark, suffix, folder)
    write_at_once(path, json.dumps(result, indent=2) + "\n")
    return path


def result_path(benchmark: str, suffix: str, folder: Path = RESULTS) -> Path:
    """Where a run of today writes its numbers."""
    short = re.sub(r"[^a-z0-9]+", "-", _hardware().split(",")[0].lower()).strip("-")
    return folder / f"{benchmark}_{suffix}_{short}_{datetime.date.today().isoformat()}.json"


def _hardware() -> str:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return describe_hardware(device, int(os.environ.get("WORLD_SIZE", "1")))

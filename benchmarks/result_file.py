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

from megasparse.utils.hardware import describe_hardware, package_versions

RESULTS = Path(__file__).resolve().parent / "results"


def write_result(benchmark: str, numbers: dict[str, Any], *, suffix: str, folder: Path = RESULTS) -> Path:
    """Write the numbers of a run under a name of benchmark, suffix, hardware and date; returns the file."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    date = datetime.date.today().isoformat()
    hardware = describe_hardware(device, 1)
    result = {
        "benchmark": benchmark,
        "date": date,
        "command": f"python benchmarks/{benchmark}.py {' '.join(sys.argv[1:])}".strip(),
        "hardware": hardware,
        "load_average_before": round(os.getloadavg()[0], 2),
        "versions": package_versions(),
        **numbers,
    }
    short = re.sub(r"[^a-z0-9]+", "-", hardware.split(",")[0].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}_{suffix}_{short}_{date}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path

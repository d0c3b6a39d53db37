"""Reads back what Weights & Biases wrote without a server, and what MLflow holds."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK_BYTES, HEADER_BYTES, RECORD_HEADER_BYTES = 2**15, 7, 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: LevelDB's log format after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), HEADER_BYTES, b""
    while position + RECORD_HEADER_BYTES <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < RECORD_HEADER_BYTES:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + RECORD_HEADER_BYTES])
        start = position + RECORD_HEADER_BYTES
        parts += data[start : start + length]
        position = start + length
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def wandb_runs(folder: Path) -> list[dict[str, Any]]:
    """Identifier, names, parameters, exit status and curve [(step, values)] of each file, in the order of writing."""
    paths = list((folder / "wandb").glob("offline-run-*/*.wandb"))
    return sorted((_wandb_run(path) for path in paths), key=lambda run: run["started"])


def _wandb_run(path: Path) -> dict[str, Any]:
    """W&B's own process writes the file, and ends it a moment after the run has finished."""
    deadline = time.monotonic() + 30
    while (found := _read_wandb_run(path))["exit"] is None:
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.1)
    return found


def _read_wandb_run(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"curve": [], "parameters": {}, "exit": None}
    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            found |= {"id": run.run_id, "name": run.display_name, "project": run.project, "group": run.run_group}
            found["started"] = run.start_time.ToNanoseconds()
        if kind == "config":
            found["parameters"] |= {item.key: json.loads(item.value_json) for item in record.config.update}
        if kind == "history":
            values = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            found["curve"].append((values["_step"], {k: v for k, v in values.items() if not k.startswith("_")}))
        if kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


def mlflow_runs(folder: Path, place: str | None = None) -> list[dict[str, Any]]:
    """The runs that are not deleted: identifier, names, status, parameters, tags and values by metric and step."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=place or f"sqlite:///{folder.absolute() / 'mlflow.db'}")
    runs = []
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
            runs.append(
                {
                    "id": run.info.run_id,
                    "name": run.info.run_name,
                    "project": experiment.name,
                    "status": run.info.status,
                    "parameters": run.data.params,
                    "tags": run.data.tags,
                    "values": {name: [(m.step, m.value) for m in metrics] for name, metrics in history.items()},
                }
            )
    return runs

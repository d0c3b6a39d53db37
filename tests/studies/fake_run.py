"""Looks like launch/pretrain.py from outside and trains nothing: `python fake_run.py CONFIG SECONDS_A_STEP`.

A step is a line of metrics; it goes on after the last one, stops at SIGTERM after a step, and fails with seed 13.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import yaml


def main(config_file: str, seconds: str) -> int:
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    config = yaml.safe_load(Path(config_file).read_text(encoding="utf-8"))
    run, steps = config["run"], config["train"]["steps"]
    folder = Path(run["folder"]) / run["name"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "starts.txt").open("a", encoding="utf-8") as starts:
        starts.write("start\n")
    if run["seed"] == 13:
        print("error: train.steps: 13 brings bad luck; must be another number", file=sys.stderr)
        return 2
    metrics = folder / "metrics.jsonl"
    step = len(metrics.read_text(encoding="utf-8").splitlines()) if metrics.exists() else 0
    while step < steps and not stop:
        time.sleep(float(seconds))
        step += 1
        line = record(step, config)
        with metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    summary = {**record(step, config), "finished": step == steps, "hardware": "a machine", "versions": {}}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return 0


def record(step: int, config: dict) -> dict:
    """A loss that depends on rate, width and seed, so that it can be told what was compared with what."""
    rate, width, seed = config["optimizer"]["lr"], config["model"]["hidden_size"], config["run"]["seed"]
    loss = 2.0 + abs(rate - 2e-3) * 100 + 10.0 / width + 0.01 * seed + 1.0 / step if step else None
    costs = {"tokens": 64 * step, "flops_algorithmic": 1e6 * step, "flops_dense": 1e6 * step, "seconds": 0.5 * step}
    task = {"task_accuracy": 1.0 / width + 0.001 * seed} if config.get("task", {}).get("path") else {}
    return {"step": step, "steps": step, "loss": loss, "val_loss": loss, **task, **costs}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Seconds and FLOPs to the same validation loss: dense training, MST, and MST on dense products.

    sh launch/quickstart.sh --dry-run                # prepares the data
    python benchmarks/time_to_loss.py [--config configs/quickstart.yaml] [--processes 2] [words for all runs ...]

Whole runs through the entry script, one after the other, on real text. The target is the highest of the runs' final
validation losses, so that all of them reach it; seconds are those of the training steps, as the ledger counts them, and
what lies between two validations is read off the straight line between them. `mst-dense-products` is the same MST run
with `kernels.block_sparse=dense`: what the kernels alone bring, and whether they change the curve.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from result_file import write_result

ROOT = Path(__file__).resolve().parents[1]
RUNS = {
    "dense": ["sparsity.algorithm=dense"],
    "mst": ["sparsity.algorithm=mst"],
    "mst-dense-products": ["sparsity.algorithm=mst", "kernels.block_sparse=dense"],
}
COSTS = ("step", "seconds", "flops_algorithmic", "flops_executed")


def main() -> None:
    arguments, words = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        curves = {name: train(arguments, name, [*RUNS[name], *words], Path(folder)) for name in arguments.runs}
    finals = {name: validated(curve)[-1]["val_loss"] for name, curve in curves.items()}
    target = max(finals.values())
    result = {
        "config": arguments.config,
        "words": words,
        "processes": arguments.processes,
        "target_loss": target,
        "runs": {
            name: {
                "final_loss": finals[name],
                "to_target": cost_of(validated(curve), target),
                "total_seconds": curve[-1]["seconds"],
                "seconds_per_step_by_phase": seconds_by_phase(curve),
                "curve": [[line["step"], line["val_loss"], line["seconds"]] for line in validated(curve)],
            }
            for name, curve in curves.items()
        },
    }
    if {"mst", "mst-dense-products"} <= set(curves):
        pairs = zip(curves["mst"], curves["mst-dense-products"], strict=True)
        result["largest_loss_difference"] = max(abs(ours["loss"] - other["loss"]) for ours, other in pairs)
    print(json.dumps({**result, "runs": {n: {**r, "curve": "..."} for n, r in result["runs"].items()}}, indent=2))
    print(write_result("time_to_loss", result, suffix=Path(arguments.config).stem).name)


def train(arguments: argparse.Namespace, name: str, words: list[str], folder: Path) -> list[dict]:
    """One whole run; its metrics, a record per step."""
    run = folder / name
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.processes}"]
    settings = [f"run.name={name}", f"run.folder={folder}", "train.resume=never", "train.trackers=[]"]
    command = [sys.executable, *launcher, "launch/pretrain.py", "--config", arguments.config, *settings, *words]
    environment = {**os.environ, "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
    environment.setdefault("OMP_NUM_THREADS", "1")
    print(f"{name}: {' '.join(words)}", flush=True)
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=arguments.timeout)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def validated(curve: list[dict]) -> list[dict]:
    return [line for line in curve if "val_loss" in line]


def cost_of(lines: list[dict], target: float) -> dict[str, float]:
    """What the run had cost when its validation loss first fell to the target."""
    for before, after in zip([None, *lines], lines, strict=False):
        if after["val_loss"] <= target:
            if before is None:
                return {cost: after[cost] for cost in COSTS}
            share = (before["val_loss"] - target) / (before["val_loss"] - after["val_loss"])
            return {cost: before[cost] + share * (after[cost] - before[cost]) for cost in COSTS}
    raise AssertionError("every run reaches the highest of the final losses")


def seconds_by_phase(curve: list[dict]) -> dict[str, float]:
    """Mean seconds of a step; a line of metrics stands for the steps since the one before it."""
    seconds: dict[str, float] = {}
    steps: dict[str, int] = {}
    for before, line in zip([{"seconds": 0.0, "step": 0}, *curve], curve, strict=False):
        phase = line["phase"]
        seconds[phase] = seconds.get(phase, 0.0) + line["seconds"] - before["seconds"]
        steps[phase] = steps.get(phase, 0) + line["step"] - before["step"]
    return {phase: seconds[phase] / steps[phase] for phase in seconds}


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--runs", nargs="+", choices=tuple(RUNS), default=list(RUNS))
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that a run may take (default: 3600)")
    arguments, words = parser.parse_known_args()
    options = [word for word in words if word.startswith("--") or "=" not in word]
    if options:
        parser.error(f"unknown: {' '.join(options)}")
    return arguments, words


if __name__ == "__main__":
    main()

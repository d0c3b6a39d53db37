"""Predicted against measured: step time and memory of real training steps on this machine, dense and ultra-sparse.

    python benchmarks/plan_against_run.py --model quickstart

The prediction is that of `tools/plan.py --chip here`: rates measured in some seconds, then the forecast. It is made
first; the runs, two processes by torchrun, follow and take no part in it. Memory is what the process grows by at its
peak from before the engine is built: tensors, which the prediction counts, and whatever libraries take besides.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_setup import MODELS, benchmark_config, open_trainer
from result_file import RESULTS, write_result

from megasparse.config.schema import RunConfig
from megasparse.launching import LaunchEnvironment, keep_host_memory, open_mesh
from megasparse.planning.assumptions import parse_assumptions
from megasparse.planning.cluster import make_cluster
from megasparse.planning.forecast import forecast
from megasparse.planning.probe import here_chip, measure

UPDATE_INTERVAL = 10
KINDS: dict[str, list[str]] = {
    "dense": ["sparsity.algorithm=dense"],
    "ultra_sparse": [
        "sparsity.algorithm=set",
        "sparsity.growth=mixed",
        "sparsity.density=0.1",
        "sparsity.block_size=32",
        f"sparsity.update_interval={UPDATE_INTERVAL}",
        "attention.stride=32",
    ],
}
LIMIT_SECONDS = 200


def main() -> None:
    arguments = parse_arguments()
    os.environ["DS_ACCELERATOR"] = "cpu"
    keep_host_memory(os.environ)
    if arguments.output is not None:
        run(arguments)
        return
    predictions = {kind: predict(arguments, kind) for kind in KINDS}
    rows = [compare(kind, predictions[kind], run_ranks(arguments, kind)) for kind in KINDS]
    ratio = {
        side: rows[0][f"{side}_step_seconds"] / rows[1][f"{side}_step_seconds"] for side in ("predicted", "measured")
    }
    numbers = {
        "model": arguments.model,
        "ranks": arguments.ranks,
        "precision": "fp32",
        "steps": arguments.steps,
        "results": rows,
        "dense_over_sparse_step": ratio,
        "rates": {kind: prediction["measured"] for kind, prediction in predictions.items()},
    }
    path = write_result("plan_against_run", numbers, suffix=f"{arguments.model}-fp32", folder=arguments.results)
    report(rows, ratio)
    print(path.name)


def make_config(arguments: argparse.Namespace, kind: str) -> RunConfig:
    return benchmark_config(
        arguments.model,
        *KINDS[kind],
        "train.precision=fp32",
        "train.steps=100000",
        "train.global_batch_size=8",
        "train.micro_batch_size=4",
        "deepspeed.zero_stage=1",
    )


def predict(arguments: argparse.Namespace, kind: str) -> dict[str, Any]:
    """The forecast of the only phase of a configuration."""
    config = make_config(arguments, kind)
    found = measure(config, arguments.ranks)
    cluster = make_cluster(here_chip(found), arguments.ranks)
    result = forecast(config, cluster, parse_assumptions([]), make_rates=found.rates, measured=found.facts())
    assert result["layout"]["is_given"] and len(result["phases"]) == 1
    return result


def run_ranks(arguments: argparse.Namespace, kind: str) -> dict[str, Any]:
    """What rank 0 of a real run measured; fresh processes for each kind, so that peaks of memory are their own."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rank0.json"
        words = ["--model", arguments.model, "--steps", str(arguments.steps), "--kind", kind, "--output", str(output)]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        subprocess.run(
            [*launcher, "--nproc-per-node", str(arguments.ranks), str(Path(__file__).resolve()), *words],
            check=True,
            timeout=LIMIT_SECONDS,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )
        return json.loads(output.read_text(encoding="utf-8"))


def run(arguments: argparse.Namespace) -> None:
    """On each rank: train, and write what rank 0 measured."""
    with open_mesh(LaunchEnvironment.from_variables(os.environ), LIMIT_SECONDS) as mesh:
        before = peak_bytes()
        with open_trainer(make_config(arguments, arguments.kind), mesh) as (trainer, loader):
            found = measure_steps(trainer, loader, arguments.steps)
        found["memory"] = peak_bytes() - before
        if mesh.rank == 0:
            arguments.output.write_text(json.dumps(found), encoding="utf-8")


def measure_steps(trainer, loader, steps: int) -> dict[str, Any]:
    ordinary, topology = [], []
    parts_before: dict[str, float] = {}
    for number in range(steps + UPDATE_INTERVAL):
        if number == UPDATE_INTERVAL:  # those before warm up
            parts_before = trainer.state.ledger.by_part()
            ordinary, topology = [], []
        started = time.perf_counter()
        result = trainer.train_step(loader)
        # The device may still be at it.
        trainer.state.ledger.seconds.settle()
        (topology if result.records else ordinary).append(time.perf_counter() - started)
    parts = trainer.state.ledger.by_part()
    return {
        "ordinary": statistics.median(ordinary),
        "all_ordinary": ordinary,
        "topology_extra": statistics.median(topology) - statistics.median(ordinary) if topology else 0.0,
        "parts": {name: (value - parts_before[name]) / steps for name, value in parts.items()},
    }


def compare(kind: str, predicted: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    phase = predicted["phases"][0]
    parts = phase["step_seconds_by_part"]
    sending = ("optimizer", "data_parallel")
    return {
        "phase": kind,
        "predicted_step_seconds": phase["step_seconds"],
        "measured_step_seconds": measured["ordinary"],
        "predicted_over_measured": phase["step_seconds"] / measured["ordinary"],
        "measured_steps": measured["all_ordinary"],
        "predicted_topology_extra_seconds": phase["topology_step_extra_seconds"],
        "measured_topology_extra_seconds": measured["topology_extra"],
        "predicted_forward_backward": sum(value for name, value in parts.items() if name not in sending),
        "measured_forward_backward": measured["parts"]["forward"] + measured["parts"]["backward"],
        "predicted_optimizer_and_sending": sum(parts[name] for name in sending),
        "measured_optimizer_and_sending": measured["parts"]["optimizer"],
        "predicted_parts": parts,
        "measured_parts": measured["parts"],
        "predicted_memory_bytes": predicted["memory"]["total"],
        "measured_memory_growth_bytes": measured["memory"],
    }


def report(rows: list[dict[str, Any]], ratio: dict[str, float]) -> None:
    for row in rows:
        print(
            f"{row['phase']:13s} step: predicted {row['predicted_step_seconds']:.3f} s, "
            f"measured {row['measured_step_seconds']:.3f} s ({row['predicted_over_measured']:.2f})"
        )
        print(
            f"              topology update: +{row['predicted_topology_extra_seconds']:.3f}, "
            f"measured +{row['measured_topology_extra_seconds']:.3f} s"
        )
        print(
            f"              memory: {row['predicted_memory_bytes'] / 1e6:.0f} MB, "
            f"grown by {row['measured_memory_growth_bytes'] / 1e6:.0f} MB"
        )
        print(f"              predicted { {name: round(value, 4) for name, value in row['predicted_parts'].items()} }")
        print(f"              measured  { {name: round(value, 4) for name, value in row['measured_parts'].items()} }")
    print(f"dense over sparse step: predicted {ratio['predicted']:.2f}, measured {ratio['measured']:.2f}")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="quickstart")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each kind (default: 20)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    # Of a rank.
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()

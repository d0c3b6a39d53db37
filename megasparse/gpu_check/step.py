"""Section `step`: training steps at the widths of two models with few layers, dense and ultra-sparse.

Wall time against the summed time of the kernels, launches and synchronisations counted by torch's profiler, and peak
memory against what `tools/plan.py` expects. Each case has a process of its own: memory is then its own.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megasparse.config.loader import load_config
from megasparse.config.schema import RunConfig
from megasparse.gpu_check.context import Context
from megasparse.gpu_check.processes import DONE, require, run_limited
from megasparse.launching import LaunchEnvironment, open_mesh

WARM_STEPS, TIMED_STEPS, PROFILED_STEPS = 3, 5, 2
WIDTHS = {
    "gpt2-xl": [
        "model.hidden_size=1600",
        "model.num_attention_heads=25",
        "model.num_layers=4",
        "model.seq_length=1024",
        "sparsity.block_size=64",
        "train.micro_batch_size=8",
        "train.global_batch_size=16",
    ],
    "llama-7b": [
        "model.hidden_size=4096",
        "model.num_attention_heads=32",
        "model.ffn_hidden_size=11008",
        "model.activation=swiglu",
        "model.normalization=rmsnorm",
        "model.position_embedding=rope",
        "model.num_layers=2",
        "model.seq_length=4096",
        "sparsity.block_size=128",
        "train.micro_batch_size=2",
        "train.global_batch_size=4",
    ],
    "tiny": [
        "model.hidden_size=32",
        "model.num_attention_heads=2",
        "model.num_layers=1",
        "model.seq_length=16",
        "sparsity.block_size=16",
        "train.micro_batch_size=2",
        "train.global_batch_size=4",
    ],
}
KINDS = {
    "dense": ["sparsity.algorithm=dense"],
    "ultra-sparse": ["sparsity.algorithm=rigl", "sparsity.density=0.1", "sparsity.update_interval=1000000"],
}
LONGEST, NAME = 12, 80
"""Kernels that are told, and characters of their names."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "hipLaunchKernel", "hipModuleLaunchKernel")


@dataclass(frozen=True)
class StepCase:
    model: str
    kind: str

    @property
    def settings(self) -> dict[str, Any]:
        return {"model": self.model, "kind": self.kind}


def run(context: Context) -> None:
    require("deepspeed")
    models = ("tiny",) if context.rehearse else ("gpt2-xl", "llama-7b")
    kinds = ("ultra-sparse",) if context.rehearse else ("ultra-sparse", "dense")
    cases = [StepCase(model, kind) for model in models for kind in kinds]
    with tempfile.TemporaryDirectory() as name:
        for case in context.in_time(cases, "step"):
            file, log = Path(name) / f"{case.model}-{case.kind}.json", Path(name) / "log.txt"
            # One that hangs leaves time for others.
            outcome = run_limited(partial(measure, case, context.rehearse, file), 0.6 * context.left, log)
            if outcome.state == DONE:
                found = json.loads(file.read_text(encoding="utf-8"))
                context.row("step", case.settings, found["numbers"])
                for each in found["kernels"]:
                    kernel = {"kernel": each.pop("kernel")}
                    context.row("kernel", case.settings, each, facts=kernel)
            else:
                print(*outcome.last_lines, sep="\n")
                context.row("step", case.settings, note=" | ".join(outcome.last_lines[-3:])[-300:])


def make_config(case: StepCase, rehearse: bool) -> RunConfig:
    precision = "fp32" if rehearse else "bf16"
    common = ["model.vocab_size=50257", "model.bias=false", "train.trackers=[]", "train.steps=2000000"]
    if rehearse:
        common[0] = "model.vocab_size=64"
    rest = [f"train.precision={precision}", "deepspeed.zero_stage=1"]
    return load_config([], [*common, *WIDTHS[case.model], *KINDS[case.kind], *rest])


def measure(case: StepCase, rehearse: bool, file: Path) -> None:
    """In a process of its own: train, and write the numbers."""
    from megasparse.gpu_check.random_run import open_trainer

    os.environ["DS_ACCELERATOR"] = "cpu" if rehearse else "cuda"
    config = make_config(case, rehearse)
    with open_mesh(LaunchEnvironment.from_variables(os.environ), timeout_seconds=120) as mesh:
        with open_trainer(config, mesh) as (trainer, loader):
            _steps(trainer, loader, 1 if rehearse else WARM_STEPS)
            seconds = _steps(trainer, loader, 1 if rehearse else TIMED_STEPS)
            numbers = {"wall_seconds": statistics.median(seconds)}
            profiled, kernels = _profiled(trainer, loader, rehearse)
    numbers |= {**profiled, "peak_bytes": _peak_bytes(rehearse), "planned_bytes": planned_bytes(config)}
    file.write_text(json.dumps({"numbers": numbers, "kernels": kernels}), encoding="utf-8")


def planned_bytes(config: RunConfig) -> int:
    """What `tools/plan.py` expects of a rank alone."""
    from megasparse.cost.resources import memory_per_rank
    from megasparse.planning.workload import Shards

    return memory_per_rank(config, Shards.of(config).model(config), 1)["total"]


def _steps(trainer: Any, loader: Any, count: int) -> list[float]:
    """Seconds of each step; it ends with loss and norm on the host, so the device is done too."""
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        trainer.train_step(loader)
        seconds.append(time.perf_counter() - started)
    return seconds


def _profiled(trainer: Any, loader: Any, rehearse: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Of one step, by the profiler: seconds of all kernels, numbers of launches and of waits for the device; and the
    kernels that take longest."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    count = 1 if rehearse else PROFILED_STEPS
    activities = [ProfilerActivity.CPU] if rehearse else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as found:
        _steps(trainer, loader, count)
    events = found.key_averages()
    # Operations of the host carry the times of their kernels too, and annotations span many kernels.
    wanted = DeviceType.CPU if rehearse else DeviceType.CUDA
    own = [e for e in events if e.device_type == wanted and not getattr(e, "is_user_annotation", False)]
    kernels = [(_seconds(event, rehearse) / count, event.count / count, event.key) for event in own]
    numbers = {
        "kernel_seconds": sum(seconds for seconds, *_ in kernels),
        "launches": _calls(events, LAUNCHES) / count,
        "synchronisations": _calls(events, WAITS) / count,
    }
    longest = sorted(kernels, reverse=True)[:LONGEST]
    return numbers, [{"kernel": key[:NAME], "seconds": seconds, "calls": calls} for seconds, calls, key in longest]


def _seconds(event: Any, rehearse: bool) -> float:
    """Of the event itself; in a rehearsal those of the host."""
    return (event.self_cpu_time_total if rehearse else event.self_device_time_total) / 1e6


def _calls(events: Iterable[Any], names: tuple[str, ...]) -> float:
    """Calls of functions with these beginnings; asynchronous copies wait for nothing."""
    return float(sum(e.count for e in events if e.key.startswith(names) and not e.key.endswith("Async")))


def _peak_bytes(rehearse: bool) -> float:
    if rehearse:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    return float(torch.cuda.max_memory_allocated())

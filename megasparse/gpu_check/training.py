"""Section `training`: whole training runs of a tiny model on the GPUs against the same runs on the CPU.

At ZeRO 0 to 3, dense to sparse and back, and sparse from the start; every run is also saved in its midst and continued
from the files, to equal bits. With several GPUs as many ranks take part as divide the batch.

How far a loss may be from that of the CPU: float32 sums in another order, 1e-5 relative while no topology has changed;
afterwards two scores that tie but for rounding may be chosen differently, so 5e-4. bfloat16 2e-3. Measured on a CPU,
two ranks against one: 7e-7 and 4e-4. What faults would do there, in both dtypes: an input gradient that is zero 1e-2 to
2e-2, one that is 10 % short 1e-3 to 3e-3, a block row that a weight gradient lacks 5e-3 to 9e-3.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from megasparse.config.loader import load_config
from megasparse.config.schema import RunConfig
from megasparse.gpu_check.context import Context
from megasparse.gpu_check.numerics import LAST_WORDS
from megasparse.gpu_check.processes import end, last_lines, require, start, write_stacks
from megasparse.launching import LaunchEnvironment, open_mesh
from megasparse.parallel import Mesh

BATCH, STEPS, STOP, INTERVAL = 8, 16, 8, 3
MODEL = [
    "run.name=check",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.seq_length=32",
    "model.vocab_size=64",
    # The gradient of key biases is zero but for rounding, which Adam would blow up to full steps.
    "model.bias=false",
    "optimizer.epsilon=1e-6",
    "optimizer.lr=0.003",
    "attention.stride=8",
    "sparsity.block_size=16",
    "sparsity.density=0.3",
    f"sparsity.update_interval={INTERVAL}",
    "sparsity.warmup_end=0.3",
    "sparsity.restoration_start=0.5",
    "sparsity.restoration_end=0.75",
    f"train.steps={STEPS}",
    f"train.global_batch_size={BATCH}",
    "train.trackers=[]",
]
STARTS = {"dense": [], "sparse": ["sparsity.points=[[0,0.3],[0.5,0.3],[0.75,1]]"]}
TIGHT = 1e-5
TOLERANCES = {"fp32": 5e-4, "bf16": 2e-3}
"""Absolute, of losses of about 4."""
PAUSE = 0.05


@dataclass(frozen=True)
class Job:
    """A run, and its twin that is continued from a checkpoint."""

    precision: str
    stage: int
    start: str

    @property
    def reference(self) -> Job:
        """The run on the CPU that it must agree with: the stage changes nothing that is computed."""
        return Job(self.precision, 1, self.start)

    def __str__(self) -> str:
        return f"{self.precision}-{self.stage}-{self.start}"

    @property
    def settings(self) -> dict[str, Any]:
        return {"precision": self.precision, "zero_stage": self.stage, "start": self.start}


def jobs(rehearse: bool) -> list[Job]:
    if rehearse:
        return [Job("bf16", 3, "sparse")]
    exact = [Job("fp32", stage, kind) for stage in (1, 3, 2, 0) for kind in STARTS]
    # A run that is sparse from the start to its midst depends most on the kernels.
    return [Job("fp32", 1, "dense"), *(Job("bf16", stage, "sparse") for stage in (1, 2, 3)), *exact[1:]]


def run(context: Context) -> None:
    require("deepspeed")
    if context.rehearse:
        # Imported before the fork: twice would take longer than the runs. Neither touches a GPU here.
        for module in ("megasparse.gpu_check.random_run", "torch._dynamo"):
            importlib.import_module(module)
    todo = jobs(context.rehearse)
    with tempfile.TemporaryDirectory() as name:
        folder, ranks = Path(name), 1 if context.rehearse else _ranks()
        processes = _start(context.device, todo, folder, ranks)
        told = 0
        try:
            # Where one fails, the others would wait for it.
            while any(process.is_alive() for process in processes) and not any(p.exitcode for p in processes):
                if context.left < 0.05 * context.seconds:
                    write_stacks(processes)
                    break
                time.sleep(PAUSE)
                told = _tell(context, todo, folder, told, ranks)
            told = _tell(context, todo, folder, told, ranks)
        finally:
            for process in processes:
                end(process)
        if told < len(todo):
            _explain(folder, len(processes))
            raise RuntimeError(f"{len(todo) - told} of {len(todo)} runs have failed or not ended in time")


def _start(device: str, todo: Sequence[Job], folder: Path, ranks: int) -> list[BaseProcess]:
    """The ranks on the device with all runs, and a process on the CPU with those that they are compared with."""
    references = list(dict.fromkeys(job.reference for job in todo))
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    reference = partial(train_all, references, False, folder / "cpu")
    processes = [start(reference, folder / "0.txt", DS_ACCELERATOR="cpu")]
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": device, **world}
        work = partial(train_all, todo, True, folder / "device")
        processes.append(start(work, folder / f"{rank + 1}.txt", **place))
    return processes


def train_all(todo: Sequence[Job], resumes: bool, folder: Path) -> None:
    """On each rank: one run after another; rank 0 writes a file with what came out of each."""
    if os.environ["DS_ACCELERATOR"] == "cpu":
        torch.set_num_threads(1)
    environment = LaunchEnvironment.from_variables(os.environ)
    folder.mkdir(exist_ok=True)
    with open_mesh(environment, timeout_seconds=120) as mesh:
        for job in todo:
            try:
                found = train(job, mesh, folder / f"saved-{job}" if resumes else None)
            except Exception as error:
                # The other runs say more than none.
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"[:LAST_WORDS]}
            if mesh.rank == 0:
                part = _file(folder, job).with_suffix(".part")
                part.write_text(json.dumps(found), encoding="utf-8")
                part.rename(_file(folder, job))


def make_config(job: Job, ranks: int) -> RunConfig:
    settings = [
        f"deepspeed.zero_stage={job.stage}",
        f"train.precision={job.precision}",
        f"train.micro_batch_size={BATCH // ranks}",
    ]
    if job.stage == 3:
        # Models this small would otherwise stay whole on every rank.
        settings.append("deepspeed.extra.zero_optimization.stage3_param_persistence_threshold=0")
    kernel = "triton" if os.environ["DS_ACCELERATOR"] == "cuda" else "reference"
    settings.append(f"kernels.block_sparse={kernel}")
    return load_config([], [*MODEL, *settings, *STARTS[job.start]])


def train(job: Job, mesh: Mesh, folder: Path | None) -> dict[str, Any]:
    """Losses of all steps, and whether the run that goes on from `folder` ends with the same bits."""
    from megasparse.gpu_check.random_run import open_trainer
    from megasparse.training.checkpoints import Checkpointer

    config = make_config(job, mesh.world_size)
    with open_trainer(config, mesh) as (trainer, loader):
        losses = _losses(trainer, loader, STOP)
        if folder is not None:
            checkpointer = Checkpointer(folder, config, mesh, trainer.engine, trainer.methods)
            if mesh.rank == 0:
                folder.mkdir()
            mesh.barrier()
            checkpointer.save(trainer.state)
            checkpointer.finish()
        losses += _losses(trainer, loader, STEPS - STOP)
        ending = _digest(trainer)
    if folder is None:
        return {"losses": losses}
    with open_trainer(config, mesh, folder) as (trainer, loader):
        again = _losses(trainer, loader, STEPS - STOP)
        return {"losses": losses, "resumed": again == losses[STOP:] and _digest(trainer) == ending}


def _losses(trainer: Any, loader: Any, steps: int) -> list[float]:
    """Mean losses of the next steps over all ranks."""
    found, ranks = [], trainer.mesh.data_parallel
    for _ in range(steps):
        before = trainer.state.window.loss
        trainer.train_step(loader)
        mine = torch.tensor(trainer.state.window.loss - before, dtype=torch.float64, device=trainer.mesh.device)
        found.append(float(ranks.sum_(mine)) / ranks.size)
    return found


def _digest(trainer: Any) -> str:
    """Of this rank's master weights and moments."""
    state = hashlib.sha256()
    for name, fragment in sorted(trainer.engine.state.fragments().items()):
        state.update(name.encode())
        for tensor in (fragment.master, fragment.moments["exp_avg"], fragment.moments["exp_avg_sq"]):
            state.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()


def _tell(context: Context, todo: Sequence[Job], folder: Path, told: int, ranks: int) -> int:
    """Rows of the runs that have come out since; how many are told now, in their order."""
    while told < len(todo):
        job = todo[told]
        ours, theirs = _file(folder / "device", job), _file(folder / "cpu", job.reference)
        if not (ours.exists() and theirs.exists()):
            break
        found, expected = (json.loads(path.read_text(encoding="utf-8")) for path in (ours, theirs))
        told += 1
        settings = {**job.settings, "ranks": ranks}
        if error := found.get("error", expected.get("error")):
            context.row("losses", settings, right=False, note=error)
            continue
        differences = [abs(a - b) for a, b in zip(found["losses"], expected["losses"], strict=True)]
        tolerance = TOLERANCES[job.precision]
        first = max(differences[: INTERVAL - 1])
        # One by one: a maximum may pass over NaN.
        right = all(difference <= tolerance for difference in differences)
        right = right and (job.precision != "fp32" or first <= TIGHT * expected["losses"][0])
        numbers = {"largest_difference": max(differences), "first_difference": first, "tolerance": tolerance}
        context.row("losses", settings, numbers, right=right)
        context.row("resumed", settings, {"steps": STEPS - STOP}, right=found["resumed"])
    return told


def _file(folder: Path, job: Job) -> Path:
    return folder / f"{job}.json"


def _explain(folder: Path, count: int) -> None:
    """Print how the processes ended."""
    for number in range(count):
        print(f"process {number}:", *last_lines(folder / f"{number}.txt"), sep="\n")


def _ranks() -> int:
    """As many GPUs as divide the batch. Counted by the driver's list: to ask CUDA would forbid the fork."""
    visible = torch.cuda._device_count_nvml() if hasattr(torch.cuda, "_device_count_nvml") else -1
    return next(count for count in (8, 4, 2, 1) if count <= max(visible, 1))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]

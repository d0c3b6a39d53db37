"""What a rank of a large world does: calls, bytes, connections, files, by phase of a run and by number of ranks.

    python benchmarks/thousand_ranks.py [--worlds 64 1024 16384] [--tensor-parallel 1 8] [--zero-stages 1 3]

For the first and a middle rank of each world one process goes through a whole small run with the product's own code:
it starts, makes ordinary steps and one that updates the topology, saves, and resumes. The other ranks are made up
(``fake_ranks``), and so are their parts of the checkpoint. Sums over ranks that are not there leave out what those
hold, so that counts that must add up do not: the processes run without assertions (-O). Counted, not timed: the
machine and its load do not matter.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from math import log
from pathlib import Path
from typing import Any
from unittest.mock import patch

from result_file import RESULTS, write_result

from megasparse.parallel.tree import GROUP_RANKS

PHASES = ("start", "step", "update", "save", "resume")
KINDS = (
    "collectives",
    "bytes",
    "groups",
    "calls_for_groups",
    "store_operations",
    "files_looked_at",
    "files_opened",
    "files_changed",
)
STEPS, UPDATE_INTERVAL = 6, 3
NAMES = {1: "step", UPDATE_INTERVAL: "update"}
"""Steps, by number from 0, that are counted: not the first one, which sets DeepSpeed up."""
MODEL = [
    *("model.num_layers=2", "model.hidden_size=128", "model.num_attention_heads=8", "model.seq_length=16"),
    *("model.vocab_size=256", "model.bias=false", "sparsity.algorithm=mst", "sparsity.warmup_end=0"),
    *("sparsity.block_size=16", f"sparsity.update_interval={UPDATE_INTERVAL}", "train.precision=fp32"),
    *("train.micro_batch_size=1", "train.steps=1000", f"train.stop_after={STEPS}", f"train.save_interval={STEPS}"),
    # A shard of a rank that hears nothing of the others may lose all of its blocks.
    "sparsity.lr_density_power=0",
    *("train.valid_interval=0", "train.valid_samples=1", "kernels.tune=never", "train.trackers=[]", "run.name=counted"),
]
MIDDLE = 5
"""Ranks after the middle of the world: one that is first of no group."""


def main() -> None:
    arguments = parse_arguments()
    if __debug__:
        sys.exit(subprocess.call([sys.executable, "-O", *sys.argv]))
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    cases = [
        (world_size, rank, tensor_parallel, zero_stage, tuple(arguments.overrides))
        for world_size in arguments.worlds
        for tensor_parallel in arguments.tensor_parallel
        for zero_stage in arguments.zero_stages
        for rank in (0, world_size // 2 + MIDDLE)
    ]
    results = [] if arguments.known is None else json.loads(arguments.known.read_text(encoding="utf-8"))["results"]
    place = ("world_size", "rank", "tensor_parallel_size", "zero_stage")
    known = {tuple(result[key] for key in place) for result in results}
    cases = [case for case in cases if case[:4] not in known]
    # Imports take longer than a small world: they are made once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megasparse.training.run"])
    with ProcessPoolExecutor(arguments.jobs, context, max_tasks_per_child=1) as pool:
        for result in pool.map(simulate, *zip(*cases, strict=True)):
            results.append(result)
            print(shown(result), flush=True)
            if arguments.output_suffix:
                # Anew after each: large worlds take minutes.
                results.sort(key=lambda one: (one["world_size"], one["tensor_parallel_size"], one["zero_stage"]))
                numbers = {"growing": growths(results), "table": table(results), "results": results}
                write_result("thousand_ranks", numbers, suffix=arguments.output_suffix, folder=arguments.output_folder)
    for line in growths(results):
        print(f"grows: {line}")


def simulate(
    world_size: int, rank: int, tensor_parallel: int, zero_stage: int, overrides: Sequence[str]
) -> dict[str, Any]:
    """The counts of one rank, in a process that has counted no other."""
    from fake_ranks import DEVICE, HOST, Ledger, counted_world

    ledger = Ledger()
    with contextlib.ExitStack() as stack:
        # In memory, where there is such a folder: thousands of files are flushed one by one.
        memory = Path("/dev/shm")
        name = stack.enter_context(tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None))
        settings = [
            *MODEL,
            f"run.folder={name}/runs",
            f"data.train=[{{path: {write_tokens(Path(name))}, weight: 1}}]",
            f"train.global_batch_size={world_size // tensor_parallel}",
            f"parallel.tensor_parallel_size={tensor_parallel}",
            f"deepspeed.zero_stage={zero_stage}",
            *overrides,
        ]
        stack.enter_context(counted_world(ledger))
        ledger.folder = Path(name) / "runs"
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        heartbeats = run(ledger, world_size, rank, settings)
        return {
            "world_size": world_size,
            "rank": rank,
            "tensor_parallel_size": tensor_parallel,
            "zero_stage": zero_stage,
            "phases": {phase: {kind: ledger.counts[phase][kind] for kind in KINDS} for phase in PHASES},
            "connections": {"host": ledger.connections(HOST), "device": ledger.connections(DEVICE)},
            "heartbeats": heartbeats,
            "calls": {phase: dict(sorted(ledger.calls[phase].items())) for phase in PHASES},
        }


def run(ledger: Any, world_size: int, rank: int, overrides: list[str]) -> dict[str, float]:
    """A whole run of one rank, and another start from its checkpoint. Returns what its heartbeats take."""
    import torch
    from fake_ranks import DEVICE
    from made_up_parts import make_up_parts

    from megasparse.checkpoint.writing import commit
    from megasparse.config.loader import load_config
    from megasparse.launching import LaunchEnvironment, process_group, rendezvous
    from megasparse.launching.identity import agree, run_identity
    from megasparse.training import checkpoints
    from megasparse.training.preparation import prepare, take_folder
    from megasparse.training.run import Extensions, build
    from megasparse.training.signals import StopSignal

    environment = LaunchEnvironment(rank, rank % 8, world_size, "127.0.0.1", 29500)
    prepared = prepare(load_config([], overrides), world_size, "cpu")
    identity = run_identity(prepared.config, prepared.record, "cpu")
    store = counted_store(ledger, world_size, identity)
    with contextlib.ExitStack() as stack:
        if rank == 0:
            take_folder(prepared, stack, print)
        stack.enter_context(same_order())
        stack.enter_context(patch.object(rendezvous, "_meet_at", lambda *_: store))
        stack.enter_context(patch.object(process_group, "_device", lambda _: (torch.device("cpu"), DEVICE)))
        with ledger.within("start"):
            built = build(prepared, environment, Extensions(), stack, lambda store: agree(store, environment, identity))
        trainer = built.trainer
        checkpointer = trainer.callbacks[-1]._checkpointer
        join_parts = checkpoints.join_parts

        def join_all(*arguments: Any, **settings: Any) -> None:
            with ledger.uncounted():
                make_up_parts(trainer.engine, checkpointer.store.partial(STEPS), rank)
            join_parts(*arguments, **settings)

        stack.enter_context(patch.object(checkpoints, "join_parts", join_all))
        checkpointer.save = saving(ledger, checkpointer, rank)
        trainer.callbacks = [phases(ledger), *trainer.callbacks]
        with StopSignal() as stop:
            trainer.run(stop)
        if rank > 0:
            with ledger.uncounted():
                commit(checkpointer.store, checkpointer._index(trainer.state, [0.0]), world_size, 60)
        with ledger.within("resume"):
            again = checkpoints.Checkpointer(
                checkpointer.store.folder, prepared.config, built.mesh, trainer.engine, trainer.methods
            )
            told = again._numbers
            # What rank 0 has found, which the others are told.
            again._numbers = lambda _: told([STEPS])
            state = again.restore().state
        if state is None or state.step != STEPS:
            raise RuntimeError("the checkpoint was not found again")
        peers = sum(group.size - 1 for group in built.mesh.control.groups)
        return {"peers": peers, "interval_seconds": built.watchdog._heartbeats.interval}


def write_tokens(folder: Path) -> Path:
    """A small data set; returns its prefix."""
    from megasparse.data import IndexedDatasetWriter

    with IndexedDatasetWriter(folder / "tokens", "uint16") as writer:
        for first in range(64):
            writer.add_document([(first + number) % 256 for number in range(512)])
    return folder / "tokens"


def counted_store(ledger: Any, world_size: int, identity: dict[str, Any]) -> Any:
    import hashlib

    from fake_ranks import CountedStore

    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return CountedStore(ledger, world_size, {"identity/digest": digest})


@contextlib.contextmanager
def same_order() -> Iterator[None]:
    """DeepSpeed's stage 3 compares lists with those that rank 0 sends: they are this rank's own."""
    from deepspeed.runtime.zero import partitioned_param_coordinator, utils

    compare = partitioned_param_coordinator.assert_ints_same_as_other_ranks

    def compare_with_own(numbers: list[int]) -> None:
        with patch.object(utils.dist, "get_rank", lambda *_: 0):
            compare(numbers)

    with patch.object(partitioned_param_coordinator, "assert_ints_same_as_other_ranks", compare_with_own):
        yield


def phases(ledger: Any) -> Any:
    """The callback that says in which phase a run is."""
    from megasparse.methods.callback import Callback, Step

    class Phases(Callback):
        def begin_step(self, step: Step) -> None:
            ledger.phase = NAMES.get(step.index, "others")

        def after_step(self, step: Step) -> None:
            # Whatever follows in an ordinary step belongs to it; lines of metrics come every so many steps.
            ledger.phase = "save" if step.number == STEPS else ledger.phase

    return Phases()


def saving(ledger: Any, checkpointer: Any, rank: int) -> Any:
    """A save, which on other ranks than the first finds the folder that the first has made."""
    save = checkpointer.save

    def begin(state: Any) -> None:
        if rank > 0:
            with ledger.uncounted():
                checkpointer.store.partial(state.step).mkdir(parents=True)
        save(state)

    return begin


def shown(result: dict[str, Any]) -> str:
    """The counts of one rank, a line for each phase."""
    lines = [
        f"{result['world_size']} ranks, rank {result['rank']}, tensor parallel {result['tensor_parallel_size']}, ZeRO "
        f"{result['zero_stage']}: connections {result['connections']}, heartbeats {result['heartbeats']}"
    ]
    for phase, counts in result["phases"].items():
        lines.append(f"  {phase:8}" + ", ".join(f"{kind} {value:,}" for kind, value in counts.items() if value))
    return "\n".join(lines)


def values(result: dict[str, Any]) -> dict[str, float]:
    """All numbers of one rank by name."""
    found = {f"{phase}: {kind}": value for phase, counts in result["phases"].items() for kind, value in counts.items()}
    found |= {f"connections: {kind}": value for kind, value in result["connections"].items()}
    peers, interval = result["heartbeats"]["peers"], result["heartbeats"]["interval_seconds"]
    return found | {"heartbeats: peers": peers, "heartbeats: seconds between two": interval}


def rows(results: list[dict[str, Any]]) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    """Each number of a layout and of the first or a middle rank, by world size."""
    series: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        which = "first rank" if result["rank"] == 0 else "middle rank"
        layout = f"tensor parallel {result['tensor_parallel_size']}, ZeRO {result['zero_stage']}, {which}"
        for name, value in values(result).items():
            series.setdefault(f"{layout}, {name}", []).append((result["world_size"], value))
    yield from series.items()


def growths(results: list[dict[str, Any]]) -> list[str]:
    """The numbers that grow faster than the logarithm of the number of ranks, between the two largest worlds.

    In smaller ones groups of 32 are not yet full. A decision goes up a tree of such groups and down again: its hops,
    too, are a logarithm, that grows in steps. Rounding and alignment are worth a tenth. Bytes are those of a ring,
    whose share (n - 1) / n grows too, by less.
    """
    found = []
    for name, series in rows(results):
        if len(series) < 2:
            continue
        (small, first), (large, last) = series[-2:]
        if last > max(first, 1) * 1.1 * max(log(large) / log(small), hops(large) / hops(small)):
            found.append(f"{name}: {', '.join(f'{value:,.6g} at {size:,}' for size, value in series)}")
    return found


def hops(world_size: int) -> int:
    """Of a decision, in the tree of all ranks."""
    levels = 1
    while GROUP_RANKS**levels < world_size:
        levels += 1
    return 2 * levels - 1


def table(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Each number by world size."""
    return {name: {str(size): value for size, value in series} for name, series in rows(results)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[64, 1024, 16384])
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--zero-stages", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--jobs", type=int, default=1, help="processes at once (default: 1)")
    parser.add_argument("--overrides", nargs="*", default=[], help="of the configuration")
    parser.add_argument("--known", type=Path, help="file of results whose ranks need not be counted again")
    parser.add_argument("--output-suffix", default="", help="write a file into results with this in its name")
    parser.add_argument("--output-folder", type=Path, default=RESULTS, help="where that file goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()

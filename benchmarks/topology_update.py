"""Time and bytes of a topology update against parameters, layers and ranks.

    torchrun --standalone --nproc-per-node 2 benchmarks/topology_update.py [--block-sizes 32 1] [--zero-stage 3]
    [--rounds 5]

Measured on the ranks that it is started on: seconds of the decision, of the whole step and of ordinary steps around it
(medians), bytes that a rank sends, and the bound that the plan gives. For larger worlds, bytes by the plan's formula
and seconds from the measured ones (work by weights on a rank, bytes over a link of the given speed), marked
`extrapolated`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

from bench_setup import benchmark_config, open_trainer
from result_file import write_result

from megasparse.cost.resources import topology_bytes
from megasparse.launching import LaunchEnvironment, keep_host_memory, open_mesh
from megasparse.parallel import CommunicationGroup

UPDATE_INTERVAL = 3
# (layers, hidden size): parameters grow by depth and by width.
SIZES = ((2, 256), (8, 256), (2, 512), (4, 768))
LARGER_WORLDS = (8, 64, 512)


class CountingAxis(CommunicationGroup):
    """An axis that counts the bytes that ring algorithms would send."""

    def __init__(self, axis: CommunicationGroup, sent: list[float]) -> None:
        super().__init__(axis.rank, axis.size, axis.group)
        object.__setattr__(self, "sent", sent)

    def sum_(self, tensor):
        self.sent.append(2 * (1 - 1 / self.size) * tensor.numel() * tensor.element_size())
        return super().sum_(tensor)

    def gather(self, tensor):
        self.sent.append((self.size - 1) * tensor.numel() * tensor.element_size())
        return super().gather(tensor)


def main() -> None:
    arguments = parse_arguments()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    keep_host_memory(os.environ)
    with open_mesh(LaunchEnvironment.from_variables(os.environ), 600, arguments.tensor_parallel_size) as mesh:
        results = [
            measure(arguments, block_size, *size, mesh) for block_size in arguments.block_sizes for size in SIZES
        ]
        if mesh.is_first:
            report(arguments, results, mesh.world_size)
        mesh.barrier()


def report(arguments: argparse.Namespace, results: list[dict], world_size: int) -> None:
    for result in results:
        print(
            f"blocks of {result['block_size']}, {result['sparse_parameters'] / 1e6:.1f} M, {result['layers']} layers: "
            f"decision {result['decision_seconds']:.4f} s, {result['cost_in_ordinary_steps']:.3f} ordinary steps, sent "
            f"{result['bytes_sent'] / 1e6:.3f} MB ({result['bits_per_weight']:.2f} bits per weight)"
        )
    extrapolated = [extrapolate(result, ranks, arguments) for result in results for ranks in LARGER_WORLDS]
    suffix = f"ranks{world_size}-tp{arguments.tensor_parallel_size}-zero{arguments.zero_stage}"
    print(write_result("topology_update", {"results": results, "extrapolated": extrapolated}, suffix=suffix).name)


def measure(arguments: argparse.Namespace, block_size: int, num_layers: int, hidden_size: int, mesh) -> dict:
    config = benchmark_config(
        "quickstart",
        f"model.num_layers={num_layers}",
        f"model.hidden_size={hidden_size}",
        "sparsity.algorithm=mst",
        "sparsity.warmup_end=0.0",
        f"sparsity.block_size={block_size}",
        f"sparsity.update_interval={UPDATE_INTERVAL}",
        f"parallel.tensor_parallel_size={arguments.tensor_parallel_size}",
        f"deepspeed.zero_stage={arguments.zero_stage}",
        "train.precision=fp32",
        "train.micro_batch_size=4",
        f"train.global_batch_size={4 * mesh.data_parallel.size}",
        "train.steps=100000",
    )
    ordinary, changing, deciding, sent = [], [], [], []
    with open_trainer(config, mesh) as (trainer, loader):
        state, controller = trainer.engine.state, trainer.methods[0].controller
        for name in ("shard", "tensor_parallel", "whole"):
            setattr(state, name, CountingAxis(getattr(state, name), sent))
        controller.tensor_parallel = CountingAxis(controller.tensor_parallel, sent)
        for step in range((arguments.rounds + 1) * UPDATE_INTERVAL):
            sent.clear()
            started = time.perf_counter()
            result = trainer.train_step(loader)
            seconds = time.perf_counter() - started
            if step < UPDATE_INTERVAL:
                continue
            (changing if result.records else ordinary).append(seconds)
            if result.records:
                deciding.append(result.records["topology"][0]["seconds"])
                bytes_sent = sum(sent)
        topologies = list(controller.topologies.values())
        bound = sum(
            topology_bytes(t, mesh.data_parallel.size, mesh.tensor_parallel.size, arguments.zero_stage)
            for t in topologies
        )
    weights, usual = sum(t.numel for t in topologies), statistics.median(ordinary)
    return {
        "block_size": block_size,
        "ranks": mesh.world_size,
        "tensor_parallel_size": mesh.tensor_parallel.size,
        "zero_stage": arguments.zero_stage,
        "layers": len(topologies),
        "hidden_size": hidden_size,
        "sparse_parameters": weights,
        "ordinary_step_seconds": usual,
        "topology_step_seconds": statistics.median(changing),
        "decision_seconds": statistics.median(deciding),
        "cost_in_ordinary_steps": (statistics.median(changing) - usual) / usual,
        "share_of_time_at_interval_100": (statistics.median(changing) - usual) / (100 * usual),
        "bytes_sent": bytes_sent,
        "bytes_at_most": bound,
        "bits_per_weight": 8 * bytes_sent / weights,
        "bytes_allowed": weights / 8 + 500_000 * len(topologies),
    }


def extrapolate(result: dict, ranks: int, arguments: argparse.Namespace) -> dict:
    """The same model on more data-parallel ranks: less work for each, at most so many bytes."""
    ring = (1 - 1 / ranks) / max(1 - 1 / result["ranks"], 0.5)
    sent = result["bytes_at_most"] * ring
    seconds = result["decision_seconds"] * result["ranks"] / ranks + sent / (arguments.link_gigabytes_per_second * 1e9)
    return {
        "extrapolated": True,
        "block_size": result["block_size"],
        "ranks": ranks,
        "sparse_parameters": result["sparse_parameters"],
        "bytes_at_most": sent,
        "decision_seconds": seconds,
        "link_gigabytes_per_second": arguments.link_gigabytes_per_second,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--block-sizes", type=int, nargs="+", default=[32, 1], help="sides of the blocks (default: 32 1)"
    )
    parser.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=1)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="topology updates that are timed (default: 5)")
    parser.add_argument("--link-gigabytes-per-second", type=float, default=10.0, help="for the extrapolated seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()

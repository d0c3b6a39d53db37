"""How long a micro-batch keeps the host of a GPU busy: a model of 48 blocks, whose Triton kernels go to a driver that
launches nothing.

    python benchmarks/host_time.py [--blocks 48] [--rounds 15]

Needs no GPU. Widths are tiny, so that what torch's own operators compute on the CPU takes little of the time; they are
in the numbers, as their launches would be on a GPU. Dense and ultra-sparse models take turns. Seconds are those of the
thread, so that other work on the machine counts only by what it does to the caches. The head is left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from result_file import RESULTS, write_result
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from megasparse.config.loader import load_config
from megasparse.kernels.common import triton_device
from megasparse.models.build import build_model
from megasparse.models.gpt import GPT

WIDTHS = [
    *("model.hidden_size=64", "model.num_attention_heads=4", "model.seq_length=32", "model.vocab_size=64"),
    *("model.position_embedding=rope", "model.normalization=rmsnorm", "model.activation=swiglu", "model.bias=false"),
    *("attention.stride=8", "train.precision=fp32", "sparsity.block_size=16", "kernels.elementwise=torch"),
]
SAMPLES, DENSITY = 2, 0.25


class QuietDriver:
    """Stands in for a GPU's: kernels are compiled for it, and counted where it would launch them."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (name, name, 0, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 232448, "multiprocessor_count": 132},
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        name, launches = metadata.name, self.launches

        def launch(*_: Any) -> None:
            launches[name] += 1

        return launch


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    quiet = QuietDriver()
    driver.set_active(quiet)
    with ExitStack() as stack:
        # The kernels take tensors of the CPU for those of the GPU.
        for name in ("wrong_type", "unsuited_device"):
            stack.enter_context(mock.patch.object(triton_device, name, lambda *_: None))
        models = {"dense": make_model(arguments.blocks, "dense"), "ultra-sparse": make_model(arguments.blocks, "rigl")}
        seconds: dict[str, list[float]] = {kind: [] for kind in models}
        launches = {}
        for _ in range(arguments.rounds + 2):
            for kind, model in models.items():
                quiet.launches.clear()
                seconds[kind].append(micro_batch(model))
                launches[kind] = dict(quiet.launches)
    # The first rounds compile.
    medians = {kind: statistics.median(found[2:]) for kind, found in seconds.items()}
    for kind, median in medians.items():
        print(f"{kind}: {median * 1e3:.1f} ms a micro-batch, {sum(launches[kind].values())} launches of our kernels")
    numbers = {
        "medians": medians,
        "seconds": {kind: found[2:] for kind, found in seconds.items()},
        "launches": launches,
    }
    print(write_result("host_time", numbers, suffix=f"{arguments.blocks}-blocks", folder=arguments.output))


def make_model(blocks: int, algorithm: str) -> GPT:
    """With every layer and the pattern `sparse` on our Triton kernels where it is sparse."""
    sparse = ["kernels.block_sparse=triton", "kernels.hybrid_attention=triton"] if algorithm != "dense" else []
    words = [*WIDTHS, f"model.num_layers={blocks}", f"sparsity.algorithm={algorithm}", *sparse]
    config = load_config([], words)
    model = build_model(config, config.model.vocab_size or 0)
    generator = torch.Generator().manual_seed(1)
    for layer in model.sparse_layers().values():
        layer.mask.copy_(torch.rand(layer.mask.shape, generator=generator) < DENSITY)
        layer.mask[0, 0] = True
        layer.topology_changed()
    pattern = "full" if algorithm == "dense" else "sparse"
    model.set_attention_patterns([(pattern,) * config.model.num_attention_heads] * blocks)
    return model


def micro_batch(model: GPT) -> float:
    """Forward and backward pass of all blocks; seconds of the host."""
    tokens = torch.zeros(SAMPLES, model.config.seq_length, dtype=torch.int64)
    started = time.thread_time()
    hidden_BTC = model.hidden_states(tokens)
    hidden_BTC.sum().backward()
    return time.thread_time() - started


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Host time of a micro-batch with a driver that launches nothing.")
    parser.add_argument("--blocks", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""The rates of this machine's processor, measured in some seconds at the shapes of one model.

    found = measure(config, ranks=2)
    chip = here_chip(found)
    forecast(config, make_cluster(chip, 2), assumptions, make_rates=found.rates, measured=found.facts())

As many ranks as share the machine work at the same time, as threads of one process, so that they contend for memory as
real ranks do. The link between them is a TCP connection over the loopback device; gloo is not started.
"""

from __future__ import annotations

import os
import socket
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F

from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.config.stages import stages
from megasparse.cost.layer_kernels import DTYPES, LayerKernels
from megasparse.cost.resources import BYTES
from megasparse.kernels import block_sparse
from megasparse.kernels.block_sparse.measure import measure_row
from megasparse.kernels.common.medians import medians
from megasparse.kernels.hybrid_attention import executed_entries, hybrid_attention
from megasparse.planning.assumptions import Assumptions
from megasparse.planning.chips import HERE, Chip
from megasparse.planning.cluster import Cluster
from megasparse.planning.rates import Rates, Widths
from megasparse.planning.step_time import OPTIMIZER_BYTES, block_elements
from megasparse.planning.workload import Shards, dense_products
from megasparse.utils.activations import ACTIVATIONS
from megasparse.utils.hardware import hardware_name

ROUNDS = 3
MAX_FLOPS = 6e9
"""Of one measured pass; layers that need more are measured with fewer tokens."""
STREAMED = 2**21
"""Weights of the measured optimizer step."""


@dataclass(frozen=True)
class Probe:
    """What was measured as one of `ranks` ranks; `measured` has the efficiencies of no link and no kernel."""

    ranks: int
    threads: int
    precision: str
    measured: Rates
    link_bandwidth: float
    seconds: float

    def rates(self, cluster: Cluster, precision: str, assumptions: Assumptions) -> Rates:
        """For `forecast`. Assumptions replace what is measured where the user gave them."""
        assert precision == self.precision, f"measured in {self.precision}"
        given, measured = assumptions.given, self.measured
        return replace(
            measured,
            efficiency=assumptions["kernel_efficiency"],
            sparse_layer_seconds=given.get("sparse_layer_us", 0.0) * 1e-6,
            curves={} if "kernel_efficiency" in given else measured.curves,
            launch_seconds=given["launch_us"] * 1e-6 if "launch_us" in given else measured.launch_seconds,
            link_latency=given["link_latency_us"] * 1e-6 if "link_latency_us" in given else measured.link_latency,
            network_latency=assumptions["network_latency_us"] * 1e-6,
        )

    def facts(self) -> dict[str, Any]:
        """Plain numbers for tables and JSON."""
        rates = self.measured
        return {
            "hardware": hardware_name("cpu"),
            "date": time.strftime("%Y-%m-%d"),
            "ranks": self.ranks,
            "threads_per_rank": self.threads,
            "precision": self.precision,
            "dense_flops": {_name(widths): rate for widths, rate in rates.dense_by_widths.items()},
            "sparse_over_dense_time": {
                _name(widths): {f"{density:.4g}": value for density, value in curve.items()}
                for widths, curve in rates.curves.items()
            },
            "attention_flops": dict(rates.attention_by_pattern),
            "elementwise_bytes": rates.elementwise,
            "streaming_bytes": rates.streaming,
            "launch_seconds": rates.launch_seconds,
            "link_bytes": self.link_bandwidth,
            "link_latency_seconds": rates.link_latency,
            "seconds": self.seconds,
        }


def here_chip(probe: Probe) -> Chip:
    """This machine's processor, as one of `ranks` ranks has it. Its power is not known."""
    return Chip(
        name=HERE,
        title=f"{hardware_name('cpu')}, threads: {probe.threads}",
        peak=MappingProxyType({probe.precision: probe.measured.peak}),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / probe.ranks,
        memory_bandwidth=probe.measured.streaming,
        link_bandwidth=probe.link_bandwidth,
        network_bandwidth=probe.link_bandwidth,
        ranks_per_node=probe.ranks,
        watts=0.0,
        source="measured by megasparse/planning/probe.py",
        device="cpu",
    )


def measure(config: RunConfig, ranks: int) -> Probe:
    """Measure what `config` needs, as one of `ranks` ranks on this machine.

    Raises ConfigError for float16, and for many more ranks than cores.
    """
    precision, cores = config.train.precision, os.cpu_count() or 1
    if not 1 <= ranks <= 4 * cores:
        raise ConfigError(f"--count: {ranks} is out of range with --chip here; must be 1 to {4 * cores}")
    if precision == "fp16":
        raise ConfigError("train.precision: fp16 needs a GPU; with --chip here it must be fp32, bf16")
    started = time.perf_counter()
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or max(cores // ranks, 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        return _measure(config, ranks, threads, started)
    finally:
        torch.set_num_threads(before)


def _measure(config: RunConfig, ranks: int, threads: int, started: float) -> Probe:
    dtype, crew = DTYPES[config.train.precision], _Crew(ranks, threads)
    dense, curves = _layers(config, dtype, crew)
    attention = _attention(config, dtype, crew)
    bandwidth, latency = _loopback()
    measured = Rates(
        peak=max(dense.values()),
        dense=min(dense.values()),
        attention=min(attention.values()),
        efficiency=1.0,
        streaming=_streaming(crew),
        elementwise=_elementwise(config, dtype, crew),
        launch_seconds=_launch(crew),
        launches_hidden=False,
        link_efficiency=1.0,
        link_latency=latency,
        network_latency=latency,
        dense_by_widths=dense,
        attention_by_pattern=attention,
        curves=curves,
    )
    return Probe(ranks, threads, config.train.precision, measured, bandwidth, time.perf_counter() - started)


class _Crew:
    """Runs one piece of work on as many threads at once as there are ranks."""

    def __init__(self, ranks: int, threads: int) -> None:
        self._ranks, self._threads = ranks, threads

    def median(self, make: Callable[[], Callable[[], None]]) -> float:
        """Median seconds of what `make` makes for each rank, while all of them work."""
        return statistics.median(self.each(lambda: medians([make()], "cpu", ROUNDS)[0].device))

    def each(self, work: Callable[[], Any]) -> list[Any]:
        barrier = threading.Barrier(self._ranks)

        def run(_: int) -> Any:
            torch.set_num_threads(self._threads)
            barrier.wait(timeout=60)
            return work()

        with ThreadPoolExecutor(self._ranks) as pool:
            return list(pool.map(run, range(self._ranks)))


def _layers(config: RunConfig, dtype: torch.dtype, crew: _Crew) -> tuple[dict, dict]:
    """Dense FLOPs a second, and time over dense time by density, of every kind of layer."""
    shards = Shards.of(config)
    model = shards.model(config)
    sparse = set(LayerKernels(config, model, "cpu", planned=True).shapes.values())
    others = {product.shape for product in dense_products(config, model)}
    dense: dict[Widths, float] = {}
    curves: dict[Widths, dict[float, float]] = {}
    for shape in sorted(sparse | others, key=lambda shape: shape.widths):
        first, second = shape.widths
        tokens = max(min(shape.tokens, int(MAX_FLOPS / (6 * first * second))), 64)
        backend, _ = block_sparse.explain("cpu", dtype, shape.block_size)
        if backend is None or shape not in sparse:
            seconds = crew.median(partial(_linear_pass, shape.widths, tokens, dtype))
        else:
            case = partial(measure_row, backend, "cpu", dtype, block=shape.block_size, tokens=tokens)
            rows = crew.each(partial(case, widths=shape.widths, rounds=ROUNDS))
            seconds = statistics.median(row.dense_seconds for row in rows)
            curves[shape.widths] = {
                float(density): statistics.median(row.seconds[density] / row.dense_seconds for row in rows)
                for density in rows[0].seconds
            }
        dense[shape.widths] = 6 * tokens * first * second / seconds
    return dense, curves


def _linear_pass(widths: Widths, tokens: int, dtype: torch.dtype) -> Callable[[], None]:
    x = torch.randn(tokens, widths[0]).to(dtype).requires_grad_()
    weight = torch.randn(widths[1], widths[0]).to(dtype).requires_grad_()
    dy = torch.randn(tokens, widths[1]).to(dtype)
    return lambda: torch.autograd.grad(F.linear(x, weight), [x, weight], dy)


def _attention(config: RunConfig, dtype: torch.dtype, crew: _Crew) -> dict[str, float]:
    """FLOPs a second, a backward pass counted as twice the forward one."""
    model, ranks = config.model, config.parallel.tensor_parallel_size
    heads, groups = model.num_attention_heads // ranks, max(model.key_value_heads // ranks, 1)
    group = heads // groups
    shards = Shards.of(config)
    patterns = {stretch.pattern for stage in stages(config) for stretch in shards.stretches(stage)}
    patterns |= {override.pattern for override in config.attention.overrides} | {"full"}
    kernel = config.kernels.hybrid_attention
    rates: dict[str, float] = {}
    for pattern in sorted(patterns):
        entries = executed_entries(kernel, pattern, model.seq_length, config.attention.stride)
        forward = 4 * entries * model.head_dim
        # Whole groups of query heads, one at the least.
        fitting = max(min(heads, int(MAX_FLOPS / (3 * forward)) // group * group), group)

        def make(pattern: str = pattern, heads: int = fitting) -> Callable[[], None]:
            shape = (1, heads, model.seq_length, model.head_dim)
            q = torch.randn(shape).to(dtype).requires_grad_()
            kept = heads * groups * ranks // model.num_attention_heads
            k, v = (torch.randn(1, kept, *shape[2:]).to(dtype).requires_grad_() for _ in range(2))
            dy = torch.randn(shape).to(dtype)
            attend = partial(hybrid_attention, q, k, v, pattern, config.attention.stride, kernel)
            return lambda: torch.autograd.grad(attend(), [q, k, v], dy)

        rates[pattern] = 3 * forward * fitting / crew.median(make)
    return rates


def _elementwise(config: RunConfig, dtype: torch.dtype, crew: _Crew) -> float:
    """Bytes a second of what a block does besides products and attention, forward and backward."""
    model, ranks = config.model, config.parallel.tensor_parallel_size
    tokens = min(config.train.micro_batch_size * model.seq_length, 2**23 // model.mlp_width)
    activation = ACTIVATIONS[model.activation]

    def make() -> Callable[[], None]:
        x = torch.randn(tokens, model.hidden_size).to(dtype).requires_grad_()
        wide = torch.randn(tokens, model.mlp_width // ranks).to(dtype).requires_grad_()
        scale = torch.ones(model.hidden_size, dtype=dtype, requires_grad=True)

        def run() -> None:
            normed = F.layer_norm(x, scale.shape, scale)
            again = F.layer_norm(x + normed, scale.shape, scale)
            inside = activation.function(wide) * wide if activation.gated else activation.function(wide)
            outputs = [x + again, inside]
            torch.autograd.grad(outputs, [x, wide, scale], [output.detach() for output in outputs])

        return run

    return 3 * block_elements(config) * tokens * BYTES[config.train.precision] / crew.median(make)


def _streaming(crew: _Crew) -> float:
    """Bytes a second of an AdamW step, by its count in `step_time`."""

    def make() -> Callable[[], None]:
        weight, gradient, first, second = (torch.rand(STREAMED) for _ in range(4))

        def run() -> None:
            norm = gradient.norm()
            gradient.mul_(1.0 / max(float(norm), 1.0))
            first.lerp_(gradient, 0.1)
            second.mul_(0.95).addcmul_(gradient, gradient, value=0.05)
            weight.mul_(0.9999).addcdiv_(first, second.sqrt().add_(1e-8), value=-1e-3)

        return run

    return STREAMED * OPTIMIZER_BYTES / crew.median(make)


def _launch(crew: _Crew, operations: int = 200) -> float:
    """Seconds of an operation on almost nothing, forward and backward counted as two."""

    def make() -> Callable[[], None]:
        x = torch.ones(8, requires_grad=True)

        def run() -> None:
            y = x
            for _ in range(operations):
                y = y + 1.0
            torch.autograd.grad(y.sum(), [x])

        return run

    return crew.median(make) / (2 * operations)


def _loopback(size: int = 2**24, rounds: int = 20) -> tuple[float, float]:
    """(bytes a second, seconds of latency) of a TCP connection of this machine with itself."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as near, server.accept()[0] as far:
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                end.settimeout(20)
            echo = threading.Thread(target=_answer, args=(far, size, rounds))
            echo.start()
            started = time.perf_counter()
            for _ in range(rounds):
                near.sendall(b"x")
                near.recv(1)
            latency = (time.perf_counter() - started) / (2 * rounds)
            started = time.perf_counter()
            near.sendall(bytes(size))
            near.recv(1)
            elapsed = time.perf_counter() - started
            echo.join(timeout=20)
    return size / elapsed, latency


def _answer(far: socket.socket, size: int, rounds: int) -> None:
    for _ in range(rounds):
        far.sendall(far.recv(1))
    received, buffer = 0, bytearray(2**20)
    while received < size:
        received += far.recv_into(buffer)
    far.sendall(b"x")


def _name(widths: Widths) -> str:
    return f"{widths[0]}x{widths[1]}"

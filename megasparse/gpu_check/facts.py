"""Section `facts`: what the machine is, and the ceilings that no kernel on it can pass.

Copy bandwidth is bytes read plus bytes written; that of the L2 cache is bytes read, again and again, of a buffer that
fits into it. cuBLAS runs at the shapes of the layers in bfloat16, the three products of each.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megasparse.gpu_check.context import Context, value_of
from megasparse.kernels.block_sparse.measure import LAYERS
from megasparse.kernels.block_sparse.tiles import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from megasparse.utils.hardware import package_versions

PACKAGES = ("megasparse", "torch", "triton", "deepspeed", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
WIDTHS = {"gpt2-xl": LAYERS["gpt2-xl"], "llama-7b": LAYERS["llama-7b"]}
TOKENS = (4096, 16384)
COPIED = 2**31
"""Bytes: far more than any cache."""
CACHED, READS = 2**23, 64
"""Bytes of the buffer in the L2 cache, and how often each program reads a block of it."""

Layer = tuple[str, tuple[int, int], int]
"""Model, (in, out), tokens."""


def run(context: Context) -> None:
    _machine(context)
    _copy(context)
    _launch(context)
    _cache(context)
    _cublas(context)


def layers(rehearse: bool) -> list[Layer]:
    """The layers whose products are timed, here and in `products`."""
    if rehearse:
        return [("tiny", (32, 48), 16)]
    return [(model, widths, tokens) for tokens in TOKENS for model in WIDTHS for widths in WIDTHS[model]]


def dense_rate(context: Context, layer: Layer, product_name: str) -> float | None:
    """FLOP/s of cuBLAS for a product, as this section has measured it earlier; None where it has not."""
    for row in context.earlier.get("facts", ()):
        if row["name"] == "cublas" and row["case"] == _case(layer, product_name):
            return value_of(row["numbers"]["flops_per_second"])
    return None


def ceiling(context: Context, name: str) -> float | None:
    """Bytes a second of the row `copy` or `l2`, from earlier; None where it is not there."""
    rows = (row for row in context.earlier.get("facts", ()) if row["name"] == name)
    return next((value_of(row["numbers"]["bytes_per_second"]) for row in rows), None)


def dense_products(x: Tensor, weight: Tensor, dy: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The three products of a dense layer, by name."""
    return {
        FORWARD: lambda: x @ weight.t(),
        INPUT_GRADIENT: lambda: dy @ weight,
        WEIGHT_GRADIENT: lambda: dy.t() @ x,
    }


def operands(context: Context, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and dy of a layer in bfloat16 (in a rehearsal float32)."""
    _, (inner, outer), tokens = layer
    dtype = torch.float32 if context.rehearse else torch.bfloat16
    shapes = (tokens, inner), (outer, inner), (tokens, outer)
    x, weight, dy = (torch.randn(shape, device=context.device).to(dtype) for shape in shapes)
    return x, weight, dy


def _case(layer: Layer, product_name: str) -> dict[str, Any]:
    model, widths, tokens = layer
    return {"model": model, "in": widths[0], "out": widths[1], "tokens": tokens, "product": product_name}


def _machine(context: Context) -> None:
    context.row("versions", facts=package_versions(PACKAGES))
    context.row("host", facts={"machine": platform.platform()})
    if context.rehearse:
        return
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        capability = f"{found.major}.{found.minor}"
        sizes = {"memory_bytes": found.total_memory, "processors": found.multi_processor_count}
        # Named otherwise, or missing, in some versions of torch.
        sizes["l2_bytes"] = getattr(found, "L2_cache_size", None)
        facts = {"name": found.name, "capability": capability, "cuda": str(torch.version.cuda or torch.version.hip)}
        context.row("gpu", {"number": number}, sizes, facts=facts | {"driver": _driver(number)})


def _driver(number: int) -> str:
    command = ["nvidia-smi", f"--id={number}", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not told ({error})"
    return done.stdout.strip() or "not told"


def _copy(context: Context) -> None:
    size = 2**16 if context.rehearse else COPIED
    source = torch.empty(size, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    seconds = context.clock.times(lambda: target.copy_(source)).device
    context.row("copy", {"bytes": size}, {"bytes_per_second": 2 * size / seconds})


def _launch(context: Context) -> None:
    """What one launch costs the host: an operation of torch, and a Triton kernel."""
    from megasparse.gpu_check.read_kernel import BLOCK, read_repeatedly

    small = torch.zeros(BLOCK, device=context.device)
    context.row("launch", {"of": "torch"}, {"host_seconds": context.clock.times(lambda: small.add_(1.0)).host})
    numbers = {"host_seconds": context.clock.times(lambda: read_repeatedly(small, small, 1, 1)).host}
    context.row("launch", {"of": "triton"}, numbers)


def _cublas(context: Context) -> None:
    for layer in context.in_time(layers(context.rehearse), "cublas"):
        inner, outer = layer[1]
        for name, run in dense_products(*operands(context, layer)).items():
            times = context.clock.times(run)
            numbers = {"flops_per_second": 2 * layer[2] * inner * outer / times.device, "seconds": times.device}
            context.row("cublas", _case(layer, name), numbers)


def _cache(context: Context) -> None:
    from megasparse.gpu_check.read_kernel import BLOCK, read_repeatedly

    size, reads = (BLOCK * 4, 2) if context.rehearse else (CACHED // 4, READS)
    source = torch.ones(size, device=context.device)
    programs = 2 if context.rehearse else 8 * torch.cuda.get_device_properties(0).multi_processor_count
    sums = torch.empty(programs * BLOCK, device=context.device)
    read_repeatedly(source, sums, programs, reads)
    assert bool((sums == reads).all()), "the kernel has not read what it should"
    seconds = context.clock.times(lambda: read_repeatedly(source, sums, programs, reads)).device
    context.row("l2", {"bytes": 4 * size}, {"bytes_per_second": 4 * programs * BLOCK * reads / seconds})

"""Measures the tiles of the Triton kernels for a layer, on the device at hand, and keeps the fastest ones.

    tune_layer("cuda", torch.bfloat16, block_size=64, tokens=4096, widths=(2048, 8192), density=0.1)

A set of tiles takes minutes, most of them in Triton's compiler; its results are kept too (``tile_cache``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megasparse.kernels.block_sparse import gpu, tile_cache
from megasparse.kernels.block_sparse.measure import random_layer
from megasparse.kernels.block_sparse.tiles import (
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Tile,
    candidates,
    fits,
    fitted,
)

Measure = Callable[[Callable[[], Any]], float]
"""Time of one call of a function, in any unit."""


def tune_layer(
    device: str,
    dtype: torch.dtype,
    block_size: int,
    tokens: int,
    widths: tuple[int, int],
    density: float,
    *,
    measure: Measure | None = None,
    limit: int = 0,
) -> dict[str, tuple[Tile, float]]:
    """Measure tiles for a layer with random active blocks and keep the fastest for later runs.

    Args:
        device, dtype, unit, tokens, density: what to tune for.
        widths: (in, out) of the layer, multiples of `block_size`.
        measure: None: Triton's benchmark, median in milliseconds.
        limit: measure only so many tiles for each product; 0: all candidates.

    Returns:
        The fastest tile and its time for each of the three products.

    Raises:
        ValueError: the kernels cannot run there.
    """
    reason = gpu.why_not(device, dtype, block_size)
    if reason is not None:
        raise ValueError(f"block_sparse kernel: 'triton' cannot be tuned here: {reason}")
    in_features, out_features = widths
    x, dy = (torch.randn(tokens, width, device=device, dtype=dtype) for width in widths)
    dense_weight = torch.randn(out_features, in_features, device=device, dtype=dtype)
    weight, index = random_layer(dense_weight, block_size, density, torch.Generator().manual_seed(0))
    num_rows, num_columns = index.mask.shape
    products: dict[str, tuple[int, Callable[[Tile], Tensor]]] = {
        FORWARD: (num_rows, lambda tile: gpu.forward(x, weight, None, index, tile)),
        INPUT_GRADIENT: (num_columns, lambda tile: gpu.input_gradient(dy, weight, index, tile)),
        WEIGHT_GRADIENT: (num_rows, lambda tile: gpu.weight_gradient(dy, x, index, tile)),
    }
    return {
        kernel: tune(gpu.problem(kernel, x, block_size, groups, index.num_active), run, measure or _benchmark, limit)
        for kernel, (groups, run) in products.items()
    }


def tune(
    problem: tile_cache.Problem, run: Callable[[Tile], Any], measure: Measure, limit: int = 0
) -> tuple[Tile, float]:
    """Measure the candidates, keep the fastest in the file, and return it with its time. `run` runs the kernel."""
    times: dict[Tile, float] = {}
    for candidate in candidates(problem.kernel, problem.block_size, problem.dtype, torch.version.hip is not None):
        tile = fitted(candidate, problem.kernel, problem.block_size, problem.tokens, problem.active_per_group)
        assert fits(tile, problem.kernel, problem.block_size), tile
        if tile in times or (limit and len(times) >= limit):
            continue
        try:
            times[tile] = measure(partial(run, tile))
        except Exception as error:
            if not _is_refusal(error):
                raise
    assert times, f"no candidate runs for {problem.key}"
    best = min(times, key=times.__getitem__)
    tile_cache.store({problem.key: best})
    return best, times[best]


def _is_refusal(error: Exception) -> bool:
    """Triton's compiler refuses a tile that needs more shared memory or registers than the device has."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"OutOfResources", "CompilationError", "PTXASError"})


def _benchmark(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return do_bench(run, return_mode="median")

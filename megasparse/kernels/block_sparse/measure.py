"""Measures one sparse layer against dense products, in turns (``common.medians``).

row = measure_row("cpu", "cpu", torch.float32, block=64, tokens=2048, widths=(768, 3072))

``round_seconds`` tells beforehand, from one pass of each with few tokens, about how long one of its rounds takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megasparse.kernels.block_sparse import sparse_linear
from megasparse.kernels.block_sparse.break_even import Row
from megasparse.kernels.block_sparse.index import BlockIndex, build_index
from megasparse.kernels.block_sparse.storage import apply_mask_
from megasparse.kernels.common.medians import medians, on_host, training_pass
from megasparse.utils.dtypes import dtype_name

DENSITIES = (0.1, 0.4, 0.7, 1.0)
"""Times grow linearly with the density, but for caches: a coarse grid with straight lines between serves."""

LAYERS = {
    "quickstart": ((256, 768), (256, 256), (256, 1024), (1024, 256)),
    "gpt2-small": ((768, 2304), (768, 768), (768, 3072), (3072, 768)),
    "gpt2-medium": ((1024, 3072), (1024, 1024), (1024, 4096), (4096, 1024)),
    "gpt2-xl": ((1600, 4800), (1600, 1600), (1600, 6400), (6400, 1600)),
    "llama-1b": ((2048, 2048), (2048, 8192), (8192, 2048)),
    "llama-7b": ((4096, 4096), (4096, 11008), (11008, 4096)),
}
"""(in, out) of the distinct layers of a model."""


def measure_row(
    backend: str,
    device: str,
    dtype: torch.dtype,
    *,
    block: int,
    tokens: int,
    widths: tuple[int, int],
    densities: Sequence[float] = DENSITIES,
    rounds: int = 3,
    fastest: bool = False,
) -> Row:
    """Times of one layer at each density, and its break-even density.

    widths: (in, out), multiples of `block`. fastest: see ``medians``.
    """
    in_features, out_features = widths
    x, dense_weight, bias, dy = (
        torch.randn(*shape, device=device).to(dtype)
        for shape in ((tokens, in_features), (out_features, in_features), (out_features,), (tokens, out_features))
    )
    layers = [random_layer(dense_weight, block, density) for density in densities]
    passes = [training_pass(F.linear, (x, dense_weight, bias), dy)]
    for weight, index in layers:
        passes.append(training_pass(partial(sparse_linear, index=index, kernel=backend), (x, weight, bias), dy))
    dense, *ours = medians(passes, device, rounds, fastest=fastest)
    by_density = {index.density: value.device for (_, index), value in zip(layers, ours, strict=True)}
    host = {f"{index.density:.4g}": value.host for (_, index), value in zip(layers, ours, strict=True)}
    return Row(
        backend=backend,
        dtype=dtype_name(dtype),
        block=block,
        tokens=tokens,
        in_features=in_features,
        out_features=out_features,
        break_even=round(break_even(dense.device, by_density), 3),
        dense_seconds=round(dense.device, 7),
        seconds=rounded({f"{density:.4g}": value for density, value in by_density.items()}),
        host_seconds=rounded({"dense": dense.host, **host}) if device == "cuda" else {},
    )


def round_seconds(
    backend: str, dtype: torch.dtype, *, block: int, widths: tuple[int, int], densities: Sequence[float] = DENSITIES
) -> Callable[[int], float]:
    """A function tokens -> about the seconds of a round of ``measure_row`` on a CPU."""
    dense_weight, bias = torch.randn(widths[1], widths[0]).to(dtype), torch.randn(widths[1]).to(dtype)
    weight, index = random_layer(dense_weight, block, 1.0)
    ours = partial(sparse_linear, index=index, kernel=backend)

    def expect(tokens: int) -> float:
        x, dy = (torch.randn(tokens, width).to(dtype) for width in widths)
        dense, full = (
            on_host(training_pass(function, (x, matrix, bias), dy)).host
            for function, matrix in ((F.linear, dense_weight), (ours, weight))
        )
        return dense + sum(densities) * full

    expect(1)  # loads and imports what the first pass needs, which may take seconds
    return expect


def rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 7) for name, value in seconds.items()}


def break_even(dense_seconds: float, seconds: dict[float, float]) -> float:
    """Largest density up to which ours is no slower than dense, on straight lines between the measured densities.

    0 where ours is slower already at the lowest one; the highest one where it never is.
    """
    points = sorted(seconds.items())
    below = points[0]
    if below[1] > dense_seconds:
        return 0.0
    for above in points[1:]:
        if above[1] > dense_seconds:
            share = (dense_seconds - below[1]) / (above[1] - below[1])
            return below[0] + share * (above[0] - below[0])
        below = above
    return below[0]


def speedup(row: Row, density: float) -> float:
    """Dense time over ours at the measured density that is nearest."""
    return row.dense_seconds / row.seconds[_nearest(row, density)]


def efficiency(row: Row, density: float) -> float:
    """Speed-up times density: 1 where an active weight costs what a dense one does."""
    return speedup(row, density) * float(_nearest(row, density))


def host_seconds(row: Row, density: float) -> float | None:
    """Of the host at the measured density that is nearest; None where it does the work itself."""
    return row.host_seconds.get(_nearest(row, density))


def _nearest(row: Row, density: float) -> str:
    return min(row.seconds, key=lambda measured: abs(float(measured) - density))


def parse_shape(words: str) -> tuple[tuple[int, int], ...]:
    """Layers of a model by name, or one as `768x3072`, in x out. Raises ValueError for anything else."""
    if words in LAYERS:
        return LAYERS[words]
    sides = words.split("x")
    if len(sides) != 2 or not all(side.isascii() and side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"shape: {words!r} is unknown; must be one of {', '.join(LAYERS)}, or in x out as 768x3072")
    return ((int(sides[0]), int(sides[1])),)


def random_layer(
    dense_weight: Tensor, block: int, density: float, generator: torch.Generator | None = None
) -> tuple[Tensor, BlockIndex]:
    """The weight with random active blocks, at least one, and their index. generator: on the CPU."""
    grid = dense_weight.shape[0] // block, dense_weight.shape[1] // block
    num_units = grid[0] * grid[1]
    mask = torch.zeros(num_units, dtype=torch.bool)
    mask[torch.randperm(num_units, generator=generator)[: max(round(density * num_units), 1)]] = True
    mask = mask.view(grid).to(dense_weight.device)
    return apply_mask_(dense_weight.clone(), mask, block), build_index(mask, block)

"""Section `tuning`: where the kernels break even with dense products, as `tools/tune_kernels.py` measures it.

Nothing is written to the user's tables: the tool does that. Tiles are the present ones; last, as time allows, some
candidates are tried for one layer of each model, and what the fastest of them gains is told.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch

from megasparse.gpu_check.context import Context
from megasparse.gpu_check.facts import Layer, layers
from megasparse.gpu_check.products import BLOCKS
from megasparse.kernels.block_sparse.measure import DENSITIES, efficiency, measure_row
from megasparse.kernels.block_sparse.tiles import Tile
from megasparse.kernels.block_sparse.tuning import tune_layer
from megasparse.kernels.hybrid_attention import fast_kernel
from megasparse.kernels.hybrid_attention.measure import measure_rows
from megasparse.tuning.kernel_tuning import cases
from megasparse.utils.dtypes import dtype_name

ROUNDS = 3
CANDIDATES = 6
TUNED_TOKENS = 4096


def run(context: Context) -> None:
    precision, dtype = ("fp32", torch.float32) if context.rehearse else ("bf16", torch.bfloat16)
    todo = [layer for layer in layers(context.rehearse) if context.rehearse or layer[2] == TUNED_TOKENS]
    for layer in context.in_time(todo, "layers"):
        _layer(context, layer, precision)
    for head_dim in context.in_time((16,) if context.rehearse else (64, 128), "attention"):
        _attention(context, dtype, head_dim)
    if not context.rehearse:
        # One layer of each model, the last: its MLP.
        wanted = {layer[0]: layer for layer in todo}
        for layer in context.in_time(list(wanted.values()), "tiles"):
            _tiles(context, layer, dtype)


def _layer(context: Context, layer: Layer, precision: str) -> None:
    model, widths, tokens = layer
    found, notes = cases(context.device, [precision], [BLOCKS[model]], [tokens], [widths])
    for note in notes:
        context.row("layer", {"model": model, "in": widths[0], "out": widths[1]}, note=note)
    for case in found:
        densities = (0.5, 1.0) if context.rehearse else DENSITIES
        rounds = 1 if context.rehearse else ROUNDS
        shape: dict[str, Any] = {"block": case.block, "tokens": case.tokens, "widths": case.widths}
        row = measure_row(case.backend, context.device, case.dtype, densities=densities, rounds=rounds, **shape)
        settings = {"model": model, "in": row.in_features, "out": row.out_features, "tokens": tokens}
        settings |= {"block": row.block, "dtype": row.dtype, "kernel": row.backend}
        numbers = {"break_even": row.break_even, "dense_seconds": row.dense_seconds}
        numbers["efficiency"] = efficiency(row, 0.1)
        context.row("layer", settings, numbers)


def _attention(context: Context, dtype: torch.dtype, head_dim: int) -> None:
    """Tokens from which the kernels are no slower than a mask and than dense causal attention."""
    kernel = "tiled" if context.rehearse else fast_kernel(context.device, dtype, head_dim)
    shape: dict[str, Any] = {"stride": 8, "lengths": (16, 32), "rounds": 1} if context.rehearse else {"stride": 128}
    for row in measure_rows(kernel, context.device, dtype, head_dim=head_dim, **shape):
        settings = {"kernel": kernel, "pattern": row.pattern, "head_dim": head_dim, "dtype": dtype_name(dtype)}
        shortest = row.lengths[0]
        limits = {f"from_tokens_over_{other}": row.limit(other) or shortest for other in ("mask", "dense")}
        context.row("pattern", settings, limits)


def _tiles(context: Context, layer: Layer, dtype: torch.dtype) -> None:
    model, widths, tokens = layer
    with tempfile.TemporaryDirectory() as name:
        # The file of tuned tiles is not the user's: a check changes nothing of the runs that follow.
        os.environ["MEGASPARSE_CACHE"] = name
        fastest = tune_layer(context.device, dtype, BLOCKS[model], tokens, widths, 0.1, limit=CANDIDATES)
    for product_name, (tile, milliseconds) in fastest.items():
        settings = {"model": model, "in": widths[0], "out": widths[1], "tokens": tokens, "product": product_name}
        context.row("tile", settings, {"seconds": milliseconds / 1e3}, facts={"tile": _words(tile)})


def _words(tile: Tile) -> str:
    return f"{tile.rows} x {tile.columns} x {tile.depth}, {tile.warps} warps, {tile.stages} stages"

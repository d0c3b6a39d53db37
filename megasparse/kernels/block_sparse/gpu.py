"""The sparse linear layer on GPUs: products over active blocks by Triton kernels, float32, bfloat16 and float16.

Grids depend only on shapes and on the number of active blocks, which the host knows: nothing waits for the device, and
CUDA graphs can capture every launch. Nothing is read or multiplied outside of active blocks; the weight gradient is
filled with zeros and its active blocks are written, in either storage. Tile sizes come from ``tile_cache``. Triton is
imported on first use.

Where they run, and with which dtypes: ``common.triton_device``. UNITS are the block sides.

Names: N tokens, I input width, O output width, R block rows, L active blocks.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megasparse.kernels.block_sparse import dense, tile_cache, waves
from megasparse.kernels.block_sparse.index import BlockIndex
from megasparse.kernels.block_sparse.storage import places_by_columns, places_by_rows, weight_shape
from megasparse.kernels.block_sparse.tiles import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Tile
from megasparse.kernels.common import triton_device
from megasparse.kernels.common.triton_device import power_of_two

UNITS = (16, 32, 64, 128)


def why_not(device: str, dtype: torch.dtype, block_size: int, planned: bool = False) -> str | None:
    """Why these kernels cannot run on a device type with a dtype and a block side; None where they can.

    planned: says what can be told where the GPU is not.
    """
    reason = triton_device.wrong_type(device, dtype)
    if reason is None and block_size not in UNITS:
        reason = f"sparsity.block_size {block_size}; supported: {', '.join(map(str, UNITS))}"
    reason = reason or triton_device.missing_triton()
    return reason or (triton_device.unsuited_device() if device == "cuda" and not planned else None)


def forward(x_NI: Tensor, weight: Tensor, bias: Tensor | None, index: BlockIndex, tile: Tile | None = None) -> Tensor:
    """See ``linear``. `tile`: instead of the tuned one."""
    return _product(x_NI, weight, True, bias, index, tile)


def activated_forward(
    x_NI: Tensor, weight: Tensor, bias: Tensor | None, index: BlockIndex, activation: str, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """z_NO = x W^T + b and f(z), for an activation f of ``activated.NAMES``."""
    z_NO = x_NI.new_empty(x_NI.shape[0], index.mask.shape[0] * index.block_size)
    return z_NO, _product(x_NI, weight, True, bias, index, tile, activation, z_NO)


def backward(
    dy_NO: Tensor, x_NI: Tensor, weight: Tensor, index: BlockIndex, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See ``linear``."""
    dx = input_gradient(dy_NO, weight, index) if needs[0] else None
    dweight = weight_gradient(dy_NO, x_NI, index) if needs[1] else None
    return dx, dweight, dense.bias_gradient(dy_NO) if needs[2] else None


def input_gradient(dy_NO: Tensor, weight: Tensor, index: BlockIndex, tile: Tile | None = None) -> Tensor:
    """dx_NI = dy W. `tile`: instead of the tuned one."""
    return _product(dy_NO, weight, False, None, index, tile)


def activated_input_gradient(
    dy_NO: Tensor, weight: Tensor, index: BlockIndex, activation: str, z_NI: Tensor, tile: Tile | None = None
) -> Tensor:
    """f'(z) (dy W): the gradient of z where the input of the layer is f(z). z_NI: contiguous."""
    return _product(dy_NO, weight, False, None, index, tile, activation, z_NI)


def weight_gradient(
    dy_NO: Tensor, x_NI: Tensor, index: BlockIndex, tile: Tile | None = None, splits: int | None = None
) -> Tensor:
    """dW = dy^T x as the weight is stored, exactly zero outside of active blocks and in empty slots.

    Args:
        dy_NO, x_NI, index: as in ``linear``.
        tile: instead of the tuned one.
        splits: number of parts that the tokens are cut into; None: by ``waves``.
    """
    dy_NO, x_NI = _unit_stride(dy_NO), _unit_stride(x_NI)
    num_rows, block_size, tokens = index.mask.shape[0], index.block_size, x_NI.shape[0]
    dweight = x_NI.new_zeros(weight_shape(index))
    if not tokens or not index.num_active:
        return dweight
    tile = tile or tile_cache.tile_for(problem(WEIGHT_GRADIENT, x_NI, block_size, num_rows, index.num_active))
    programs = gradient_programs(tile, block_size, num_rows, index.num_active)
    if splits is None:
        working = working_programs(tile, block_size, num_rows, index.num_active)
        splits = waves.best_splits(tile, x_NI.dtype, working, tokens, waves.processors(x_NI.device))
    # Splits of whole steps; the last one may be shorter.
    tokens_per_split = -(-tokens // (splits * tile.depth)) * tile.depth
    splits = -(-tokens // tokens_per_split)
    held, out = places_by_rows(dweight, index), dweight
    if splits > 1:
        out = x_NI.new_empty(splits, index.num_active, block_size, block_size, dtype=torch.float32)
    with triton_device.current(x_NI.device):
        _kernels().gradient_kernel[(programs, splits)](
            *(dy_NO, x_NI, out, index.row_offsets, index.columns, index.rows, held.places),
            *(tokens, tokens_per_split, num_rows, index.num_active),
            *(dy_NO.stride(0), x_NI.stride(0), held.row_step, held.group_step, held.place_step),
            PACKED=index.is_packed,
            MAX_ROWS=power_of_two(num_rows),
            PARTIAL=splits > 1,
            **_constants(tile, block_size, x_NI.dtype),
        )
        if splits > 1:
            rows = min(block_size, 32)
            _kernels().sum_kernel[(index.num_active * (block_size // rows),)](
                *(out, dweight, held.places, index.rows, splits),
                *(out.stride(0), held.row_step, held.group_step, held.place_step),
                UNIT=block_size,
                ROWS=rows,
            )
    return dweight


def gradient_programs(tile: Tile, block_size: int, num_rows: int, num_active: int) -> int:
    """Programs of the weight gradient: an upper bound that needs no look at the lists, which are on the device."""
    if tile.columns <= block_size:
        return num_active * (block_size // tile.rows) * (block_size // tile.columns)
    blocks = tile.columns // block_size
    # Each block row ends with at most one chunk that is not full.
    return min(num_active, num_active // blocks + num_rows) * (block_size // tile.rows)


def working_programs(tile: Tile, block_size: int, num_rows: int, num_active: int) -> int:
    """About how many of ``gradient_programs`` find a chunk: half of the block rows end with one that is not full where
    a chunk has two blocks, three quarters where it has four."""
    most = gradient_programs(tile, block_size, num_rows, num_active)
    if tile.columns <= block_size:
        return most
    blocks = tile.columns // block_size
    chunks = num_active // blocks + num_rows * (blocks - 1) // (2 * blocks)
    return max(1, min(most, chunks * (block_size // tile.rows)))


def _product(
    a: Tensor,
    weight: Tensor,
    transposed: bool,
    bias: Tensor | None,
    index: BlockIndex,
    tile: Tile | None,
    activation: str | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """a W^T (transposed) or a W over the blocks of each output group: [N, outputs]. With an activation f, f(a W^T),
    where z is written, or f'(z) (a W)."""
    a, weight = _unit_stride(a), weight.contiguous() if index.is_packed else _unit_stride(weight)
    if transposed:
        held, lists = places_by_rows(weight, index), (index.row_offsets, index.columns, index.row_order)
    else:
        held, lists = places_by_columns(weight, index), (index.column_offsets, index.column_rows, index.column_order)
    (offsets, indices, order), places, block_size, tokens = lists, held.places, index.block_size, a.shape[0]
    outer = order.numel() * block_size
    c = a.new_empty(tokens, outer)
    if not c.numel():
        return c
    tile = tile or tile_cache.tile_for(
        problem(FORWARD if transposed else INPUT_GRADIENT, a, block_size, order.numel(), indices.numel())
    )
    inner_stride, outer_stride = (1, held.row_step) if transposed else (held.row_step, 1)
    # No active block at all leaves lists without memory behind them; they are not read then.
    if not indices.numel():
        indices = places = offsets
    with triton_device.current(a.device):
        _kernels().product_kernel[(-(-tokens // tile.rows) * (outer // tile.columns),)](
            *(a, weight, a if bias is None else bias, c, z, offsets, indices, places, order),
            *(tokens, order.numel(), a.stride(0), inner_stride, outer_stride, held.group_step, held.place_step),
            c.stride(0),
            PACKED=index.is_packed,
            GROUP=tile.group,
            SWAPPED=tile.swapped,
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            BACKWARDS=not transposed,
            **_constants(tile, block_size, a.dtype),
        )
    return c


def problem(kernel: str, a: Tensor, block_size: int, groups: int, num_active: int) -> tile_cache.Problem:
    """What the tile of a product depends on. `a`: an input of it, a row for each token; the rest as in ``Problem``."""
    return tile_cache.Problem(kernel, _device_name(a.device), a.dtype, block_size, a.shape[0], groups, num_active)


def _constants(tile: Tile, block_size: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        **{"UNIT": block_size, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth},
        **{"PRECISION": triton_device.precision(dtype), "num_warps": tile.warps, "num_stages": tile.stages},
    }


def _unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@cache
def _kernels() -> ModuleType:
    from megasparse.kernels.block_sparse import triton_kernels

    return triton_kernels

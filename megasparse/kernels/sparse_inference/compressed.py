"""How the weight of a linear layer is kept for inference, and how a matrix [out, in] becomes that.

`dense`: rows of all weights. `unstructured`: a mask of one bit per weight, in words of 64 columns, and the weights that
are not 0, in the order of the rows; N:M with any group (2:4, 16:32, 16:64) is the same. `blocks`: squares of 4 to 64,
in strips of 4 rows as the kernel reads them. Values are float32, bfloat16, or int8 with a float32 scale per output.

Bytes per weight, with values of v bytes and a density d: v; v d + 1/8; v d.

Names: O outputs, I inputs, G words of a row of the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megasparse.kernels.block_sparse import assign_slots, pack
from megasparse.kernels.sparse_inference.choice import BLOCK_SIZES, KINDS, choose

__all__ = ["BLOCK_SIZES", "KINDS", "CompressedWeight", "compress", "decompress"]

DTYPES = (torch.float32, torch.bfloat16, torch.int8)
WORD = 64
"""Columns of a word of the mask; rows are padded to it."""
STRIP = 4
MAX_INPUTS = 2**16
"""Sums of int8 stay within int32: 65,536 * 255 * 127 < 2^31."""


@dataclass(frozen=True)
class CompressedWeight:
    """A weight [O, I] as ``compress`` has made it; on the CPU, and never changed."""

    kind: str
    """Of KINDS."""
    shape: tuple[int, int]
    """(O, I)."""
    values: Tensor
    """Flat, float32, bfloat16 or int8; beyond their end as much as a vector may read."""
    num_stored: int
    """Values that are weights."""
    masks: Tensor | None = None
    """`unstructured`: int64 [O, G], bit c of word g is column 64 g + c."""
    offsets: Tensor | None = None
    """int64: first value of each row, or of `columns` of each row of blocks, and the end."""
    columns: Tensor | None = None
    """`blocks`: int16, the column of each block on the grid."""
    block_size: int = 1
    scales_O: Tensor | None = None
    """int8: float32, a weight is its value times that of its output."""
    row_sums_O: Tensor | None = None
    """int8: int32, the sum of the values of each output."""

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def density(self) -> float:
        return self.num_stored / max(self.shape[0] * self.shape[1], 1)

    @property
    def num_bytes(self) -> int:
        """At rest."""
        return sum(part.numel() * part.element_size() for part in self.tensors() if part is not None)

    @property
    def words(self) -> int:
        """Words of a row of the mask; of rows without one, as many as their columns would need."""
        return -(-self.shape[1] // WORD)

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.values, self.masks, self.offsets, self.columns, self.scales_O, self.row_sums_O


def compress(
    weight_OI: Tensor, *, scales_O: Tensor | None = None, kind: str = "auto", block_size: int | None = None
) -> CompressedWeight:
    """Pack a matrix; its zeros stay exactly 0, and the matrix itself is not kept.

    Args:
        weight_OI: float32, bfloat16, or int8 with values of -127 to 127; on the CPU.
        scales_O: float32 [O], with int8 only: finite and at least 0.
        kind: of KINDS, or `auto`, see ``choose``.
        block_size: of BLOCK_SIZES, with `blocks`; None: the largest one that wastes next to nothing.

    Raises:
        ValueError: dtype, scales, kind or block size do not fit the matrix.
    """
    _check(weight_OI, scales_O, kind, block_size)
    weight_OI = weight_OI.detach().contiguous()
    choice = choose(weight_OI, kind, block_size)
    if choice.kind == "blocks":
        parts = _blocks(weight_OI, choice.block_size)
    elif choice.kind == "unstructured":
        parts = _unstructured(weight_OI)
    else:
        parts = _dense(weight_OI)
    if scales_O is not None:
        parts |= {"scales_O": scales_O.detach().float().clone(), "row_sums_O": weight_OI.sum(1, dtype=torch.int32)}
    outputs, inputs = weight_OI.shape
    return CompressedWeight(choice.kind, (outputs, inputs), **parts)


def decompress(weight: CompressedWeight) -> Tensor:
    """[O, I] in the dtype of the values; of int8, without the scales."""
    outputs, inputs = weight.shape
    stored = weight.values[: weight.num_stored]
    if weight.kind == "dense":
        return weight.values[: outputs * weight.words * WORD].view(outputs, -1)[:, :inputs].clone()
    if weight.kind == "unstructured":
        assert weight.masks is not None
        found = stored.new_zeros(outputs, weight.words * WORD)
        found[_unpacked_bits(weight.masks)] = stored
        return found[:, :inputs].contiguous()
    assert weight.offsets is not None and weight.columns is not None
    side = weight.block_size
    found = stored.new_zeros(outputs // side, inputs // side, side, side)
    for row, (begin, end) in enumerate(zip(weight.offsets[:-1].tolist(), weight.offsets[1:].tolist(), strict=True)):
        strips = stored[begin * side * side : end * side * side].view(side // STRIP, end - begin, STRIP, side)
        found[row, weight.columns[begin:end].long()] = strips.transpose(0, 1).reshape(-1, side, side)
    return found.transpose(1, 2).reshape(outputs, inputs)


def _check(weight_OI: Tensor, scales_O: Tensor | None, kind: str, block_size: int | None) -> None:
    dtype = weight_OI.dtype
    if weight_OI.ndim != 2 or dtype not in DTYPES or weight_OI.device.type != "cpu":
        raise ValueError(
            f"weight: {tuple(weight_OI.shape)}, {dtype}, on {weight_OI.device}; must be [out, in] on the CPU, one of "
            f"{', '.join(map(str, DTYPES))}"
        )
    outputs, inputs = weight_OI.shape
    if not 1 <= inputs <= MAX_INPUTS:
        raise ValueError(f"weight: {inputs} inputs; must be 1 to {MAX_INPUTS}")
    if (scales_O is not None) != (dtype == torch.int8):
        raise ValueError(
            f"scales: {'none' if scales_O is None else 'given'} with {dtype}; must be given with torch.int8"
        )
    if scales_O is not None:
        if scales_O.shape != (outputs,) or not bool((scales_O.isfinite() & (scales_O >= 0)).all()):
            raise ValueError(f"scales: {tuple(scales_O.shape)}; must be [{outputs}], finite, and at least 0")
        if bool((weight_OI == -128).any()):
            raise ValueError("weight: -128 in int8; must be -127 to 127, symmetric")
    if kind not in ("auto", *KINDS):
        raise ValueError(f"kind: {kind}; must be one of auto, {', '.join(KINDS)}")
    if block_size is not None and (block_size not in BLOCK_SIZES or outputs % block_size or inputs % block_size):
        allowed = ", ".join(str(size) for size in BLOCK_SIZES if outputs % size == 0 == inputs % size) or "unset"
        raise ValueError(f"block_size: {block_size} of a weight {outputs} x {inputs}; must be {allowed}")


def _padded(values: Tensor) -> Tensor:
    """A vector may read so far beyond the end."""
    return F.pad(values.reshape(-1), (0, WORD))


def _dense(weight_OI: Tensor) -> dict:
    rows = F.pad(weight_OI, (0, -weight_OI.shape[1] % WORD))
    return {"values": _padded(rows), "num_stored": weight_OI.numel()}


def _unstructured(weight_OI: Tensor) -> dict:
    mask = weight_OI != 0
    bits = np.packbits(F.pad(mask, (0, -mask.shape[1] % WORD)).numpy(), axis=1, bitorder="little")
    offsets = F.pad(mask.sum(1).cumsum(0), (1, 0))
    values = weight_OI[mask]
    masks = torch.from_numpy(bits.view("<i8"))
    return {"values": _padded(values), "num_stored": len(values), "masks": masks, "offsets": offsets}


def _unpacked_bits(masks: Tensor) -> Tensor:
    """bool [O, 64 G]."""
    return torch.from_numpy(np.unpackbits(masks.numpy().view(np.uint8), axis=1, bitorder="little").view(bool))


def _blocks(weight_OI: Tensor, side: int) -> dict:
    outputs, inputs = weight_OI.shape
    mask = (weight_OI != 0).view(outputs // side, side, inputs // side, side).any(dim=3).any(dim=1)
    offsets = F.pad(mask.sum(1).cumsum(0), (1, 0))
    packed = pack(weight_OI, assign_slots(mask, int(offsets[-1])), side)
    # The slots of a row of blocks lie together; within it the strips of 4 rows, each through all of its blocks.
    rows = [
        packed[begin:end].view(-1, side // STRIP, STRIP, side).transpose(0, 1).reshape(-1)
        for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ]
    columns = mask.nonzero()[:, 1].to(torch.int16)
    parts = {"values": _padded(torch.cat(rows)), "num_stored": packed.numel(), "block_size": side}
    return {**parts, "offsets": offsets, "columns": columns}

"""Into how many parts the tokens of a weight gradient are cut, so that the last wave of programs leaves few processors
without work.

    splits = best_splits(tile, dtype, programs, tokens, processors(device))

All programs of a weight gradient have equally many tokens, so they start and end in waves of as many as fit on the
device at once. Of 275 programs on a device with room for 264, 11 make the whole device wait as long again; cut into
three, they fill 825 places of four waves of 264, and take 4/3 instead of 2 times the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from megasparse.kernels.block_sparse.tiles import Tile

LEAST_TOKENS = 512
"""Of a split: below, most of the time would go into filling pipelines and adding up."""
MOST_WAVES = 4
"""Of programs that are made by cutting: more gain little, and their sums in float32 take memory (at most 70 MB on a
device with room for 264 programs of 128 x 128)."""


@dataclass(frozen=True)
class Processors:
    """What bounds the programs that a device runs at once."""

    count: int
    shared_memory: int
    """Bytes for all programs of one processor."""
    registers: int
    """For all programs of one processor."""
    threads_per_warp: int = 32
    loads_fragments: bool = False
    """Operands of the tensor cores lie in registers (mma.sync, mfma) and not in shared memory (wgmma)."""


@cache
def processors(device: torch.device) -> Processors:
    """Of a GPU; of the CPU that interprets kernels, one with room for two programs."""
    if device.type != "cuda":
        return Processors(1, 2 * 2**17, 2**16)
    told = torch.cuda.get_device_properties(device)
    own_registers = torch.version.hip is not None or told.major != 9
    memory, registers = told.shared_memory_per_multiprocessor, told.regs_per_multiprocessor
    return Processors(told.multi_processor_count, memory, registers, told.warp_size, own_registers)


def programs_at_once(tile: Tile, dtype: torch.dtype, device: Processors) -> int:
    """Programs with this tile that the whole device runs at once, by shared memory and registers.

    Shared memory as Triton takes it, and 1 KiB that CUDA keeps for each program. Registers of a thread: its sums and 64
    more, or 108 where operands lie in registers, as the compiler takes at most for the default tiles in 16 bits.
    """
    memory = tile.stages * (tile.rows + tile.columns) * tile.depth * dtype.itemsize + 1024
    threads = tile.warps * device.threads_per_warp
    registers = threads * (tile.rows * tile.columns // threads + (108 if device.loads_fragments else 64))
    return device.count * max(1, min(device.shared_memory // memory, device.registers // registers))


@lru_cache(maxsize=4096)
def best_splits(tile: Tile, dtype: torch.dtype, programs: int, tokens: int, device: Processors) -> int:
    """Parts of the tokens with the least of ``cost``, the fewest among equals.

    programs: with work, of one split.
    """
    room = programs_at_once(tile, dtype, device)
    most = max(1, min(tokens // LEAST_TOKENS, MOST_WAVES * room // max(programs, 1)))
    return min(range(1, most + 1), key=lambda splits: cost(tile, dtype, programs, tokens, splits, device))


def cost(tile: Tile, dtype: torch.dtype, programs: int, tokens: int, splits: int, device: Processors) -> float:
    """Time of a weight gradient, in the time that a processor takes for one token of one program.

    A program fills its pipeline before its first product. Where there are splits, its sums are written and read again
    in float32: as many bytes as `rows x columns x 8 / ((rows + columns) x bytes of an element)` tokens.
    Programs that share a processor slow each other down by something between nothing (they wait for memory in turns)
    and their number (its tensor cores are busy): the mean of both counts.
    """
    room = programs_at_once(tile, dtype, device)
    together = -(-programs * splits // room) * (room // device.count)
    in_turn = -(-programs * splits // device.count)
    added_up = tile.rows * tile.columns * 8 / ((tile.rows + tile.columns) * dtype.itemsize) if splits > 1 else 0.0
    steps = -(-tokens // (splits * tile.depth))
    return (together + in_turn) / 2 * ((steps + tile.stages) * tile.depth + added_up)

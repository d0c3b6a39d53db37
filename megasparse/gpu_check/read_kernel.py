"""A Triton kernel that reads a buffer again and again: for the bandwidth of the cache that the buffer fits into.

Imports Triton: only to be imported where there is one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def read_kernel(source_pointer, sums_pointer, num_blocks, READS: tl.constexpr, BLOCK: tl.constexpr):
    """sums = what each lane has read, [programs * BLOCK], float32."""
    lanes, program = tl.arange(0, BLOCK), tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for number in range(READS):
        # A large step from one read to the next: the block must not be in the processor's own cache.
        block = (program + number * 37) % num_blocks
        total += tl.load(source_pointer + block * BLOCK + lanes, cache_modifier=".cg")
    tl.store(sums_pointer + program * BLOCK + lanes, total)


def read_repeatedly(source: torch.Tensor, sums: torch.Tensor, programs: int, reads: int) -> None:
    """Each program reads `reads` blocks of BLOCK float32 numbers; both buffers hold whole blocks."""
    read_kernel[(programs,)](source, sums, source.numel() // BLOCK, READS=reads, BLOCK=BLOCK)

"""Compiles the Triton kernels of hybrid sparse attention for chips that are not here.

Used by test_hybrid_attention_ahead_of_time.py; `python tests/kernels/attention_ahead_of_time.py [CHIP ...]` prints a
table.
"""

from __future__ import annotations

import sys
import time
from itertools import product

import torch
from ahead_of_time import NAMES, TARGETS, Compiled, compile_source
from triton.compiler import ASTSource

from megasparse.kernels.hybrid_attention import (
    gpu_tiles,
    triton_kernels,
    triton_key_gradient,
)
from megasparse.kernels.hybrid_attention.gpu_tiles import Launch, Tile

FORWARD, QUERIES, KEYS = "forward", "query gradient", "key gradient"
FUNCTIONS = {
    FORWARD: (triton_kernels.forward_kernel, gpu_tiles.forward_tile),
    QUERIES: (triton_kernels.query_gradient_kernel, gpu_tiles.query_gradient_tile),
    KEYS: (triton_key_gradient.key_gradient_kernel, gpu_tiles.key_gradient_tile),
}
LAUNCHES = {
    "local": Launch("window", "none"),
    "fixed": Launch("block", "summaries"),
    "strided rows": Launch("none", "rows"),
    "strided tiles": Launch("none", "residues"),
    "sparse rows": Launch("window", "rows", beyond=True),
    "sparse tiles 1": Launch("none", "residues", beyond=True),
    "sparse tiles 2": Launch("window", "none"),
}
LISTS = ("starts_pointer", "ends_pointer", "offsets_pointer")
FLOATS = ("lse_pointer", "delta_pointer")


def compile_kernel(
    kernel: str,
    launch: str,
    dtype: torch.dtype,
    head_dim: int,
    chip: str,
    *,
    length: int = 64,
    masked: bool = False,
    heads: int = 1,
    tile: Tile | None = None,
    precision: str = "ieee",
) -> Compiled:
    """As a launch on aligned tensors would. `length`: tokens of one residue. `masked`: with documents and offsets."""
    function, choose = FUNCTIONS[kernel]
    parts, is_hip = LAUNCHES[launch], TARGETS[chip].backend == "hip"
    tile = tile or choose(parts, length, dtype, head_dim, is_hip)
    constants: dict[str, object] = {
        "NEAR": parts.near,
        "FAR": parts.far,
        "BEYOND": parts.beyond,
        "HEADS": heads,
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "CHUNK": tile.chunk,
        "HEAD_DIM": head_dim,
        "WIDTH": gpu_tiles.width(head_dim),
        "PRECISION": precision,
    }
    # The first of two launches makes float32 sums, which the second one adds to.
    first, second = launch.endswith("1"), launch.endswith("2")
    signature, attributes = {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in LISTS and not masked or name.startswith("previous") and not second:
            constants[name], signature[name] = None, "constexpr"
        elif name.endswith("_pointer"):
            made = (
                name in ("out_pointer", "dq_pointer", "dk_pointer", "dv_pointer")
                and kernel != QUERIES
                or name == "dq_pointer"
            )
            wide = name in FLOATS or name.startswith("previous") or first and made
            signature[name] = "*i32" if name in LISTS else "*fp32" if wide else f"*{NAMES[dtype]}"
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif name.startswith("strides_"):
            signature[name] = ("i32", "i32", "i32")
            attributes |= {(place, number): [["tt.divisibility", 16]] for number in range(3)}
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    source = ASTSource(function, signature, constants, attributes)
    return compile_source(source, chip, num_warps=tile.warps, num_stages=tile.stages)


if __name__ == "__main__":
    chips, kernels, dtypes, dims = (part.split(",") for part in (sys.argv[1:] + ["", "", "", ""])[:4])
    chosen = product(
        [c for c in TARGETS if chips == [""] or c in chips],
        [d for d in NAMES if dtypes == [""] or NAMES[d] in dtypes],
        [16, 32, 64, 80, 96, 128] if dims == [""] else map(int, dims),
        LAUNCHES,
        [k for k in FUNCTIONS if kernels == [""] or k in kernels],
    )
    for chip, dtype, head_dim, launch, kernel in chosen:
        start = time.perf_counter()
        made = compile_kernel(kernel, launch, dtype, head_dim, chip)
        units = next((block_size for block_size in ("wgmma", "mma.sync", "mfma") if block_size in made.assembly), "")
        print(
            f"{chip:7}{NAMES[dtype]:5}{head_dim:4}  {launch:15}{kernel:15}{made.registers:4} registers "
            f"{made.spills:4} spilled {made.shared / 1024:6.1f} KiB  {units:9}{time.perf_counter() - start:5.1f}s",
            flush=True,
        )

"""Compiles the Triton kernels for chips that are not here, and reads their registers, spills and shared memory.

Used by test_block_sparse_ahead_of_time.py; `python tests/kernels/ahead_of_time.py` prints a table of all defaults.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from megasparse.kernels.block_sparse import triton_kernels
from megasparse.kernels.block_sparse.tiles import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Tile, default_tile

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
SPLIT = "weight gradient, split"
KERNELS = (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, SPLIT)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel."""

    assembly: str
    shared: int
    """Bytes of shared memory of one program."""
    registers: int
    """Of one thread."""
    spills: int
    """Bytes kept in memory for want of registers."""


def compile_kernel(
    kernel: str,
    block_size: int,
    dtype: torch.dtype,
    chip: str,
    tile: Tile | None = None,
    precision: str = "ieee",
    is_packed: bool = False,
    activation: str | None = None,
) -> Compiled:
    """Compile one of KERNELS as a launch on aligned tensors of odd token count would. activation: behind the forward
    product or before the input gradient."""
    name = WEIGHT_GRADIENT if kernel == SPLIT else kernel
    tile = tile or default_tile(name, block_size, dtype, TARGETS[chip].backend == "hip")
    constants = {
        "PACKED": is_packed,
        "UNIT": block_size,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "PRECISION": precision,
    }
    if name == WEIGHT_GRADIENT:
        function = triton_kernels.gradient_kernel
        constants |= {"MAX_ROWS": 128, "PARTIAL": kernel == SPLIT}
    else:
        function = triton_kernels.product_kernel
        constants |= {"GROUP": tile.group, "SWAPPED": tile.swapped, "HAS_BIAS": kernel == FORWARD}
        constants |= {"ACTIVATION": activation, "BACKWARDS": kernel == INPUT_GRADIENT}
        if activation is None:
            constants["z_pointer"] = None
        # The weight is contiguous along its input width: the forward product sums over it, the input gradient not.
        constants["stride_inner" if kernel == FORWARD else "stride_outer"] = 1
    return _compile(function, constants, dtype, tile, chip)


def _compile(function, constants: dict[str, object], dtype: torch.dtype, tile: Tile, chip: str) -> Compiled:
    signature, attributes = {}, {}
    for place, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_pointer"):
            lists = argument.startswith(("offsets", "indices", "order", "columns", "rows", "places"))
            partial = argument == "out_pointer" and constants["PARTIAL"]
            signature[argument] = "*i32" if lists else "*fp32" if partial else f"*{NAMES[dtype]}"
        else:
            signature[argument] = "i32"
        if argument not in constants and (argument.endswith("_pointer") or argument.startswith("stride")):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return compile_source(
        ASTSource(function, signature, constants, attributes), chip, num_warps=tile.warps, num_stages=tile.stages
    )


def compile_source(source: ASTSource, chip: str, **options: int) -> Compiled:
    target = TARGETS[chip]
    compiled = triton.compile(source, target=target, options=options)
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        # Scalar registers are spilled to lanes of vector registers: that takes no memory.
        spills = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        return Compiled(text, compiled.metadata.shared, registers, spills)
    return Compiled(compiled.asm["ptx"], compiled.metadata.shared, *_registers_and_spills(compiled.asm["ptx"], chip))


def _registers_and_spills(ptx: str, chip: str) -> tuple[int, int]:
    """As the assembler tells them; the metadata of a kernel that was never loaded on a device does not hold them."""
    told, _ = _assemble(ptx, chip)
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", told))
    return int(re.search(r"Used (\d+) registers", told)[1]), spills


def loop_instructions(made: Compiled, chip: str) -> int:
    """Machine instructions of the smallest loop that holds all matrix products of one step: what a warp issues then."""
    _, listing = _assemble(made.assembly, chip, disassemble=True)
    places, lines = {}, []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            places[label[1]] = len(lines)
        elif re.search(r"/\*[0-9a-f]{4,}\*/\s+\S", line):
            lines.append(line)
    products = [number for number, line in enumerate(lines) if re.search(r"\b(HGMMA|HMMA)\.", line)]
    loops = []
    for number, line in enumerate(lines):
        if (jump := re.search(r"\bBRA .*`\((\.L_x_\d+)\)", line)) and places[jump[1]] <= number:
            begin = places[jump[1]]
            inside = sum(begin <= place <= number for place in products)
            loops.append((-inside, number + 1 - begin))
    assert loops and loops[0][0], "no loop with a matrix product"
    return min(loops)[1]


def _assemble(ptx: str, chip: str, disassemble: bool = False) -> tuple[str, str]:
    """What the assembler says, and the machine code in words."""
    # Triton brings one assembler for chips up to some generation and one for newer ones.
    assembler = get_ptxas(TARGETS[chip].arch).path
    architecture = re.search(r"\.target (sm_\w+)", ptx)[1]
    assert architecture.startswith(chip), f"{architecture}, {chip}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [
            assembler,
            "-v",
            f"--gpu-name={architecture}",
            str(path),
            "-o",
            str(Path(folder) / "kernel.cubin"),
        ]
        told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stderr
        if not disassemble:
            return told, ""
        command = [str(Path(assembler).with_name("nvdisasm")), "-c", str(Path(folder) / "kernel.cubin")]
        return told, subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def cases(units: tuple[int, ...] = (16, 32, 64, 128)) -> Iterator[tuple[str, int, torch.dtype, str]]:
    for chip in TARGETS:
        for dtype in NAMES:
            for block_size in units:
                for kernel in KERNELS:
                    yield kernel, block_size, dtype, chip


if __name__ == "__main__":
    import time

    print(f"triton {triton.__version__}")
    for kernel, block_size, dtype, chip in cases():
        start = time.perf_counter()
        made = compile_kernel(kernel, block_size, dtype, chip)
        wgmma = "wgmma" in made.assembly
        print(
            f"{chip:7}{NAMES[dtype]:5}{block_size:4}  {kernel:24}{made.registers:4} registers {made.spills:4} spilled "
            f"{made.shared / 1024:6.1f} KiB shared{'  wgmma' if wgmma else ''} {time.perf_counter() - start:.1f}s",
            flush=True,
        )

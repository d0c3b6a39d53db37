"""Compiles the elementwise Triton kernels for chips that are not here.

Used by test_elementwise_triton.py; `python tests/kernels/elementwise_ahead_of_time.py` prints a table.
"""

from __future__ import annotations

import torch
from ahead_of_time import NAMES, TARGETS, Compiled, compile_source
from triton.compiler import ASTSource

from megasparse.kernels.elementwise import gpu, triton_kernels

FUNCTIONS = {
    "gate": triton_kernels.gate_kernel,
    "gate gradient": triton_kernels.gate_gradient_kernel,
    "rotation": triton_kernels.rotate_kernel,
    "sum and norm": triton_kernels.normalize_kernel,
    "sum and norm gradient": triton_kernels.normalize_gradient_kernel,
}
FLOATS = ("moments_pointer", "dweight_pointer", "dbias_pointer", "cos_pointer", "sin_pointer")


def compile_kernel(kernel: str, dtype: torch.dtype, width: int, chip: str) -> Compiled:
    """As a launch on aligned tensors would. width: of the head (rotation), or of a row."""
    function, options = FUNCTIONS[kernel], {}
    constants: dict[str, object] = {"COLUMNS": gpu.GATE_COLUMNS, "CENTRED": True}
    constants |= {"HALF": width // 2, "BACKWARDS": False}
    if kernel == "rotation":
        constants |= {"WIDTH": width // 2, "ROWS": gpu.ROTATED_PAIRS // (width // 2)}
    elif kernel.startswith("sum"):
        row = gpu._row(width)
        constants["WIDTH"], options["num_warps"] = row["WIDTH"], row["num_warps"]
    signature, attributes = {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_pointer"):
            signature[name] = f"*{'fp32' if name in FLOATS else NAMES[dtype]}"
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif name == "strides":
            signature[name] = ("i32", "i32", "i32")
            attributes |= {(place, number): [["tt.divisibility", 16]] for number in range(3)}
        else:
            signature[name] = "fp32" if name == "epsilon" else "i32"
            if name == "width":
                attributes[(place,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    return compile_source(ASTSource(function, signature, constants, attributes), chip, **options)


if __name__ == "__main__":
    for chip in TARGETS:
        for kernel in FUNCTIONS:
            width = 128 if kernel == "rotation" else 4096
            made = compile_kernel(kernel, torch.bfloat16, width, chip)
            print(
                f"{chip:7} {kernel:24}{made.registers:4} registers {made.spills:4} spilled {made.shared:6} bytes shared"
            )

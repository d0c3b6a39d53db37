"""Products with weights of few bits.

    matrix = quantized(weight, bits=8, group=None)
    y = int8_linear(x, matrix.values, matrix.scales, bias)

Symmetric grids: zero is a point of every one, so that a pruned weight stays exactly 0.
"""

from megasparse.kernels.quantized.grid import BITS, QuantizedMatrix, largest_level, quantized, row_scales
from megasparse.kernels.quantized.packing import pack_levels, packed_width, unpack_levels
from megasparse.kernels.quantized.reference import int8_linear, quantize_tokens

__all__ = [
    "BITS",
    "QuantizedMatrix",
    "int8_linear",
    "largest_level",
    "pack_levels",
    "packed_width",
    "quantize_tokens",
    "quantized",
    "row_scales",
    "unpack_levels",
]

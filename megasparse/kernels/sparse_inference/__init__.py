"""Linear layers of inference whose weights are kept packed: y = x W^T + b on CPUs, without gradients.

    weight = compress(weight_OI)                               # float32 or bfloat16, with zeros in it
    weight = compress(weight_OI, scales_O=scales_O)            # int8, symmetric, a scale for each output
    y = compressed_linear(x, weight, bias)

``compressed`` holds the layouts, ``choice`` says which of them fits a matrix; the kernels are in ``cpu``, and what they
compute in ``reference``.
"""

from megasparse.kernels.sparse_inference.choice import BREAK_EVEN, Choice, choose
from megasparse.kernels.sparse_inference.compressed import (
    BLOCK_SIZES,
    KINDS,
    CompressedWeight,
    compress,
    decompress,
)
from megasparse.kernels.sparse_inference.cpu import compressed_linear, why_not

__all__ = [
    "BLOCK_SIZES",
    "BREAK_EVEN",
    "KINDS",
    "Choice",
    "CompressedWeight",
    "choose",
    "compress",
    "compressed_linear",
    "decompress",
    "why_not",
]

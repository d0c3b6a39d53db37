"""Products of 2:4 sparse matrices on sparse tensor cores, by torch's ``SparseSemiStructuredTensor``.

Imported when it is first used, as its form may change between versions of torch. It has never run here, for want of
such a device: only that it can be imported, and that a machine without one is refused, is tested.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16)
MULTIPLE = 64
"""Of all three sizes of a product: what cuSPARSELt and CUTLASS both take in 16 bits."""


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the products cannot run; None where they can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"sparse tensor cores are NVIDIA's, and the device is {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if dtype not in DTYPES:
        return f"dtype {dtype}; supported: {', '.join(map(str, DTYPES))}"
    try:
        from torch.sparse import to_sparse_semi_structured  # noqa: F401
    except ImportError as error:
        return f"this torch has no SparseSemiStructuredTensor: {error}"
    return None


def product(pruned_NI: Tensor, weight_IO: Tensor) -> Tensor:
    """pruned weight, [N, O]. Raises ValueError for sizes that are not multiples of `MULTIPLE`."""
    from torch.sparse import to_sparse_semi_structured

    sizes = *pruned_NI.shape, weight_IO.shape[1]
    if any(size % MULTIPLE for size in sizes):
        raise ValueError(
            f"activation_sparsity.kernel: semi_structured cannot multiply {sizes[0]} x {sizes[1]} by {sizes[1]} x "
            f"{sizes[2]}; tokens and widths of each rank must be multiples of {MULTIPLE}"
        )
    return torch.mm(to_sparse_semi_structured(pruned_NI), weight_IO)

"""The products of a dense linear layer, by torch's own operators or by oneDNN's, whichever is faster.

    y = dense_linear(x, weight, bias, kernel=choose("auto", "cpu", x.dtype, tokens, (in_features, out_features)))

On CPUs torch hands float32 products to MKL, which takes AVX2 on processors that are not Intel's, also where they have
AVX-512; oneDNN, which torch carries too, looks at what there is. Products of bfloat16 are oneDNN's anyway; those named
so give it operands that it multiplies faster (``pieces``). `auto` takes them where that was measured to be faster on
this machine (``table``); a traced program (``torch.compile``) always has torch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megasparse.kernels.dense_products import onednn
from megasparse.kernels.dense_products.table import fastest

KERNELS = ("auto", "torch", "onednn")


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, kernel: str) -> Tensor:
    """x W^T + b, [..., out], of x [..., in], weight [out, in] and bias [out] or None. kernel: `torch` or `onednn`."""
    if kernel != "onednn" or torch.compiler.is_compiling() or onednn.why_not(x.device.type, x.dtype) is not None:
        return F.linear(x, weight, bias)
    y_NO = onednn.linear(x.reshape(-1, weight.shape[1]), weight, bias)
    return y_NO.view(*x.shape[:-1], weight.shape[0])


def choose(kernel: str, device: str, dtype: torch.dtype, tokens: int, widths: tuple[int, int]) -> str:
    """What `kernel`, a name from KERNELS, stands for in a layer: `torch` or `onednn`. widths: (in, out).

    A kernel that cannot run gives way to `torch`; whoever makes a plan asks ``onednn.why_not`` first.
    """
    if kernel == "torch" or onednn.why_not(device, dtype) is not None:
        return "torch"
    return kernel if kernel == "onednn" else fastest(device, dtype, tokens, widths)

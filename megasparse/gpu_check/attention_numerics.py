"""The attention patterns, forward and backward, against float64.

float32: within 1e-4. A score of up to 30 in units of log2 makes a probability wrong by 2e-6, and a gradient sums up
about ten such magnitudes; TF32, or a key too few, would be off by 1e-3. bfloat16 and float16: probabilities and their
gradients are rounded to the dtype between two products, as in every attention kernel; an error may be three times that
of torch's own attention with a mask in the same dtype, or four roundings of the largest value, or 1e-4, where torch
happens to be better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megasparse.kernels.hybrid_attention import hybrid_attention
from megasparse.utils.dtypes import dtype_name

# (tokens, stride, head dimension, query heads, key-value heads, documents, offsets): far keys row by row and as tiles
# of their own, one token, odd counts, strides and head dimensions.
SITUATIONS = (
    (515, 128, 64, 4, 4, False, False),
    (1155, 32, 64, 2, 2, False, False),
    (277, 20, 80, 4, 2, True, True),
    (300, 128, 128, 2, 1, False, False),
    (1, 16, 64, 2, 2, False, False),
)
EXACT = 1e-4
SEED = 12
OUTPUTS = ("y", "dq", "dk", "dv")


@dataclass(frozen=True)
class AttentionCase:
    """One pattern at one shape and dtype."""

    pattern: str
    dtype: torch.dtype
    tokens: int
    stride: int
    head_dim: int
    heads: int
    groups: int
    documents: bool
    offsets: bool

    name = "attention"

    @property
    def settings(self) -> dict[str, Any]:
        words = {"pattern": self.pattern, "dtype": dtype_name(self.dtype), "tokens": self.tokens}
        words |= {"stride": self.stride, "head_dim": self.head_dim, "heads": self.heads, "groups": self.groups}
        return words | {"documents": self.documents, "offsets": self.offsets}

    @property
    def variant(self) -> str:
        return f"{self.pattern}, {dtype_name(self.dtype)}, heads of {self.head_dim}"

    def launch(self, device: str) -> dict[str, Tensor]:
        return self._results(self._inputs(device), "triton")

    def compare(self, device: str) -> dict[str, float]:
        inputs = self._inputs(device)
        got, again = (self._results(inputs, "triton") for _ in range(2))
        expected = self._results([x.double() for x in inputs], "reference")
        plain = got if self.dtype == torch.float32 else self._results(inputs, "reference")
        worst = max(self._excess(got[name], expected[name], plain[name]) for name in OUTPUTS)
        differing = sum(float((got[name] != again[name]).sum()) for name in OUTPUTS)
        return {"error_over_bound": worst, "unequal_bits": differing}

    def _excess(self, got: Tensor, expected: Tensor, plain: Tensor) -> float:
        error = (got.double() - expected).abs()
        if bool(error.isnan().any()):
            # The larger of a number and NaN would depend on their order.
            return float("inf")
        if self.dtype == torch.float32:
            return float((error / (EXACT * (1 + expected.abs()))).max())
        theirs = float((plain.double() - expected).abs().max())
        rounding = torch.finfo(self.dtype).eps / 2
        return float(error.max()) / max(3 * theirs, 4 * rounding * float(expected.abs().max()), EXACT)

    def _inputs(self, device: str) -> list[Tensor]:
        """q, k, v and dy, with the strides that the layer makes: heads of a token lie together."""
        torch.manual_seed(SEED)
        counts = self.heads, self.groups, self.groups, self.heads
        shapes = [(2, self.tokens, count, self.head_dim) for count in counts]
        return [torch.randn(shape, device=device).to(self.dtype).transpose(1, 2) for shape in shapes]

    def _results(self, inputs: list[Tensor], kernel: str) -> dict[str, Tensor]:
        q, k, v, dy = (tensor.detach() for tensor in inputs)
        leaves = [leaf.requires_grad_() for leaf in (q, k, v)]
        numbers = (torch.arange(self.tokens, device=dy.device) // 41).expand(2, -1) if self.documents else None
        offsets = [(7 * head) % self.stride for head in range(self.heads)] if self.offsets else 0
        y = hybrid_attention(q, k, v, self.pattern, self.stride, kernel, numbers, offsets=offsets)
        return dict(zip(OUTPUTS, (y.detach(), *torch.autograd.grad(y, leaves, dy)), strict=True))


def cases(rehearse: bool) -> list[AttentionCase]:
    if rehearse:
        return [
            AttentionCase("sparse", torch.float32, 9, 4, 16, 2, 1, True, True),
            AttentionCase("fixed", torch.float32, 11, 8, 16, 1, 1, False, False),
        ]
    return [
        AttentionCase(pattern, dtype, *situation)
        for situation in SITUATIONS
        for dtype in (torch.bfloat16, torch.float32, torch.float16)
        for pattern in ("sparse", "local", "strided", "fixed", "full")
    ]

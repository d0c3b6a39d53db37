"""Break-even lengths: from how many tokens on a kernel is faster than a boolean mask, and than dense attention.

``mask_limit``, ``dense_limit`` and ``computes_full_faster`` look a pattern up in the tables of ``common.tables``, the
user's own of which a run's first start and ``tools/tune_kernels.py --attention`` write. Their rows are

    {"kernel": "tiled", "dtype": "float32", "pattern": "sparse", "stride": 128, "head_dim": 64, "heads": 4,
     "seconds": {"512": {"kernel": 0.006, "mask": 0.011, "dense": 0.007}, ...}}

Seconds are those of a forward and backward pass at so many tokens. A row of the same kernel, pattern and dtype fits;
stride and head dimension say how near it is. The break-even length is the smallest measured one from which on the
kernel is never slower; where it is slower at the longest one, it is taken beyond that, since its work grows slower.
Under `full` all kernels have the same work, and the nearest measured length decides.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megasparse.kernels.common.compiling import constant_when_compiled
from megasparse.kernels.common.tables import BreakEvenTable, distance
from megasparse.utils.dtypes import dtype_name

SHORTEST_FULL = 128
"""Tokens from which the pattern `full` may run on another kernel than torch's; shorter ones gain little."""
UNMEASURED = {("cpu", "cpu"): 128, ("tiled", "cpu"): 512, ("triton", "cuda"): 0}
"""Tokens from which a kernel is taken on a device type where no row fits; never on others. Those of `cpu` and `tiled`
were measured (benchmarks/hybrid_attention.py); `triton` is taken because it needs no T x T mask."""


@dataclass(frozen=True)
class Row:
    """One pattern on one kernel. Fields are named as in the file."""

    kernel: str
    dtype: str
    pattern: str
    stride: int
    head_dim: int
    heads: int
    seconds: dict[str, dict[str, float]]
    """By tokens: of the kernel, of the boolean `mask`, and of `dense` causal attention."""
    host_seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same of the host, which hands the work out; empty where the host does it itself."""

    @property
    def kind(self) -> tuple[str, ...]:
        return self.kernel, self.pattern, self.dtype

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.stride, self.head_dim

    @property
    def case(self) -> tuple[str | int, ...]:
        return *self.kind, *self.sizes, self.heads

    @property
    def lengths(self) -> list[int]:
        return sorted(map(int, self.seconds))

    def limit(self, other: str) -> int | None:
        """Tokens from which the kernel is no slower than `other`, `mask` or `dense`; None: at all measured lengths."""
        following = [*self.lengths[1:], self.lengths[-1] + 1]
        for tokens, longer in reversed(list(zip(self.lengths, following, strict=True))):
            if self.seconds[str(tokens)]["kernel"] > self.seconds[str(tokens)][other]:
                return longer
        return None


# The compiler takes what these two return as a constant: files and caches are nothing that it could trace.
@constant_when_compiled
def mask_limit(kernel: str, pattern: str, stride: int, device: str, dtype: torch.dtype, head_dim: int) -> int:
    """Tokens from which `kernel` is no slower than attention with a boolean mask.

    A kernel that is faster at all measured lengths is taken from the shortest of them on.
    """
    row = _nearest(kernel, pattern, stride, device, dtype, head_dim)
    if row is None:
        return UNMEASURED.get((kernel, device), sys.maxsize)
    limit = row.limit("mask")
    return row.lengths[0] if limit is None else limit


@constant_when_compiled
def dense_limit(kernel: str, pattern: str, stride: int, device: str, dtype: torch.dtype, head_dim: int) -> int:
    """Tokens below which dense causal attention was measured to be faster than `kernel`; 0: nowhere."""
    row = _nearest(kernel, pattern, stride, device, dtype, head_dim)
    return 0 if row is None else row.limit("dense") or 0


@constant_when_compiled
def computes_full_faster(kernel: str, device: str, dtype: torch.dtype, head_dim: int, seq_length: int) -> bool:
    """Whether `kernel` was measured to compute the pattern `full` faster than torch's causal kernel.

    The nearest measured number of tokens decides; where nobody measured it is not faster.
    """
    row = TABLE.nearest(device, (kernel, "full", dtype_name(dtype)), (None, head_dim))
    if row is None or seq_length < SHORTEST_FULL:
        return False
    times = row.seconds[str(min(row.lengths, key=lambda length: distance(length, seq_length)))]
    return times["kernel"] < times["dense"]


def _nearest(kernel: str, pattern: str, stride: int, device: str, dtype: torch.dtype, head_dim: int) -> Row | None:
    return TABLE.nearest(device, (kernel, pattern, dtype_name(dtype)), (stride, head_dim))


def _row(entry: dict[str, Any]) -> Row:
    seconds, host = (
        {
            str(int(tokens)): {name: float(times[name]) for name in ("kernel", "mask", "dense")}
            for tokens, times in by_tokens.items()
        }
        for by_tokens in (entry["seconds"], entry.get("host_seconds", {}))
    )
    if not seconds:
        raise ValueError("seconds: empty; must be times by number of tokens")
    kernel, dtype, pattern = (str(entry[name]) for name in ("kernel", "dtype", "pattern"))
    stride, head_dim, heads = (int(entry[name]) for name in ("stride", "head_dim", "heads"))
    return Row(kernel, dtype, pattern, stride, head_dim, heads, seconds, host)


SHIPPED = Path(__file__).with_name("break_even.json")
TABLE = BreakEvenTable("attention_break_even.json", "megasparse-attention-break-even-1", SHIPPED, _row)

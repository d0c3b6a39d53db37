"""Which dense product is faster in a layer on this machine, by measurement: rows of ``common.tables``

    {"dtype": "float32", "tokens": 1024, "in": 768, "out": 3072, "seconds": {"torch": 0.07, "onednn": 0.03},
     "counts_for": [2048, 768, 3072]}

of forward and backward pass together. They are written by the first start of a run; none is shipped, since what is
faster on one processor says nothing about another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megasparse.kernels.common.medians import medians, training_pass
from megasparse.kernels.common.tables import BreakEvenTable
from megasparse.kernels.dense_products import onednn
from megasparse.utils.dtypes import dtype_name

PRODUCTS: dict[str, Callable[..., torch.Tensor]] = {"torch": F.linear, "onednn": onednn.linear}
FARTHEST = 8
"""So many times more or fewer tokens than were measured, a row does not count: a product of few of them is limited by
reading the weight, which is another matter."""


@dataclass(frozen=True)
class Row:
    """One layer, forward and backward. Fields are named as in the file but for the widths."""

    dtype: str
    tokens: int
    in_features: int
    out_features: int
    seconds: dict[str, float]
    """By product."""
    counts_for: tuple[int, ...] = ()
    """(tokens, in, out) in place of the measured ones where the row is looked up; empty: those that were measured."""

    @property
    def kind(self) -> tuple[str, ...]:
        return (self.dtype,)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.counts_for or (self.tokens, self.in_features, self.out_features)

    @property
    def case(self) -> tuple[str | int, ...]:
        return *self.kind, *self.sizes

    @property
    def fastest(self) -> str:
        return min(self.seconds, key=self.seconds.__getitem__)


def fastest(device: str, dtype: torch.dtype, tokens: int, widths: tuple[int, int]) -> str:
    """`torch` where nothing near was measured on this machine. widths: (in, out)."""
    row = TABLE.nearest(device, (dtype_name(dtype),), (tokens, *widths))
    if row is None or not 1 / FARTHEST <= row.sizes[0] / max(tokens, 1) <= FARTHEST:
        return "torch"
    return row.fastest


def measure_row(dtype: torch.dtype, *, tokens: int, widths: tuple[int, int], rounds: int = 3) -> Row:
    """Seconds of the fastest of the rounds, in which the products take turns. widths: (in, out)."""
    inner, outer = widths
    x, weight, dy = (torch.randn(*shape, dtype=dtype) for shape in ((tokens, inner), (outer, inner), (tokens, outer)))
    passes = [training_pass(function, (x, weight), dy) for function in PRODUCTS.values()]
    found = medians(passes, "cpu", rounds, fastest=True)
    seconds = {name: round(value.device, 7) for name, value in zip(PRODUCTS, found, strict=True)}
    return Row(dtype_name(dtype), tokens, inner, outer, seconds)


def _row(entry: dict[str, Any]) -> Row:
    seconds = {str(name): float(value) for name, value in entry["seconds"].items()}
    if unknown := seconds.keys() ^ PRODUCTS.keys():
        raise ValueError(f"seconds: {', '.join(sorted(unknown))}; must be {' and '.join(PRODUCTS)}")
    tokens, inner, outer = (int(entry[name]) for name in ("tokens", "in", "out"))
    stands_for = tuple(int(size) for size in entry.get("counts_for", ()))
    if len(stands_for) not in (0, 3):
        raise ValueError(f"counts_for: {list(stands_for)} has {len(stands_for)} entries; must be tokens, in and out")
    return Row(str(entry["dtype"]), tokens, inner, outer, seconds, stands_for)


TABLE = BreakEvenTable(
    "dense_products.json", "megasparse-dense-products-1", Path(__file__).with_name("dense_products.json"), _row
)

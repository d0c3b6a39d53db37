"""Section `numerics`: every kernel against float64, twice with equal bits; an exception counts as wrong.

Products: `product_numerics.py`. Attention: `attention_numerics.py`. What lies between: `elementwise_numerics.py`. What
the kernels need that is launched, without the comparison, is also what `compiling` compiles ahead.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch

from megasparse.gpu_check import attention_numerics, elementwise_numerics, large_numerics, product_numerics
from megasparse.gpu_check.context import Context

LAST_WORDS = 400
"""Characters of an error that are kept."""


class Case(Protocol):
    """One comparison."""

    name: str

    @property
    def settings(self) -> dict[str, Any]: ...

    @property
    def variant(self) -> str:
        """Cases of one variant need the same compiled kernels, or nearly so."""
        ...

    def launch(self, device: str) -> Any:
        """Run the kernels and nothing else."""
        ...

    def compare(self, device: str) -> dict[str, float]:
        """`error_over_bound`, at most 1 where right, and `unequal_bits` of a second run, 0 where right."""
        ...


def run(context: Context) -> None:
    # Attention and products take turns, so that a check that runs out of time has seen some of both.
    for case in context.in_time(cases(context.rehearse), "numerics"):
        compare(context, case.name, case.settings, partial(case.compare, context.device))
    if context.left > 0.1 * context.seconds:
        large_numerics.run(context, compare)


def cases(rehearse: bool) -> list[Case]:
    """All comparisons at ordinary sizes."""
    kinds = (product_numerics, attention_numerics, elementwise_numerics)
    placed: list[tuple[float, int, Case]] = []
    for number, kind in enumerate(kinds):
        found: list[Case] = list(kind.cases(rehearse))
        # By their relative places in their lists.
        placed += [(place / len(found), number, case) for place, case in enumerate(found)]
    return [case for *_, case in sorted(placed, key=lambda each: each[:2])]


def compare(context: Context, name: str, settings: dict[str, Any], work: Callable[[], dict[str, float]]) -> None:
    """A row with what `work` found: right where the error is within its bound and both runs have equal bits."""
    try:
        numbers = work()
    except Exception as error:
        traceback.print_exc()
        context.row(name, settings, right=False, note=f"{type(error).__name__}: {error}"[:LAST_WORDS])
        if not context.rehearse:
            # After an illegal access nothing can run in this process any more: this raises, and the section ends.
            torch.cuda.synchronize()
        return
    # NaN is not at most 1.
    right = numbers["error_over_bound"] <= 1 and numbers["unequal_bits"] == 0
    context.row(name, settings, numbers, right=right)

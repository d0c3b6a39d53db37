"""Marks for ``torch.compile``, without its import: that of ``torch._dynamo`` costs a start of any program 1 s.

Used as a decorator: ``@constant_when_compiled`` for functions that look for files, which cannot be traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_when_compiled(function: Function) -> Function:
    """The same function, whose result is a constant of a traced program: ``torch.compiler.assume_constant_result``.

    That decorator sets the same attribute, after the import; tests/kernels/test_hybrid_attention_compile.py traces
    through functions marked so.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function

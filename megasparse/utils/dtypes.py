"""Names of dtypes, as tables and files spell them."""

from __future__ import annotations

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """Such as `float32`."""
    return str(dtype).removeprefix("torch.")

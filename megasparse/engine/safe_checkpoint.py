"""DeepSpeed's checkpoint files, read without running code from them.

DeepSpeed loads its ``.pt`` files with full pickle. ``SafeCheckpointEngine`` wraps its engine and reads with
``weights_only=True``, letting through, besides tensors and plain containers, a short list of DeepSpeed's own records.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.universal_checkpoint import SubparamShape
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

ALLOWED = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, SubparamShape]


class SafeCheckpointEngine:
    """Everything but ``load`` is the wrapped engine's."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Raises ValueError for a file that holds anything but data."""
        return load_data(path, map_location=map_location)


def load_data(path: str | Path, *, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """The content of a ``.pt`` file. Raises ValueError for a file that holds anything but data.

    mmap: tensors are read from the file only where they are used.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a readable checkpoint file: {error}") from error

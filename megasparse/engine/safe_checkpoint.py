"""DeepSpeed's checkpoint files, read without running code from them.

DeepSpeed loads its ``.pt`` files with full pickle. ``SafeCheckpointEngine`` wraps its engine and reads with
``weights_only=True``, letting through, besides tensors and plain containers, a short list of DeepSpeed's own records.
Members of enumerations are written as their values: until Python 3.11.3 they are pickled as a call of ``getattr``,
which no reader can let through.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.universal_checkpoint import SubparamShape
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

ALLOWED = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, SubparamShape]


class SafeCheckpointEngine:
    """Everything but ``load`` and what ``save`` is given is the wrapped engine's."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def save(self, state_dict: dict[str, Any], path: str) -> Any:
        return self._wrapped.save(without_enumerations(state_dict), path)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Raises ValueError for a file that holds anything but data."""
        return load_data(path, map_location=map_location)


def without_enumerations(state: Any) -> Any:
    """The same dictionaries and lists with values in place of members of enumerations; new ones only where needed."""
    if isinstance(state, Enum):
        return state.value
    if isinstance(state, dict):
        changed = {key: without_enumerations(value) for key, value in state.items()}
        return state if all(changed[key] is value for key, value in state.items()) else changed
    if isinstance(state, list):
        items = [without_enumerations(value) for value in state]
        return state if all(new is old for new, old in zip(items, state, strict=True)) else items
    return state


def load_data(path: str | Path, *, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """The content of a ``.pt`` file. Raises ValueError for a file that holds anything but data.

    mmap: tensors are read from the file only where they are used.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a readable checkpoint file: {error}") from error

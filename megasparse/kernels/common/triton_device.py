"""Where Triton kernels can run, and how they are launched: shared by the families of kernels.

Triton runs on CUDA devices from compute capability 8.0 and on ROCm. With TRITON_INTERPRET=1 in the environment the same
kernels run on CPU tensors, slowly, for tests: float32 only, as the interpreter's bfloat16 products are wrong.
"""

from __future__ import annotations

import importlib
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)


def wrong_type(device: str, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on a device type with a dtype, as far as the names tell; None where they can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted and device != "cpu":
        return f"with TRITON_INTERPRET=1 they run on cpu only, not on {device}"
    if not interpreted and device != "cuda":
        return f"they run on cuda, not on {device} (there for tests only, slowly, with TRITON_INTERPRET=1)"
    dtypes = DTYPES[:1] if interpreted else DTYPES
    if dtype not in dtypes:
        return f"dtype {dtype}; supported: {', '.join(map(str, dtypes))}"
    return None


@cache
def unsuited_device() -> str | None:
    """Why the GPU at hand cannot run them."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}; 8.0 or higher is needed"
    return None


@cache
def missing_triton() -> str | None:
    """Why Triton cannot be used."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton"
    return None


def precision(dtype: torch.dtype) -> str:
    """How float32 products are made: exactly, unless torch may use TF32 for its own."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def current(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`, as the sides of tiles are."""
    return 1 << max(number - 1, 0).bit_length()

"""Host memory of a process that trains on a CPU: how the system gives it, and when it goes back.

keep_host_memory(os.environ)         # before torch allocates anything
return_memory(device)                # where much was freed that is not needed again
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Mapping, MutableMapping

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's ``mallopt`` (malloc.h)."""

MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
"""With these a user tells glibc when freed memory goes back to the system; so does GLIBC_TUNABLES."""


def keep_host_memory(variables: MutableMapping[str, str]) -> None:
    """Huge pages, and freed memory kept: for programs whose steps free and take the same large tensors each time."""
    use_huge_pages(variables)
    keep_freed_memory(variables)


def use_huge_pages(variables: MutableMapping[str, str]) -> None:
    """Let torch ask the system for pages of 2 MiB for large tensors in host memory, unless the user has decided.

    The system fills a page with zeros when it is first touched, and large tensors have fresh ones every time: writing
    200 MiB took 76 ms of CPU time in pages of 4 KiB, 12 in those of 2 MiB, and 7 in memory that was there (AMD EPYC,
    Zen 5). To read 400 MB took 0.77 of the time on a Xeon, though decoding did not gain visibly. torch looks when it
    first allocates memory for a tensor, not when it is imported. Where the system has no such pages, nothing changes.
    """
    variables.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory(variables: Mapping[str, str]) -> bool:
    """Let glibc keep what tensors free, for those that come after them. False: the user has decided, or the C library
    is another one.

    Otherwise freed tensors above 32 MiB, and whatever lies last in memory, go back to the system, which fills the pages
    with zeros when the next step wants them. Without that a step of GPT-2-small width in bf16 took 0.75 of its time
    dense and 0.81 sparse (Xeon with AMX, two threads; benchmarks/results), with 8 % more memory at the peak: what is
    kept is in pieces, as in every allocator that keeps.
    """
    if any(name in variables for name in MALLOC_VARIABLES) or "glibc.malloc" in variables.get("GLIBC_TUNABLES", ""):
        return False
    change = _of_the_c_library("mallopt")
    return change is not None and all([change(M_MMAP_MAX, 0), change(M_TRIM_THRESHOLD, -1)])


def return_memory(device: torch.device) -> None:
    """Free what nothing holds any more but itself, such as a closed engine, and give the pages back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = _of_the_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def _of_the_c_library(name: str) -> Callable[..., int] | None:
    """A function that glibc has, and others (musl, those of macOS and Windows) have not."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None

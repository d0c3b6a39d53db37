"""Section `compiling`: compiles what later sections launch, in many processes at once, into Triton's cache on disk.

Each process runs some cases of those sections and throws their results away: what is compiled is then exactly what they
will ask for, in any version of Triton. In the interpreter there is nothing to compile; a rehearsal runs a few cases.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from typing import Any

from megasparse.gpu_check import attention, numerics, products
from megasparse.gpu_check.context import Context

PROCESSES = 16
"""At most: each holds half a gigabyte of the device."""

Launches = dict[str, list[Callable[[], Any]]]


def run(context: Context) -> None:
    groups = launches(context)
    workers = min(PROCESSES, os.cpu_count() or 1, len(groups)) if not context.rehearse else 2
    started = time.monotonic()
    # The interpreter's results and CUDA's state live and die with the workers: this process touches neither.
    forked = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=forked) as pool:
        pending = {pool.submit(_run_group, context, name): name for name in groups}
        for done in as_completed(pending):
            name, error = pending[done], done.exception()
            seconds = None if error else done.result()
            note = f"{type(error).__name__}: {error}"[: numerics.LAST_WORDS] if error else ""
            context.row("variant", {"variant": name}, {"seconds": seconds}, note=note)
    context.row("all", {"processes": workers, "variants": len(groups)}, {"seconds": time.monotonic() - started})


def launches(context: Context) -> Launches:
    """What later sections launch, by variant."""
    groups: Launches = {}
    for case in numerics.cases(context.rehearse):
        groups.setdefault(f"{case.name}: {case.variant}", []).append(partial(case.launch, context.device))
    for name, launch in [*products.launches(context), *attention.launches(context)]:
        groups.setdefault(name, []).append(launch)
    if context.rehearse:
        few = [name for name in groups if name.startswith("product")][:2]
        return {name: groups[name][:1] for name in few}
    return groups


def _run_group(context: Context, name: str) -> float:
    """Seconds of all launches of a variant, in a worker."""
    started = time.monotonic()
    for launch in launches(context)[name]:
        launch()
    if not context.rehearse:
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return time.monotonic() - started

"""What tools/tune_kernels.py does: measures the layers of models on this machine, and keeps what it found.

todo, notes = cases("cpu", ["fp32"], [64], [2048], [(768, 3072)])
store(TABLE.own(), measure_all(todo, "cpu", rounds=3, command="..."))
measure_attention("cpu", ["fp32"], [128], [64], rounds=3, command="...")
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megasparse import kernels
from megasparse.cost.layer_kernels import DTYPES
from megasparse.kernels import block_sparse
from megasparse.kernels.block_sparse.break_even import TABLE, Row
from megasparse.kernels.block_sparse.measure import DENSITIES, efficiency, host_seconds, measure_row, speedup
from megasparse.kernels.block_sparse.tuning import tune_layer
from megasparse.kernels.common.tables import BreakEvenTable, Measurement, merged, this_machine
from megasparse.kernels.hybrid_attention import fast_kernel
from megasparse.kernels.hybrid_attention.break_even import Row as AttentionRow
from megasparse.kernels.hybrid_attention.measure import measure_rows
from megasparse.monitoring.console import print_table
from megasparse.utils.dtypes import dtype_name
from megasparse.utils.hardware import package_versions

LOCK_SECONDS = 30
"""Writing takes milliseconds."""


@dataclass(frozen=True)
class Case:
    """One row to measure."""

    backend: str
    dtype: torch.dtype
    block: int
    tokens: int
    widths: tuple[int, int]

    def __str__(self) -> str:
        return (
            f"{self.widths[0]} -> {self.widths[1]}, blocks of {self.block}, {self.tokens:,} tokens, "
            f"{dtype_name(self.dtype)}, {self.backend}"
        )


def cases(
    device: str, precisions: Sequence[str], blocks: Sequence[int], tokens: Sequence[int], shapes: Sequence[tuple]
) -> tuple[list[Case], list[str]]:
    """What can be measured on the device, and sentences about what cannot."""
    found, notes = [], []
    for precision, block in product(precisions, blocks):
        backend, reason = block_sparse.explain(device, DTYPES[precision], block)
        if backend is None:
            notes.append(f"{precision}, blocks of {block}: {reason}")
            continue
        for widths, rows in product(dict.fromkeys(shapes), tokens):
            if any(width % block for width in widths):
                notes.append(f"{widths[0]} x {widths[1]}: blocks of {block} do not fit")
            else:
                found.append(Case(backend, DTYPES[precision], block, rows, widths))
    return found, list(dict.fromkeys(notes))


def measure_all(todo: Sequence[Case], device: str, rounds: int, command: str) -> Measurement:
    """All rows, with a bar on standard error where that is a terminal."""
    rows = []
    for case in with_bar(todo):
        # The Triton kernels find their tiles for a layer first.
        for density in DENSITIES if device == "cuda" else ():
            tune_layer(device, case.dtype, case.block, case.tokens, case.widths, density)
        shape: dict[str, Any] = {"block": case.block, "tokens": case.tokens, "widths": case.widths}
        rows.append(measure_row(case.backend, device, case.dtype, densities=DENSITIES, rounds=rounds, **shape))
    return as_measurement(rows, device, command)


def measure_attention(
    device: str,
    precisions: Sequence[str],
    strides: Sequence[int],
    head_dims: Sequence[int],
    *,
    lengths: Sequence[int],
    rounds: int,
    command: str,
) -> Measurement:
    """The attention patterns against a boolean mask and dense attention."""
    rows: list[AttentionRow] = []
    for precision, stride, head_dim in with_bar(list(product(precisions, strides, head_dims))):
        options = {"stride": stride, "head_dim": head_dim, "lengths": lengths, "rounds": rounds}
        fastest = fast_kernel(device, DTYPES[precision], head_dim)
        # On CPUs `tiled` too, for where there is no compiler.
        for kernel in dict.fromkeys([fastest, "tiled"] if device == "cpu" else [fastest]):
            rows += measure_rows(kernel, device, DTYPES[precision], **options)
    return as_measurement(rows, device, command)


def as_measurement(rows: Sequence[Row | AttentionRow], device: str, command: str) -> Measurement:
    """Rows with the facts about this machine."""
    machine = this_machine(device)
    packages = ("megasparse", "torch", "triton") if device == "cuda" else ("megasparse", "torch")
    return Measurement(
        hardware=machine.hardware,
        model=machine.model,
        device=device,
        threads=machine.threads,
        rows=tuple(rows),
        versions=package_versions(packages) | code_versions(),
        command=command,
        date=datetime.date.today().isoformat(),
    )


def code_versions() -> dict[str, str]:
    """What decides about times besides the machine: torch, and a digest of the sources of the kernels."""
    return {"torch": package_versions(("torch",))["torch"], "kernels": _sources_digest()}


@cache
def _sources_digest() -> str:
    folder, state = Path(kernels.__file__).parent, hashlib.sha256()
    for path in sorted(path for form in ("*.cpp", "*.h", "triton_*.py") for path in folder.rglob(form)):
        state.update(path.read_bytes())
    return state.hexdigest()[:16]


def store(path: Path, measurement: Measurement, table: BreakEvenTable = TABLE) -> None:
    """Add to the file, in place of what it holds of the same cases. A file that is no table is a ValueError.

    table: of such files. Writers wait for each other, or one would lose what another adds.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with FileLock(path.with_suffix(".lock"), timeout=LOCK_SECONDS):
        known = table.read(path) if path.exists() else ()
        table.write(path, merged(known, measurement))


def print_attention_rows(rows: Sequence[AttentionRow], console: Console) -> None:
    """Speed-up over dense attention at the longest length, and the break-even lengths."""
    table = []
    for row in rows:
        longest = row.seconds[str(row.lengths[-1])]
        limits = {other: row.limit(other) for other in ("mask", "dense")}
        names = ("kernel", "pattern", "stride", "head_dim", "dtype")
        cells = {name.replace("_", " "): str(getattr(row, name)) for name in names}
        cells["longest"] = f"{row.lengths[-1]:,}"
        cells |= {f"x {other}": f"{longest[other] / longest['kernel']:.2f}" for other in ("dense", "mask")}
        cells |= {f"beats {o}": "always" if limit is None else f"from {limit:,}" for o, limit in limits.items()}
        table.append(cells)
    print_table(table, console)


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Speed-up and efficiency at density 0.1, the break-even density, and how long the host takes to hand it out."""

    def host(row: Row) -> dict[str, str]:
        seconds = host_seconds(row, 0.1)
        return {} if seconds is None else {"host ms at 0.1": f"{1e3 * seconds:.2f}"}

    table = [
        {
            "layer": f"{row.in_features} -> {row.out_features}",
            "block": str(row.block),
            "tokens": f"{row.tokens:,}",
            "dtype": row.dtype,
            "kernel": row.backend,
            "dense ms": f"{1e3 * row.dense_seconds:.2f}",
            "x at 0.1": f"{speedup(row, 0.1):.2f}",
            "e at 0.1": f"{efficiency(row, 0.1):.2f}",
            "break-even": f"{row.break_even:.2f}",
            **host(row),
        }
        for row in rows
    ]
    print_table(table, console)


def with_bar(todo: Sequence[Any], *, shown: bool = True) -> Generator[Any, None, None]:
    """Each of them, with a bar on standard error where that is a terminal."""
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("", total=len(todo))
        for case in todo:
            bar.update(task, description=str(case))
            yield case
            bar.advance(task)

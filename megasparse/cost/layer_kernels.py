"""Which kernel computes each sparse layer of a run: for the plan, the ledger and the log.

    kernels = LayerKernels(config, model, "cpu")
    kernels.choice("layers.0.mlp.up", density=0.1)       # "cpu"

``prepare_kernels`` builds what the plan wants to use, before any process group starts. The layers decide for themselves
in the same way (``dispatch.choose``), from the active blocks of their own tensor-parallel shard.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.kernels import block_sparse
from megasparse.kernels.block_sparse.break_even import TABLE, measured
from megasparse.launching import choose_accelerator
from megasparse.models.gpt import GPT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LayerShape:
    """What the choice depends on, besides the density."""

    block_size: int
    tokens: int
    """Rows of the input: sequence-parallel ranks put their shares together before the product."""
    widths: tuple[int, int]
    """(in, out) of a tensor-parallel rank's shard."""


class LayerKernels:
    """Choices for the sparse layers of `model` (rank 0's shard; meta device will do).

    device: type of the device that trains. planned: nothing is compiled, and the device need not be there.
    Raises ConfigError where a forced kernel cannot run.
    """

    def __init__(self, config: RunConfig, model: GPT, device: str, *, planned: bool = False) -> None:
        self.kernel, self.forced_limit = config.kernels.block_sparse, config.kernels.break_even
        self.device, self.dtype, self.planned = device, DTYPES[config.train.precision], planned
        tokens = config.train.micro_batch_size * config.model.seq_length
        # The head sees a chunk of the tokens at a time.
        rows = {model.head.name: model.head_in_chunks.chunk_rows(tokens, self.dtype)}
        self.shapes = {
            name: LayerShape(
                layer.block_size, rows.get(name, tokens), cast(tuple[int, int], layer.partition.local_shape[::-1])
            )
            for name, layer in model.sparse_layers().items()
        }
        self._chosen: dict[tuple[LayerShape, float], str] = {}
        for block_size in {shape.block_size for shape in self.shapes.values()}:
            check_kernel(self.kernel, device, self.dtype, block_size, planned=planned)

    def choice(self, name: str, density: float) -> str:
        """The backend of a layer at a density; a layer whose units are all active is an ordinary one."""
        if density >= 1.0:
            return "dense"
        shape = self.shapes[name]
        if (shape, density) not in self._chosen:
            place = self.kernel, self.device, self.dtype, shape.block_size, shape.tokens, density, shape.widths
            limit, planned = self.forced_limit, self.planned
            self._chosen[shape, density] = block_sparse.choose(*place, break_even=limit, planned=planned)
        return self._chosen[shape, density]

    def executed_density(self, name: str, density: float) -> float:
        """Share of the dense work that is really done."""
        return density if saves_work(self.choice(name, density)) else 1.0

    def break_even(self, name: str) -> float | None:
        """Density above which the layer is dense; None where the kernel is forced, or none saves work."""
        shape = self.shapes[name]
        backend, _ = block_sparse.explain(self.device, self.dtype, shape.block_size, planned=self.planned)
        if self.kernel != "auto" or backend is None:
            return None
        if self.forced_limit is not None:
            return self.forced_limit
        return measured(backend, self.device, self.dtype, shape.block_size, shape.tokens, shape.widths)

    def table(self, densities: Mapping[str, float]) -> list[dict[str, Any]]:
        """One row per distinct kind of layer, at these (lowest) densities."""
        rows: dict[tuple, dict[str, Any]] = {}
        for name, shape in self.shapes.items():
            kind, kernel, limit = layer_kind(name), self.choice(name, densities[name]), self.break_even(name)
            inner, outer = shape.widths
            sizes = {"in": inner, "out": outer, "tokens": shape.tokens, "block_size": shape.block_size}
            choice = {"density": densities[name], "kernel": kernel, "break_even": limit}
            row = rows.setdefault((kind, shape, kernel, limit), {"layer": kind, "count": 0, **sizes, **choice})
            row["count"] += 1
            row["density"] = max(row["density"], densities[name])
        return list(rows.values())

    def warnings(self) -> list[str]:
        """What keeps layers of blocks from a kernel that saves work, one sentence for all; a table that is unreadable.

        Single weights have no kernel and are not spoken of.
        """
        found = [problem] if self.kernel == "auto" and (problem := TABLE.problem()) else []
        reasons: dict[str, list[str]] = {}
        for name, shape in self.shapes.items():
            if self.kernel == "auto" and shape.block_size > 1:
                backend, reason = block_sparse.explain(self.device, self.dtype, shape.block_size, planned=self.planned)
                if backend is None:
                    reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            kinds = ", ".join(dict.fromkeys(map(layer_kind, names)))
            found.append(f"kernels.block_sparse auto saves no work in {kinds}: {reason}")
        return found


def saves_work(backend: str) -> bool:
    """Whether a backend leaves out what is inactive."""
    return backend not in ("dense", "reference")


def running_kernels(model: GPT) -> dict[str, str]:
    """The kernels that compute the sparse layers now, by layer; `dense` before the first forward pass."""
    return {name: layer.backend or "dense" for name, layer in model.sparse_layers().items()}


def check_kernel(kernel: str, device: str, dtype: torch.dtype, block_size: int, *, planned: bool = False) -> None:
    """Raise ConfigError where a kernel that was asked for by name cannot run."""
    try:
        block_sparse.check_forced(kernel, device, dtype, block_size, planned=planned)
    except ValueError as error:
        raise ConfigError(f"kernels.block_sparse: {str(error).removeprefix('block_sparse kernel: ')}") from None


def prepare_kernels(config: RunConfig, plan: Mapping[str, Any]) -> bool:
    """Build the kernels that the plan uses; whether all of them can run. One process builds, its neighbours wait.

    Raises ConfigError where one that was asked for by name cannot.
    """
    device, dtype, ready = plan["kernels"]["device"], DTYPES[config.train.precision], True
    for kernel, block_size in {(row["kernel"], row["block_size"]) for row in plan["kernels"]["block_sparse"]}:
        try:
            check_kernel(kernel, device, dtype, block_size)
        except ConfigError:
            if config.kernels.block_sparse != "auto":
                raise
            ready = False
    return ready


def target_device() -> str:
    """Type of the device that a run started here would train on."""
    return choose_accelerator(dict(os.environ))


def layer_kind(name: str) -> str:
    """`layers.3.attention.qkv` -> `attention.qkv`."""
    parts = name.split(".")
    return ".".join(parts[2:]) if parts[0] == "layers" and len(parts) > 2 else name


def describe_changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Which layers changed their kernel: `12 layers dense -> cpu (attention.qkv, mlp.up)`."""
    changed: dict[tuple[str, str], list[str]] = {}
    for name, kernel in after.items():
        if before[name] != kernel:
            changed.setdefault((before[name], kernel), []).append(name)
    return [
        f"{len(names)} {'layer' if len(names) == 1 else 'layers'} {old} -> {new} "
        f"({', '.join(dict.fromkeys(map(layer_kind, names)))})"
        for (old, new), names in changed.items()
    ]

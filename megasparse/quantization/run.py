"""Quantising a model folder, block by block.

    quantize(QuantizeSettings(model=..., output=..., bits=8, smoothing=0.5, calibration="text.txt"))

Without calibration each weight is read, rounded and written. With it, the calibration windows run through each block as
it was, for SmoothQuant's scales, and through the quantised block, for the error that is shown. Memory holds one block
and one window, but for DiscQuant's rounding, which holds the model.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from megasparse.checkpoint.model_folder import ModelFolderWriter, load_weights
from megasparse.checkpoint.store import CheckpointError
from megasparse.conversion.sources import portable_config
from megasparse.kernels.quantized import QuantizedMatrix, quantized
from megasparse.layers import Linear
from megasparse.layers.quantized import replace_linear_layers
from megasparse.models.gpt import Block
from megasparse.parallel import CommunicationGroup
from megasparse.pruning.calibrated_walk import CalibratedWalk
from megasparse.pruning.model_in_blocks import ModelInBlocks, whole_model
from megasparse.pruning.reporting import Advance, showing_progress
from megasparse.pruning.statistics import InputMaxima, collecting
from megasparse.quantization.discquant import DiscQuantOptions, round_weights
from megasparse.quantization.plan import QuantizePlan, make_plan
from megasparse.quantization.settings import QuantizeSettings
from megasparse.quantization.smoothing import behind_norms, smooth_, smoothing_scales

ALONE = CommunicationGroup()


def quantize(settings: QuantizeSettings, console: Console | None = None) -> None:
    """Write the quantised model folder; it is whole or absent. Raises ValueError for what the user must mend."""
    plan = make_plan(settings)
    rounded = _learned(plan, console) if settings.rounding == "discquant" else {}
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{settings.output.name}.quantizing-"
    with tempfile.TemporaryDirectory(dir=settings.output.parent, prefix=prefix) as work:
        Quantizer(plan, rounded, Path(work), console).run()


def _learned(plan: QuantizePlan, console: Console | None) -> dict[str, QuantizedMatrix]:
    """Levels of all layers by DiscQuant."""
    given = {name: getattr(plan.settings, name) for name in ("steps", "batch", "lr", "strength", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    options = DiscQuantOptions(plan.settings.bits, plan.settings.group_or_default, **given)
    teacher = whole_model(plan.source)
    load_weights(teacher, plan.source)
    assert plan.windows is not None
    with showing_progress(console, options.steps) as advance:
        found = round_weights(
            teacher.to(plan.settings.device), list(plan.layers), plan.windows, options, partial(advance, "rounding")
        )
    if console is not None:
        share = f"{found.settled:.4f} of the weights between two levels were at one of them before the last rounding"
        console.print(share, soft_wrap=True)
    return found.matrices


class Quantizer:
    """The work between the plan and the output folder. rounded: layers whose levels are known already."""

    def __init__(
        self, plan: QuantizePlan, rounded: dict[str, QuantizedMatrix], work: Path, console: Console | None
    ) -> None:
        self.plan, self.rounded, self.console = plan, rounded, console
        self.device = torch.device(plan.settings.device)
        self.model = ModelInBlocks(plan.source, self.device)
        self.walk = CalibratedWalk(
            self.model, plan.windows, ALONE, self.device, lambda number: work / f"inputs-{number}.bin"
        )
        self.nonzero = self.lost = 0
        """Weights that were not 0, and those of them that are level 0 now."""

    def run(self) -> None:
        source, plan = self.plan.source, self.plan
        config = portable_config(source.config, source.files)
        dtypes = {name: source.dtype(name) for name in source.names}
        facts = {**source.facts, "quantization": _record(plan)}
        options: dict[str, Any] = {"facts": facts, "quantization": plan.description}
        self.walk.embed()
        steps = self.model.num_blocks * (2 * len(self.walk.own_samples) + 1)
        with (
            showing_progress(self.console, steps) as advance,
            ModelFolderWriter(plan.settings.output, config, dtypes, **options) as writer,
        ):
            for name, value in self._tensors(writer.names, advance):
                if isinstance(value, QuantizedMatrix):
                    writer.write_quantized(name, value)
                else:
                    writer.write(name, value.cpu())
            for name, path in source.files.items():
                writer.copy(name, path)
            if source.has_topology:
                writer.topology(source.topology())
        self._print_end()

    def _tensors(self, names: list[str], advance: Advance) -> Iterator[tuple[str, Tensor | QuantizedMatrix]]:
        """Everything in the order of the model, one block in memory."""
        for number, group in groupby(names, key=_block_of):
            if number is None:
                yield from ((name, self.plan.source.tensor(name)) for name in group)
            else:
                yield from self._block(number, list(group), advance)

    def _block(self, number: int, names: list[str], advance: Advance) -> Iterator[tuple[str, Tensor | QuantizedMatrix]]:
        what = f"block {number + 1} of {self.model.num_blocks}"
        with self.model.block(number) as block:
            linear = {
                name: layer for name, layer in self.model.linear_layers(number).items() if name in self.plan.layers
            }
            self._run_through(number, block, linear, partial(advance, f"{what}: inputs"))
            matrices = {f"{name}.weight": self._matrix(name, layer) for name, layer in linear.items()}
            rest = {f"layers.{number}.{name}": parameter for name, parameter in block.named_parameters()}
            advance(f"{what}: rounding", 1)
            error = self._error(number, block, matrices, partial(advance, f"{what}: outputs"))
            if self.console is not None:
                told = "" if math.isnan(error) else f", relative error of what it adds {error:.2e}"
                self.console.print(f"{what}: {len(matrices)} layers quantised{told}", soft_wrap=True)
            for name in names:
                yield name, matrices[name] if name in matrices else rest[name]

    def _run_through(
        self, number: int, block: Block, linear: dict[str, Linear], advance: Callable[[int], None]
    ) -> None:
        """The windows through the block as it was; its inputs made smoother after that, where that is asked for."""
        with collecting(linear, InputMaxima) as found:
            self.walk.run_on(number, block, advance)
        exponent = self.plan.settings.smoothing
        if exponent is None:
            return
        for norm, layer in behind_norms(block):
            if layer.name in linear:
                largest = found[layer.name].total(ALONE)
                smooth_(norm, layer, smoothing_scales(largest, layer.weight, exponent))

    def _matrix(self, name: str, layer: Linear) -> QuantizedMatrix:
        if not layer.weight.isfinite().all():
            raise CheckpointError(f"layer {name}: its weights are not all finite; must be numbers")
        settings = self.plan.settings
        matrix = self.rounded.get(name) or quantized(layer.weight, settings.bits, settings.group_or_default)
        occupied = layer.weight != 0
        self.nonzero += int(occupied.sum())
        self.lost += int((occupied & (matrix.values == 0)).sum())
        return matrix

    def _error(
        self, number: int, block: Block, matrices: dict[str, QuantizedMatrix], advance: Callable[[int], None]
    ) -> float:
        """||y' - y||^2 / ||y - x||^2 over the calibration tokens, x and y what the block read and gave; NaN without.

        The block has its quantised layers after that.
        """
        if self.plan.windows is None:
            return math.nan
        if self.plan.description.activations == "int8":
            own = f"layers.{number}."
            replace_linear_layers(
                block, {name.removeprefix(own).removesuffix(".weight"): m for name, m in matrices.items()}
            )
        else:
            for name, layer in self.model.linear_layers(number).items():
                if f"{name}.weight" in matrices:
                    layer.weight.data = matrices[f"{name}.weight"].dequantized()
        wrong = added = 0.0
        for sample in self.walk.own_samples:
            x, y = self.walk.inputs(number, sample), self.walk.inputs(number + 1, sample)
            wrong += float((block(x) - y).double().square().sum())
            added += float((y - x).double().square().sum())
            advance(1)
        self.walk.inputs_file(number).unlink()
        return wrong / added if added > 0 else 0.0

    def _print_end(self) -> None:
        if self.console is None:
            return
        share = self.lost / max(self.nonzero, 1)
        self.console.print(
            f"{len(self.plan.layers)} layers of {self.plan.settings.bits} bits; of {self.nonzero:,} weights that were "
            f"not 0, {self.lost:,} are 0 now ({share:.4f})",
            soft_wrap=True,
        )


def _block_of(name: str) -> int | None:
    """The block that a tensor belongs to."""
    words = name.split(".")
    return int(words[1]) if words[0] == "layers" else None


def _record(plan: QuantizePlan) -> dict[str, object]:
    """How the model was quantised, for its facts."""
    settings = plan.settings
    record: dict[str, object] = {"bits": settings.bits, "rounding": settings.rounding}
    if plan.windows is not None:
        record |= {"samples": len(plan.windows), "window": plan.windows.shape[1], "seed": settings.seed or 0}
    for name in ("steps", "batch", "lr", "strength", "smoothing"):
        if getattr(settings, name) is not None:
            record[name] = getattr(settings, name)
    return record

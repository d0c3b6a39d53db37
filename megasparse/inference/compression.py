"""A trained model made ready to be asked with sparse kernels: its pruned layers are packed, the dense weights let go.

    plan = compress_model(trained.model, "auto")
    for line in plan.lines():
        print(line)

Every linear layer is looked at by itself: the layout follows its zeros, and it stays dense where that is faster
(``kernels.sparse_inference.choose``). The head stays dense: its weight is mostly that of the embedding, and pruning
leaves it alone. Layers are packed one after the other, so that memory never exceeds that of the dense model by more
than one of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megasparse.inference.compressed_linear import CompressedLinear
from megasparse.kernels.sparse_inference import Choice, choose, compress, why_not
from megasparse.kernels.sparse_inference.compressed import MAX_INPUTS
from megasparse.layers import Linear
from megasparse.layers.quantized import quantized_layers
from megasparse.models.gpt import GPT
from megasparse.utils.dtypes import dtype_name

KERNELS = ("auto", "dense", "sparse")
SMALLEST = 2**16
"""Weights of a layer from which on `auto` packs it: a smaller one lies in the cache, where reading it costs little."""


@dataclass(frozen=True)
class LayerPlan:
    """What has become of a layer, or stands for it where it stays dense."""

    name: str
    kind: str
    block_size: int
    dtype: torch.dtype
    density: float
    dense_bytes: int
    """Of all its weights, as they were given."""
    num_bytes: int
    is_packed: bool = False

    @property
    def group(self) -> tuple[str, str, int, torch.dtype]:
        """Layers of one role, such as `mlp.down` in all blocks, that have become alike."""
        return self.name.split(".", 2)[-1], self.kind, self.block_size, self.dtype


@dataclass(frozen=True)
class CompressionPlan:
    """What ``compress_model`` has done."""

    layers: list[LayerPlan]

    @property
    def num_packed(self) -> int:
        """Layers that the kernels for packed weights compute."""
        return sum(layer.is_packed for layer in self.layers)

    def lines(self) -> list[str]:
        """For each role of layers: format, density, bytes at rest against those of the dense weights."""
        groups: dict[tuple, list[LayerPlan]] = defaultdict(list)
        for layer in self.layers:
            groups[layer.group].append(layer)
        found = []
        for (role, kind, block_size, dtype), layers in groups.items():
            size, dense = (sum(getattr(layer, name) for layer in layers) for name in ("num_bytes", "dense_bytes"))
            shape = f"blocks of {block_size}" if kind == "blocks" else kind
            density = sum(layer.density * layer.dense_bytes for layer in layers) / max(dense, 1)
            found.append(
                f"{len(layers)} x {role}: {shape}, {dtype_name(dtype)}, density {density:.3f}, "
                f"{size / 1e6:.2f} MB of {dense / 1e6:.2f} MB"
            )
        return found


def compress_model(
    model: GPT, kernels: str = "auto", quantized: Mapping[str, tuple[Tensor, Tensor]] | None = None
) -> CompressionPlan:
    """Put packed layers in the place of the model's linear ones.

    Args:
        model: whole, on its device, in float32 or bfloat16; it cannot be trained any more.
        kernels: `dense` changes nothing; `sparse` packs every layer that has zeros; `auto` those for which it is faster
            on a CPU.
        quantized: int8 values [out, in] and float32 scales [out] of layers by name, which take the place of whatever
            module is there; None: those of the model's quantised layers. They are packed on every CPU that has the
            kernels, those without zeros as dense rows.

    Raises:
        ValueError: unknown kernels, or `sparse` where no layer has a zero, or where the kernels cannot run.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels: {kernels}; must be one of {', '.join(KERNELS)}")
    device = next(model.parameters()).device.type
    reason = why_not(device, planned=True) if kernels != "dense" else None
    layers, choices = _layers(model, quantized_layers(model) if quantized is None else quantized), {}
    if kernels != "dense" and reason is None:
        choices = {name: _choice(values, scales, kernels) for name, (values, scales) in layers.items()}
        if any(choices.values()):
            # Only here, since it builds the kernels.
            reason = why_not(device)
        elif kernels == "sparse":
            raise ValueError("kernels: sparse; no linear layer of the model has zeros; must be auto or dense")
    if reason is not None:
        if kernels == "sparse":
            raise ValueError(f"kernels: sparse; must be auto or dense here: {reason}")
        choices = {}
    plan = []
    while layers:
        name, (values, scales) = layers.popitem()
        plan.append(_pack(model, name, values, scales, choices.get(name)))
        del values
    return CompressionPlan(plan[::-1])


def _layers(model: GPT, quantized: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and scales of the layers of all blocks, by name."""
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, module in model.layers.named_modules(prefix="layers"):
        if name in quantized:
            found[name] = quantized[name]
        elif isinstance(module, Linear) and _can_be_packed(module):
            found[name] = module.weight.detach(), None
    if unknown := quantized.keys() - found.keys():
        raise ValueError(f"quantized: {', '.join(sorted(unknown))}; must be linear layers of the model's blocks")
    return found


def _can_be_packed(layer: Linear) -> bool:
    """A whole layer without a low-rank branch, in a dtype and of a width that the kernels have."""
    return (
        not layer.partition.is_divided
        and not layer.low_rank
        and layer.weight.ndim == 2
        and layer.in_features <= MAX_INPUTS
        and layer.weight.dtype in (torch.float32, torch.bfloat16)
    )


def _choice(values: Tensor, scales: Tensor | None, kernels: str) -> Choice | None:
    """None where the layer stays as it is."""
    found = choose(values)
    if kernels == "sparse" and found.kind == "dense" and bool((values == 0).any()):
        # Above the break-even density.
        return Choice("unstructured")
    if scales is None and (found.kind == "dense" or (kernels == "auto" and values.numel() < SMALLEST)):
        return None
    return found


def _pack(model: GPT, name: str, values: Tensor, scales: Tensor | None, choice: Choice | None) -> LayerPlan:
    """Replace a layer where there is a choice."""
    size = values.numel() * values.element_size()
    if choice is None:
        density = int((values != 0).sum()) / max(values.numel(), 1)
        return LayerPlan(name, "dense", 1, values.dtype, density, size, size)
    side = choice.block_size if choice.kind == "blocks" else None
    packed = compress(values, scales_O=scales, kind=choice.kind, block_size=side)
    parent, _, own = name.rpartition(".")
    bias = getattr(model.get_submodule(name), "bias", None)
    setattr(model.get_submodule(parent), own, CompressedLinear(name, packed, bias))
    return LayerPlan(name, packed.kind, packed.block_size, packed.dtype, packed.density, size, packed.num_bytes, True)

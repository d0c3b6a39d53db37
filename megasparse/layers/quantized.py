"""A linear layer of int8 weights for inference; activations become int8 while it runs.

    replace_linear_layers(model, {"layers.0.mlp.up": matrix})

Where another kernel comes in: ``quantized_layers`` gives what such layers hold, for whoever puts others in their
place; or a function of (x, values, scales, bias) is put into ``QuantizedLinear.product``. What it must give:
``kernels.quantized.int8_linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from megasparse.kernels.quantized import QuantizedMatrix, int8_linear
from megasparse.layers.linear import Linear

Product = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class QuantizedLinear(nn.Module):
    """y = x W^T + b of a whole layer, without gradients.

    layer: gives name, widths and bias. matrix: the weight, one scale for each output. product: computes it.
    """

    values: Tensor
    scales: Tensor

    def __init__(self, layer: Linear, matrix: QuantizedMatrix, product: Product = int8_linear) -> None:
        super().__init__()
        assert not layer.partition.is_divided and matrix.scales.dim() == 1, layer.name
        self.name, self.in_features, self.out_features = layer.name, layer.in_features, layer.out_features
        self.bias, self.product = layer.bias, product
        self.register_buffer("values", matrix.values)
        self.register_buffer("scales", matrix.scales)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.values, self.scales, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        """Scales stay float32 where the model goes to another dtype."""
        exact = self.scales
        super()._apply(fn, recurse)
        self.scales = exact.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.name}, {self.in_features} -> {self.out_features}, int8, bias={self.bias is not None}"


def replace_linear_layers(model: nn.Module, matrices: Mapping[str, QuantizedMatrix]) -> None:
    """Put quantised layers, by name, in the place of linear ones."""
    for name, matrix in matrices.items():
        parent, _, own = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, Linear), name
        setattr(model.get_submodule(parent), own, QuantizedLinear(layer, matrix))


def quantized_layers(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Levels int8 [out, in] and scales float32 [out] of a model's quantised layers, by name: for other kernels."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return {layer.name: (layer.values, layer.scales) for layer in layers}

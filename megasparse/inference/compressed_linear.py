"""A linear layer of inference whose weight is kept packed (``kernels.sparse_inference``)."""

from __future__ import annotations

from torch import Tensor, nn

from megasparse.kernels.sparse_inference import CompressedWeight, compressed_linear


class CompressedLinear(nn.Module):
    """y = x W^T + b of a whole layer, on a CPU and without gradients.

    name: of the layer in the model. The weight is no parameter: it stays as it is where the model goes to another
    dtype, and is not in the state dict.
    """

    def __init__(self, name: str, weight: CompressedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.name, self.weight, self.bias = name, weight, bias
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of x. Raises RuntimeError where a gradient is wanted."""
        return compressed_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.name}, {self.in_features} -> {self.out_features}, {self.weight.kind}, {self.weight.density:.3f}"

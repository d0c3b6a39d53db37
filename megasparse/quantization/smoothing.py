"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): what is hard to quantise in activations moves into the weights.

    scales = smoothing_scales(largest_inputs, weight, exponent=0.5)
    smooth_(norm, layer, scales)

Input j of a layer behind a norm is divided by s_j, through the norm's weight and bias, and column j of the layer's
weight is multiplied by it: the function stays, the largest inputs shrink. A zero stays a zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megasparse.layers import Linear, Normalization
from megasparse.models.gpt import Block


def behind_norms(block: Block) -> list[tuple[Normalization, Linear]]:
    """Each norm of a block with the one layer that reads it."""
    return [
        (block.attention_norm, block.attention.qkv),
        (block.mlp_norm, block.mlp.gate_up if block.mlp.gated else block.mlp.up),
    ]


def smoothing_scales(largest_inputs: Tensor, weight: Tensor, exponent: float) -> Tensor:
    """s_j = max|X_j|^a / max|W_j|^(1 - a) (equation 4), float32 [in]; 1 where either of the two is 0."""
    largest_weights = weight.float().abs().amax(0)
    scales = largest_inputs.float().pow(exponent) / largest_weights.pow(1 - exponent)
    known = (largest_inputs > 0) & (largest_weights > 0) & scales.isfinite() & (scales > 0)
    return torch.where(known, scales, 1.0)


@torch.no_grad()
def smooth_(norm: Normalization, layer: Linear, scales: Tensor) -> None:
    """Fold the scales of the layer's inputs into both."""
    norm.weight.div_(scales)
    if norm.bias is not None:
        norm.bias.div_(scales)
    layer.weight.mul_(scales)

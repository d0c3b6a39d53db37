"""Rotary position embedding (Su et al., 2021, arXiv 2104.09864) in the half-split layout of Llama.

Dimension i of a head is paired with dimension i + D/2; the pair at position t is turned by t * theta^(-2i / D).
The angles are no buffers: ``model.bfloat16()`` (which DeepSpeed calls) would round them to 8 significant bits, and a
frequency rounded so turns position 512 by up to two radians too much. They are made from integer positions in float64
and kept as float32 cosines and sines in a small cache outside of the module.
Tensor names: B samples, H heads, T tokens, D head dimension.
"""

from __future__ import annotations

from functools import lru_cache
from math import pi

import torch

from megasparse.config.schema import RopeScaling
from megasparse.kernels import elementwise


@lru_cache(maxsize=8)
def rotary_tables(
    seq_length: int, head_dim: int, theta: float, device: torch.device, scaling: RopeScaling | None = None
) -> tuple[torch.Tensor, ...]:
    """Cosine and sine of all angles, two float32 tensors [seq_length, head_dim / 2] on `device`."""
    # Tensors made under inference mode could not be saved for a backward pass later; float64 is made on the CPU
    # because not every accelerator has it.
    with torch.inference_mode(False), torch.no_grad():
        frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
        if scaling is not None:
            frequency = _scaled(frequency, scaling)
        angle = torch.outer(torch.arange(seq_length, dtype=torch.float64, device="cpu"), frequency)
        return angle.cos().float().to(device), angle.sin().float().to(device)


def _scaled(frequency: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Frequencies for longer contexts: divided by the factor, for llama3 the more the fewer turns they make."""
    if scaling.type == "linear":
        return frequency / scaling.factor
    turns = scaling.original_seq_length * frequency / (2 * pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(frequency / scaling.factor, frequency, kept.clamp(0, 1))


def rotate(
    x_BHTD: torch.Tensor,
    theta: float,
    scaling: RopeScaling | None = None,
    *,
    first: int | tuple[int, ...] = 0,
    kernel: str = "auto",
) -> torch.Tensor:
    """Turn queries or keys by their positions first .. first + T - 1; returned in the dtype of the input.

    first: or the positions of all T tokens, where they do not follow one another. kernel: of `kernels.elementwise`.
    """
    T, D = x_BHTD.shape[-2:]
    end = max(first) + 1 if isinstance(first, tuple) else first + T
    # Generation comes here with one position after the other: a table of twice the length serves many of them.
    length = end if first == 0 else 1 << (end - 1).bit_length()
    tables = rotary_tables(length, D, theta, x_BHTD.device, scaling)
    rows = list(first) if isinstance(first, tuple) else slice(first, end)
    cos_TD, sin_TD = (table[rows] for table in tables)
    return elementwise.rotate(x_BHTD, cos_TD, sin_TD, kernel=kernel)

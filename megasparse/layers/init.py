"""Initial weights that depend on the seed and the parameter's name, and on nothing else.

Each tensor is drawn from a generator of its own, so neither the order in which a model is built, nor which layers are
sparse, nor the number of ranks changes a single initial weight.
"""

from __future__ import annotations

import hashlib

import torch


def parameter_seed(seed: int, name: str) -> int:
    """A stable 63-bit seed for the parameter `name` of a run with `seed`; the same in every process and version."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@torch.no_grad()
def normal_(tensor: torch.Tensor, std: float, seed: int, name: str) -> torch.Tensor:
    """Fill `tensor` with normal(0, std) drawn for the parameter `name`; a tensor on the meta device is left as it is.

    The numbers are drawn in float32 on the CPU and then copied, so that they do not depend on dtype or device.
    """
    if tensor.is_meta:
        return tensor
    generator = torch.Generator(device="cpu").manual_seed(parameter_seed(seed, name))
    drawn = torch.empty(tensor.shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)
    return tensor.copy_(drawn)

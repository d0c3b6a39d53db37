"""Initial weights that depend on the seed and the parameter's name, and on nothing else.

Each tensor is drawn from a generator of its own, so neither the order in which a model is built, nor which layers are
sparse, nor the number of ranks, nor how they share the layers changes a single initial weight.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from megasparse.parallel import ShardSpec


def parameter_seed(seed: int, name: str) -> int:
    """A stable 63-bit seed for the parameter `name` of a run with `seed`; the same in every process and version."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _drawn(shape: tuple[int, ...], std: float, seed: int, name: str) -> torch.Tensor:
    """Numbers from normal(0, std) for the parameter `name`, float32 on the CPU whatever dtype and device it has."""
    generator = torch.Generator(device="cpu").manual_seed(parameter_seed(seed, name))
    return torch.normal(0.0, std, shape, generator=generator, dtype=torch.float32, device="cpu")


def divided_parameter(
    partition: ShardSpec, rank: int, *, std: float = 0.0, seed: int | None = 0, name: str = ""
) -> nn.Parameter:
    """A parameter that holds a rank's shard of normal(0, std) drawn for the whole of it; zeros where std is 0, or
    seed None, as the values come from elsewhere.

    The partition is declared on it.
    """
    parameter = nn.Parameter(torch.zeros(partition.local_shape))
    if std and seed is not None and not parameter.is_meta:
        with torch.no_grad():
            parameter.copy_(partition.shard(_drawn(partition.shape, std, seed, name), rank))
    partition.declare(parameter)
    return parameter

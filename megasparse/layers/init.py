"""Initial weights that depend on the seed and the parameter's name, and on nothing else.

Each tensor is drawn from a generator of its own, so neither the order in which a model is built, nor which layers are
sparse, nor the number of ranks, nor how they share the layers changes a single initial weight. A rank draws what it
holds and nothing else, but for matrices that are divided by columns, of which it draws all rows that it has a part of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from megasparse.layers.skip_ahead import generator_at
from megasparse.parallel import ShardSpec

BLOCK = 16
"""Numbers that torch makes together, of as many draws; the last block, where it is not whole, is made anew."""
ROWS_AT_ONCE = 1024
"""Of a matrix that is divided by columns; a multiple of `BLOCK`, so that a part begins where the one before ended."""

Initial = Callable[[int, int], Tensor]
"""(start, numel) -> entries of a shard's initial values, flattened, float32 on the CPU."""


def parameter_seed(seed: int, name: str) -> int:
    """A stable 63-bit seed for the parameter `name` of a run with `seed`; the same in every process and version."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def divided_parameter(
    partition: ShardSpec, rank: int, *, std: float = 0.0, seed: int | None = 0, name: str = "", deferred: bool = False
) -> nn.Parameter:
    """A parameter that holds a rank's shard of normal(0, std) drawn for the whole of it; zeros where std is 0, or
    seed None, as the values come from elsewhere.

    The partition is declared on it. deferred: it holds zeros, and whoever divides it further asks for what he needs of
    the values by its attribute `initial`, an ``Initial``.
    """
    parameter = nn.Parameter(torch.zeros(partition.local_shape))
    if std and seed is not None and not parameter.is_meta:
        initial = partial(_entries, partition, rank, _Draws(partition.shape, std, parameter_seed(seed, name)))
        if deferred:
            parameter.initial = initial
        else:
            with torch.no_grad():
                parameter.copy_(initial(0, parameter.numel()).view(partition.local_shape))
    partition.declare(parameter)
    return parameter


class _Draws:
    """Numbers from normal(0, std) for a whole parameter, of which any part can be had: the same bits as of
    ``torch.normal`` for all of it at once, whatever the dtype and device of the parameter."""

    def __init__(self, shape: tuple[int, ...], std: float, seed: int) -> None:
        self._numel, self._std, self._seed = prod(shape), std, seed
        self._generator, self._position = generator_at(seed, 0), 0

    def part(self, start: int, stop: int) -> Tensor:
        """Entries [start, stop), flattened."""
        if self._numel < BLOCK:
            # Another method of torch, one number after another.
            return self._normal(0, self._numel)[start:stop]
        last = self._numel // BLOCK * BLOCK
        begin, end = start // BLOCK * BLOCK, min(-(-stop // BLOCK) * BLOCK, last)
        drawn = self._normal(begin, end - begin) if begin < end else torch.empty(0)
        if last < self._numel and stop > self._numel - BLOCK:
            begin = min(begin, self._numel - BLOCK)
            drawn = torch.cat([drawn[: self._numel - BLOCK - begin], self._normal(self._numel, BLOCK)])
        return drawn[start - begin : stop - begin]

    def _normal(self, position: int, count: int) -> Tensor:
        if position != self._position:
            self._generator = generator_at(self._seed, position)
        self._position = position + count
        return torch.normal(0.0, self._std, (count,), generator=self._generator, dtype=torch.float32, device="cpu")


def _entries(partition: ShardSpec, rank: int, draws: _Draws, start: int, numel: int) -> Tensor:
    """Entries [start, start + numel) of a rank's shard, flattened."""
    if not partition.is_divided:
        return draws.part(start, start + numel)
    if partition.dim == 0:
        return _entries_by_rows(partition, rank, draws, start, start + numel)
    assert len(partition.shape) == 2, f"{partition}"
    return _entries_by_columns(partition, rank, draws, start, numel)


def _entries_by_rows(partition: ShardSpec, rank: int, draws: _Draws, start: int, stop: int) -> Tensor:
    """Each fused part has a share of the shard, which lies in one piece."""
    row, found, local, whole = prod(partition.shape[1:]), [], 0, 0
    for part in partition.divided_parts:
        share = part // partition.size * row
        begin, end = max(start, local), min(stop, local + share)
        if begin < end:
            offset = whole + rank * share - local
            found.append(draws.part(begin + offset, end + offset))
        local, whole = local + share, whole + part * row
    return torch.cat(found) if found else torch.empty(0)


def _entries_by_columns(partition: ShardSpec, rank: int, draws: _Draws, start: int, numel: int) -> Tensor:
    """Whole rows are drawn, some at a time, and cut."""
    columns, width = partition.shape[1], partition.local_shape[1]
    first, last, found = start // width, -(-(start + numel) // width), []
    at = first
    while at < last:
        end = min((at // ROWS_AT_ONCE + 1) * ROWS_AT_ONCE, last)
        rows = draws.part(at * columns, end * columns).view(end - at, columns)
        found.append(ShardSpec((end - at, columns), 1, partition.size, partition.parts).shard(rows, rank))
        at = end
    flat = torch.cat(found).view(-1) if found else torch.empty(0)
    return flat[start - first * width :][:numel]

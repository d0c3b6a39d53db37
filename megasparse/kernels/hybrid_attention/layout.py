"""The heads of one attention call, in groups and with a margin around their tokens, for the tiles of a pattern.

Tensor names: B samples, G key-value heads, R query heads of each, T tokens, D head dimension, small letters those of
one group; X = b x g x r, L = T with the margin on both sides, N tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from megasparse.kernels.hybrid_attention.tiles import Tiles, View, overhang, pattern_tiles

# Scores that are in work at a time: on a CPU what lies in a core's cache, elsewhere enough to fill the device.
CPU_SCORES, DEVICE_SCORES = 2**18, 2**26

Group = tuple[slice, slice, slice]


class Layout:
    """The tiles of one call with their masks, and the heads in groups whose scores fit into the cache."""

    def __init__(self, q: Tensor, k: Tensor, documents_BT: Tensor | None, pattern: str, stride: int) -> None:
        self.samples, num_heads, self.length, _ = q.shape
        self.heads = k.shape[1], num_heads // k.shape[1]
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.limit = CPU_SCORES if q.device.type == "cpu" else DEVICE_SCORES
        tiles = pattern_tiles(pattern, self.length, stride)
        self.front, self.end = overhang(tiles)
        self.tiles = [
            (piece, piece.masks(self.dtype, q.device)) for part in tiles for piece in part.slices(self.limit)
        ]
        self.documents, self.device = documents_BT, q.device
        self.scratch: dict[str, Tensor] = {}

    def groups(self) -> Iterator[Group]:
        """Slices of samples, key-value heads and query heads of each."""
        num_groups, share = self.heads
        heads = max(1, self.limit // max(part.entries for part, _ in self.tiles))
        each = max(1, heads // (num_groups * share)), min(num_groups, max(1, heads // share)), min(share, heads)
        sizes = self.samples, num_groups, share
        starts = (range(0, size, step) for size, step in zip(sizes, each, strict=True))
        for first in product(*starts):
            yield tuple(
                slice(start, min(start + step, size)) for start, step, size in zip(first, each, sizes, strict=True)
            )

    def load(self, x_bgrTD: Tensor, scale: float = 1.0) -> Tensor:
        """The heads of a group with zeros around, [X, L, D] in the dtype of the products."""
        *shape, T, D = x_bgrTD.shape
        loaded = torch.empty(*shape, self.front + self.end, D, dtype=self.dtype, device=x_bgrTD.device)
        loaded[..., : self.front, :].zero_()
        loaded[..., self.front + T :, :].zero_()
        inner = loaded[..., self.front : self.front + T, :]
        inner.copy_(x_bgrTD)
        if scale != 1:
            inner.mul_(scale)
        return loaded.flatten(0, 2)

    def load_keys(self, x_BGTD: Tensor, group: Group) -> Tensor:
        """`load` for keys or values, repeated for the query heads of the group."""
        shared = x_BGTD[group[:2]].unsqueeze(2)
        return self.load(shared.expand(-1, -1, group[2].stop - group[2].start, -1, -1))

    def load_documents(self, group: Group) -> Tensor | None:
        """[samples, L, 1]; -1 around."""
        if self.documents is None:
            return None
        documents_bT = self.documents[group[0]]
        loaded = documents_bT.new_full((documents_bT.shape[0], self.front + self.end), -1)
        loaded[:, self.front : self.front + self.length] = documents_bT
        return loaded.unsqueeze(-1)

    def tokens(self, x_XLD: Tensor, group: Group) -> Tensor:
        """What `load` put together, [b, g, r, T, D] without the margin."""
        sizes = [piece.stop - piece.start for piece in group]
        return x_XLD[:, self.front : self.front + self.length].unflatten(0, sizes)

    def of(self, x_XLD: Tensor, tiles: Tiles, view: View) -> Tensor:
        """The tokens of a view, [X, N, *counts, D], without a copy."""
        return view.of(x_XLD, self.front, tiles.num_tiles)

    def add(self, total_XLD: Tensor, tiles: Tiles, view: View, values: Tensor) -> None:
        """Add [X N, tokens, D] to the tokens of a view; those that lie in several tiles get a summand from each."""
        for piece, first, last in view.disjoint(tiles.num_tiles):
            target = self.of(total_XLD, tiles, piece)
            target.add_(values[:, first:last].view(target.shape))

    def take(self, name: str, *shape: int) -> Tensor:
        """Memory that is used again for every batch of tiles."""
        size = math.prod(shape)
        if name not in self.scratch or self.scratch[name].numel() < size:
            self.scratch[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self.scratch[name][:size].view(shape)

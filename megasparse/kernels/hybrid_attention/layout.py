"""The heads of one attention call, in groups of equal size, with a margin around their tokens for overhanging tiles.

A group is loaded into buffers that all groups use in turn, so that the views of the tiles on them are made once.

Tensor names: B samples, G key-value heads, R query heads of each, T tokens, D head dimension; X = b x g x r samples and
heads of one group, L = T with the margin on both sides, N tiles, Q queries and K keys of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from megasparse.kernels.hybrid_attention.heads import Heads
from megasparse.kernels.hybrid_attention.tiles import Tiles, View, overhang, pattern_tiles

# Scores that are in work at a time: on a CPU what lies in its caches, elsewhere enough to fill the device.
CPU_SCORES, DEVICE_SCORES = 2**19, 2**26

Group = tuple[slice, slice]


class TileView:
    """The tiles of a view on a buffer [X, L, D] as matrices, to read and to write.

    Matrices come as a list: one tensor [X N, tokens, D], or X tensors [N, tokens, D] where only those are views of the
    buffer. Which of the two depends on the step between tiles alone, so lists of queries and of keys correspond.
    `strided` is the whole as a view of the buffer, [X, N, count, D].
    """

    def __init__(self, x_XLD: Tensor, tiles: Tiles, view: View, front: int) -> None:
        self.strided = view.of(x_XLD, front, tiles.num_tiles)
        self._matrices, self._copy = self._as_matrices(), None
        if any(matrix.untyped_storage().data_ptr() != x_XLD.untyped_storage().data_ptr() for matrix in self._matrices):
            # Matrices that are no views are copied whenever they are read.
            self._copy = x_XLD.new_empty(self.strided.shape)
            self._matrices = [self._copy.flatten(0, 1)]
        self._pieces = [
            (piece.of(x_XLD, front, tiles.num_tiles), first, last)
            for piece, first, last in view.disjoint(tiles.num_tiles)
        ]

    def _as_matrices(self) -> list[Tensor]:
        heads, num_tiles = self.strided.shape[:2]
        if heads == 1 or num_tiles == 1 or self.strided.stride(0) == num_tiles * self.strided.stride(1):
            return [self.strided.flatten(0, 1)]
        return [*self.strided]

    def read(self) -> list[Tensor]:
        if self._copy is not None:
            self._copy.copy_(self.strided)
        return self._matrices

    def add(self, values: Tensor) -> None:
        """Add a tensor like `strided` to the buffer; a token in several tiles gets a summand from each."""
        if len(self._pieces) == 1:
            self.strided.add_(values)
            return
        for target, first, last in self._pieces:
            target.add_(values[:, :, first:last])

    def memory(self) -> list[Tensor] | None:
        """The matrices, where they are the buffer's own memory and contiguous: results can be computed into them."""
        own = self._copy is None and all(matrix.is_contiguous() for matrix in self._matrices)
        return self._matrices if own else None


def products(lefts: Sequence[Tensor], rights: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Batched matrix products, pair by pair."""
    for left, right, result in zip(lefts, rights, out, strict=True):
        torch.bmm(left, right, out=result)


class Layout:
    """Groups, buffers and masks of one call.

    Args:
        q, k: as in `hybrid_attention`; only shape, dtype and device matter.
        heads: all of one pattern and offset.
    """

    def __init__(self, q: Tensor, k: Tensor, heads: Heads) -> None:
        self._samples, num_heads, self._length, _ = q.shape
        self._key_heads, self.device = k.shape[1], q.device
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        tiles = pattern_tiles(heads.pattern, self._length, heads.stride, heads.offset)
        self._front, self._end = overhang(tiles)
        limit = CPU_SCORES if q.device.type == "cpu" else DEVICE_SCORES
        share = num_heads // self._key_heads
        fitting = limit // (share * max(part.entries for part in tiles))
        key_heads = _divisor(self._key_heads, fitting)
        self._shape = _divisor(self._samples, fitting // self._key_heads), key_heads, share
        self.tiles = [piece for part in tiles for piece in part.slices(limit // math.prod(self._shape))]
        self._masks = [piece.masks(self.dtype, q.device) for piece in self.tiles]
        self._scratch: dict[str, Tensor] = {}
        self._documents_BT = heads.documents_BT
        if self._documents_BT is not None:
            self._documents = self._documents_BT.new_full((self._shape[0], self._front + self._end, 1), -1)

    def groups(self) -> Iterator[Group]:
        """Slices of samples and key-value heads."""
        starts = (
            range(0, size, step) for size, step in zip((self._samples, self._key_heads), self._shape, strict=False)
        )
        for sample, head in product(*starts):
            yield slice(sample, sample + self._shape[0]), slice(head, head + self._shape[1])

    def by_key_head(self, x_BHTD: Tensor) -> Tensor:
        """[B, H, T, D] -> [B, G, R, T, D], where H may be G; a group is the index of a part of it."""
        return x_BHTD.unflatten(1, (self._key_heads, -1))

    def buffer(self, width: int) -> Tensor:
        """[X, L, width] of zeros."""
        size = math.prod(self._shape), self._front + self._end, width
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    def tokens(self, x_XLD: Tensor) -> Tensor:
        """A buffer without its margin, [b, g, R, T, D]."""
        return x_XLD[:, self._front : self._front + self._length].unflatten(0, self._shape)

    def load_documents(self, group: Group) -> None:
        if self._documents_BT is not None:
            self._documents[:, self._front : self._front + self._length, 0] = self._documents_BT[group[0]]

    def queries(self, x_XLD: Tensor) -> list[TileView]:
        """For each of `tiles` its queries in a buffer."""
        return [TileView(x_XLD, tiles, tiles.queries, self._front) for tiles in self.tiles]

    def keys(self, x_XLD: Tensor) -> list[TileView]:
        """For each of `tiles` its keys in a buffer."""
        return [TileView(x_XLD, tiles, tiles.keys, self._front) for tiles in self.tiles]

    def mask_(self, scores: Tensor, number: int) -> None:
        """Set inactive pairs of `tiles[number]` in contiguous [X, N, Q, K] to -inf."""
        tiles = self.tiles[number]
        by_tile = scores
        for piece, mask in self._masks[number]:
            by_tile[:, piece].add_(mask)
        if self._documents_BT is not None:
            views = tiles.queries, tiles.keys
            query, key = (view.of(self._documents, self._front, tiles.num_tiles) for view in views)
            apart_bNQK = query != key.mT
            by_tile.unflatten(0, (self._shape[0], -1)).masked_fill_(apart_bNQK.unsqueeze(1), -math.inf)

    def take(self, name: str, *shape: int) -> Tensor:
        """Memory that is used again by every batch of tiles."""
        size = math.prod(shape)
        if name not in self._scratch or self._scratch[name].numel() < size:
            self._scratch[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self._scratch[name][:size].view(shape)


def _divisor(number: int, limit: int) -> int:
    """The largest divisor up to `limit`, at least 1."""
    return next((size for size in range(min(number, limit), 0, -1) if number % size == 0), 1)

"""The attention patterns cut into tiles: which queries meet which keys, so that most of what is computed is active.

``pattern_tiles`` gives the tiles of a pattern. Every active (query, key) pair lies in exactly one tile, and every query
meets an active key in the first tile that it is in. How the patterns are cut, for stride s:

    local     tiles of consecutive queries against the s - 1 tokens before them and themselves
    strided   one sequence of the tokens of equal position modulo s, in rows of tiles up to the diagonal
    sparse    local, then strided without the keys that local has
    fixed     the block diagonal, then the last tokens of the earlier blocks, gathered
    full      strided with s = 1

An offset o of the head moves the queries of the strided tiles o tokens on, since the query at q meets the keys that
q - o met; a query itself is then no strided key, and tiles of a window of one token hold it. It moves the blocks of
`fixed` o tokens back.

Tokens are counted from 0; `of` reads tensors that hold `front` rows before token 0 and some rows after the last token,
so that tiles may overhang: keys before token 0 are masked, and no token sees the ones after the last.

Tensor names: X any leading dimension, L front + tokens + overhang, N tiles, Q queries of a tile, K keys of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from megasparse.kernels.hybrid_attention.patterns import check_pattern

# Queries in a tile. Fewer waste less of a window; more make faster products. Measured from 16 to 128 on a CPU.
TILE = 32
# Queries that share a product with the gathered last tokens of the blocks.
SUMMARY_ROWS = 1024


@dataclass(frozen=True)
class View:
    """Tokens as tiles: row `row` of a tile is token `start + tile * step + row * row_step`."""

    start: int
    step: int
    count: int
    row_step: int = 1

    def end(self, num_tiles: int) -> int:
        """One more than the last token."""
        return self.start + (num_tiles - 1) * self.step + (self.count - 1) * self.row_step + 1

    def of(self, x_XLD: torch.Tensor, front: int, num_tiles: int) -> torch.Tensor:
        """The tiles of a contiguous tensor, a view of [X, N, count, D]."""
        X, L, D = x_XLD.shape
        strides = L * D, self.step * D, self.row_step * D, 1
        return x_XLD.as_strided(
            (X, num_tiles, self.count, D), strides, x_XLD.storage_offset() + (front + self.start) * D
        )

    def disjoint(self, num_tiles: int) -> list[tuple[View, int, int]]:
        """Views whose tiles share no token, and the range of this view's rows that each of them holds."""
        if num_tiles == 1 or self.row_step > 1 or self.count <= self.step:
            return [(self, 0, self.count)]
        return [
            (replace(self, start=self.start + first, count=self.step), first, first + self.step)
            for first in range(0, self.count, self.step)
        ]


@dataclass(frozen=True)
class Tiles:
    """Products of equal shape.

    Attributes:
        num_tiles: N.
        queries, keys: the tokens of each tile.
        sees: (query position, key position, s, o) -> whether the pair is active and belongs to these tiles.
        stride, offset: s and o.
        edge: tiles at the beginning whose masks differ from the last one's; all others share that one.
        joins: earlier tiles have the same queries.
    """

    num_tiles: int
    queries: View
    keys: View
    sees: Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]
    stride: int
    offset: int = 0
    edge: int = 0
    joins: bool = False

    @property
    def entries(self) -> int:
        return self.num_tiles * self.queries.count * self.keys.count

    def masks(self, dtype: torch.dtype, device: torch.device) -> list[tuple[slice, torch.Tensor]]:
        """0 where a pair is active and -inf elsewhere, [1 or tiles, Q, K], for each slice of the tiles."""
        edge = min(self.edge, self.num_tiles)
        pieces = [(slice(0, edge), 0, edge)] if edge else []
        if edge < self.num_tiles:
            pieces.append((slice(edge, None), edge, 1))
        masks = []
        for tiles, first, count in pieces:
            queries, keys = (self._positions(view, first, count, device) for view in (self.queries, self.keys))
            active = self.sees(queries[:, :, None], keys[:, None, :], self.stride, self.offset)
            masks.append(
                (tiles, torch.zeros(active.shape, dtype=dtype, device=device).masked_fill_(~active, -math.inf))
            )
        return masks

    @staticmethod
    def _positions(view: View, first: int, count: int, device: torch.device) -> torch.Tensor:
        moved = replace(view, start=0)
        tokens = torch.arange(moved.end(first + count), device=device).view(1, -1, 1)
        return moved.of(tokens, 0, first + count)[0, first:, :, 0] + view.start

    def slices(self, limit: int) -> list[Tiles]:
        """The same tiles in pieces of at most `limit` entries, or of one tile where it has more."""
        each = max(1, limit // (self.queries.count * self.keys.count))
        return [
            replace(
                self,
                num_tiles=min(each, self.num_tiles - first),
                queries=replace(self.queries, start=self.queries.start + first * self.queries.step),
                keys=replace(self.keys, start=self.keys.start + first * self.keys.step),
                edge=max(0, self.edge - first),
            )
            for first in range(0, self.num_tiles, each)
        ]


@lru_cache(maxsize=256)
def pattern_tiles(pattern: str, seq_length: int, stride: int, offset: int = 0) -> tuple[Tiles, ...]:
    """The tiles of a pattern over `seq_length` >= 1 tokens. Raises ValueError as `check_pattern`."""
    check_pattern(pattern, stride, offset)
    if pattern == "full":
        return _strided(seq_length, 1, 0, _same_residue)
    if pattern == "fixed":
        blocks = _shortened_blocks(seq_length, stride, offset)
        return (*_block_diagonal(seq_length, *blocks), *_joining(_summaries(seq_length, *blocks)))
    stride = min(stride, seq_length)  # a longer one changes nothing
    if pattern == "local":
        return _local(seq_length, stride)
    if pattern == "sparse":
        far = _strided(seq_length, stride, offset, _earlier_of_same_residue) if seq_length - offset > stride else ()
        return (*_local(seq_length, stride), *_joining(far))
    if offset == 0:
        return _strided(seq_length, stride, 0, _same_residue)
    far = _strided(seq_length, stride, offset, _same_residue) if seq_length > offset else ()
    return (*_local(seq_length, 1), *_joining(far))


def overhang(tiles: tuple[Tiles, ...]) -> tuple[int, int]:
    """Rows that the tiles reach before token 0, and one more than the last token that they reach."""
    front = max(-view.start for part in tiles for view in (part.queries, part.keys))
    return max(front, 0), max(view.end(part.num_tiles) for part in tiles for view in (part.queries, part.keys))


def _joining(tiles: tuple[Tiles, ...]) -> tuple[Tiles, ...]:
    return tuple(replace(part, joins=True) for part in tiles)


def _local(seq_length: int, stride: int) -> tuple[Tiles, ...]:
    # A short window with long tiles would be mostly masked.
    size = min(TILE, max(16, 2 ** (stride - 1).bit_length()))
    before = _ceil(stride - 1, size)
    num_tiles = _ceil(seq_length, size)
    keys = View(-before * size, size, (before + 1) * size)
    return (Tiles(num_tiles, View(0, size, size), keys, _in_window, stride, edge=before),)


def _strided(seq_length: int, stride: int, offset: int, sees: Callable) -> tuple[Tiles, ...]:
    length = _ceil(seq_length - offset, stride)
    tiles = []
    for first in range(0, length, TILE):
        last = min(first + TILE, length)
        queries, keys = View(offset + first * stride, 1, last - first, stride), View(0, 1, last, stride)
        tiles.append(Tiles(stride, queries, keys, sees, stride, offset))
    return tuple(tiles)


def _shortened_blocks(seq_length: int, stride: int, offset: int) -> tuple[int, int]:
    """Stride and offset that cut the sequence into the same blocks, where it has no whole one, with less overhang."""
    first = min(stride - offset, seq_length)
    longest = max(first, min(seq_length - first, stride))
    return longest, longest - first


def _block_diagonal(seq_length: int, stride: int, offset: int) -> tuple[Tiles, ...]:
    together = max(1, 16 // stride)  # blocks in a tile
    span = together * stride
    num_tiles = _ceil(offset + seq_length, span)
    tiles = []
    for first in range(0, span, TILE):
        last = min(first + TILE, span)
        queries, keys = View(first - offset, span, last - first), View(-offset, span, last)
        tiles.append(Tiles(num_tiles, queries, keys, _in_block, stride, offset, edge=1 if offset else 0))
    return tuple(tiles)


def _summaries(seq_length: int, stride: int, offset: int) -> tuple[Tiles, ...]:
    num_blocks, together = _ceil(offset + seq_length, stride), max(1, SUMMARY_ROWS // stride)
    tiles = []
    for first in range(1, num_blocks, together):  # the first block has none before it
        last = min(first + together, num_blocks)
        for begin in range(first * stride, last * stride, SUMMARY_ROWS):
            end = min(begin + SUMMARY_ROWS, last * stride)
            queries, keys = View(begin - offset, 0, end - begin), View(stride - 1 - offset, 0, last - 1, stride)
            tiles.append(Tiles(1, queries, keys, _ends_earlier_block, stride, offset))
    return tuple(tiles)


def _in_window(query: torch.Tensor, key: torch.Tensor, stride: int, offset: int) -> torch.Tensor:
    return (key >= 0) & (key <= query) & (query - key < stride)


def _same_residue(query: torch.Tensor, key: torch.Tensor, stride: int, offset: int) -> torch.Tensor:
    return (key <= query - offset) & ((query - offset - key) % stride == 0)


def _earlier_of_same_residue(query: torch.Tensor, key: torch.Tensor, stride: int, offset: int) -> torch.Tensor:
    return (key < query - offset) & ((query - offset - key) % stride == 0)


def _in_block(query: torch.Tensor, key: torch.Tensor, stride: int, offset: int) -> torch.Tensor:
    # Rows before token 0 see each other: a row without any key would have no maximum.
    seen = (key <= query) & ((key >= 0) | (query < 0))
    return seen & ((query + offset) // stride == (key + offset) // stride)


def _ends_earlier_block(query: torch.Tensor, key: torch.Tensor, stride: int, offset: int) -> torch.Tensor:
    return (key + offset) // stride < (query + offset) // stride


def _ceil(a: int, b: int) -> int:
    return -(-a // b)

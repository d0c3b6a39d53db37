"""Where in the tensors that the optimizer updates the sparse matrices lie: what of them its kernel may pass over.

regions = ActiveRegions(tensors, access.fragments(), topologies)
for start, numel, active in regions.pieces(tensor, 0, tensor.numel()): ...
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from megasparse.kernels.optimizer import Active
from megasparse.sparsity.state import StateFragment
from megasparse.sparsity.topology import Topology


class Piece(NamedTuple):
    """Entries [start, start + numel) of a tensor; active: None: all of them are."""

    start: int
    numel: int
    active: Active | None


class ActiveRegions:
    """tensors: what the optimizer updates, flat or not. fragments, topologies: of the sparse matrices, by name.

    Master weights are views of the tensors, at any ZeRO stage, so that addresses say where they lie. Masks are seen as
    they are when a step is made.
    """

    def __init__(
        self, tensors: Iterable[Tensor], fragments: Mapping[str, StateFragment], topologies: Mapping[str, Topology]
    ) -> None:
        self._regions: dict[Tensor, list[Piece]] = {tensor: [] for tensor in tensors}
        for name, fragment in fragments.items():
            tensor, start = self._place(fragment.master)
            topology = topologies[name]
            active = Active(topology.mask, topology.block_size, fragment.start)
            self._regions[tensor].append(Piece(start, fragment.numel, active))
        for regions in self._regions.values():
            regions.sort(key=lambda region: region.start)

    def pieces(self, tensor: Tensor, start: int, numel: int) -> Iterator[Piece]:
        """Entries [start, start + numel) of a tensor, cut where a sparse matrix begins or ends."""
        regions, end = self._regions.get(tensor, []), start + numel
        for region in regions[max(bisect_right(regions, start, key=lambda region: region.start) - 1, 0) :]:
            begin, stop = max(region.start, start), min(region.start + region.numel, end)
            if begin >= stop:
                if region.start >= end:
                    break
                continue
            if start < begin:
                yield Piece(start, begin - start, None)
            assert region.active is not None
            moved = region.active.start + begin - region.start
            yield Piece(begin, stop - begin, Active(region.active.mask, region.active.block_size, moved))
            start = stop
        if start < end:
            yield Piece(start, end - start, None)

    def _place(self, master: Tensor) -> tuple[Tensor, int]:
        """The tensor that a view lies in, and where."""
        for tensor in self._regions:
            offset = (master.data_ptr() - tensor.data_ptr()) // tensor.element_size()
            if tensor.numel() and 0 <= offset < tensor.numel():
                return tensor, offset
        raise AssertionError("a master weight lies in no tensor of the optimizer")

"""A topology step on the pieces of state that a rank holds: score, decide together, exchange masks, edit.

Layers of blocks: every rank adds the sums of squares of its slices into the block grid, one all-reduce completes them,
and each rank takes the same decision. Layers of single weights: scores stay where they are, the global top-k is a radix
select (``selection``), and only the new mask bits, one per weight, are exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megasparse.sparsity.evolution import Evolved, LayerPiece, StepCounts, evolve
from megasparse.sparsity.scores import block_norms, block_partial_sums, drop_scores
from megasparse.sparsity.state import StateAccess, StateFragment
from megasparse.sparsity.topology import Topology, pack_bits, unpack_bits


@dataclass(frozen=True)
class EvolvingLayer:
    """A layer that takes part in a topology step."""

    topology: Topology
    counts: StepCounts
    stream: int
    drop_score: str
    drop_score_lambda: float
    row_floor: bool


def update_layers(
    layers: Sequence[EvolvingLayer], access: StateAccess, seed: int, step: int
) -> dict[str, tuple[int, int]]:
    """Change the topologies and the state of `layers`. Returns units born and died by layer name, over all ranks."""
    fragments = access.fragments()
    blocks = [layer for layer in layers if layer.topology.unit > 1]
    weights = [layer for layer in layers if layer.topology.unit == 1]
    changes = _update_blocks(blocks, fragments, access, seed, step) if blocks else {}
    return changes | (_update_weights(weights, fragments, access, seed, step) if weights else {})


def _update_blocks(
    layers: Sequence[EvolvingLayer],
    fragments: Mapping[str, StateFragment],
    access: StateAccess,
    seed: int,
    step: int,
) -> dict[str, tuple[int, int]]:
    sums = [_block_sums(layer, fragments.get(layer.topology.name)) for layer in layers]
    flat = torch.cat([tensor.reshape(-1) for pair in sums for tensor in pair])
    access.sum_over_shards(flat)
    pieces, position = [], 0
    for layer in layers:
        num_units = layer.topology.num_units
        drop, growth = flat[position : position + 2 * num_units].view(2, num_units)
        position += 2 * num_units
        pieces.append(
            LayerPiece(
                stream=layer.stream,
                indices=torch.arange(num_units, device=flat.device),
                live=layer.topology.mask.reshape(-1).clone(),
                drop_score=block_norms(drop),
                growth_score=block_norms(growth),
                counts=layer.counts,
                row_length=layer.topology.mask.shape[1] if layer.row_floor else None,
            )
        )
    changes = {}
    # The sums are complete on every rank, so the selection is local and the same everywhere.
    for layer, evolved in zip(layers, evolve(pieces, seed, step), strict=True):
        changes[layer.topology.name] = _adopt(layer.topology, evolved.kept | evolved.grown)
        fragment = fragments.get(layer.topology.name)
        if fragment is not None:
            _edit(fragment, layer.topology, layer.topology.weights_slice(fragment.start, fragment.numel, evolved.kept))
    return changes


def _block_sums(layer: EvolvingLayer, fragment: StateFragment | None) -> tuple[Tensor, Tensor]:
    """This rank's share of the sums of squares behind drop and growth scores, float64 on the block grid."""
    grid, unit = tuple(layer.topology.mask.shape), layer.topology.unit
    if fragment is None:
        nothing = torch.zeros(grid, dtype=torch.float64, device=layer.topology.mask.device)
        return nothing, nothing.clone()
    drop, growth = _weight_scores(layer, fragment)
    return (
        block_partial_sums(drop, fragment.start, grid, unit),
        block_partial_sums(growth, fragment.start, grid, unit),
    )


def _update_weights(
    layers: Sequence[EvolvingLayer],
    fragments: Mapping[str, StateFragment],
    access: StateAccess,
    seed: int,
    step: int,
) -> dict[str, tuple[int, int]]:
    pieces = [_weight_piece(layer, fragments.get(layer.topology.name)) for layer in layers]
    results = evolve(pieces, seed, step, access.sum_over_shards)
    changes = {}
    for layer, live in zip(layers, _exchange_masks(layers, fragments, results, access), strict=True):
        changes[layer.topology.name] = _adopt(layer.topology, live)
    for layer, evolved in zip(layers, results, strict=True):
        fragment = fragments.get(layer.topology.name)
        if fragment is not None:
            _edit(fragment, layer.topology, evolved.kept)
    return changes


def _weight_piece(layer: EvolvingLayer, fragment: StateFragment | None) -> LayerPiece:
    device = layer.topology.mask.device
    if fragment is None:
        nothing = torch.zeros(0, device=device)
        empty = nothing.to(torch.int64), nothing.to(torch.bool)
        return LayerPiece(layer.stream, *empty, nothing, nothing, layer.counts)
    drop, growth = _weight_scores(layer, fragment)
    stop = fragment.start + fragment.numel
    return LayerPiece(
        stream=layer.stream,
        indices=torch.arange(fragment.start, stop, device=device),
        live=layer.topology.weights_slice(fragment.start, fragment.numel).clone(),
        drop_score=drop,
        growth_score=growth,
        counts=layer.counts,
    )


def _weight_scores(layer: EvolvingLayer, fragment: StateFragment) -> tuple[Tensor, Tensor]:
    gradient = fragment.gradient.to(torch.float32) / fragment.gradient_scale
    return drop_scores(layer.drop_score, fragment.master, gradient, layer.drop_score_lambda), gradient.abs()


def _exchange_masks(
    layers: Sequence[EvolvingLayer],
    fragments: Mapping[str, StateFragment],
    results: Sequence[Evolved],
    access: StateAccess,
) -> list[Tensor]:
    """The whole new mask of each layer, from the pieces of all ranks: one bit per weight in one all-reduce."""
    packed = []
    for layer, evolved in zip(layers, results, strict=True):
        live = torch.zeros(layer.topology.num_units, dtype=torch.bool)
        fragment = fragments.get(layer.topology.name)
        if fragment is not None:
            live[fragment.start : fragment.start + fragment.numel] = (evolved.kept | evolved.grown).cpu()
        packed.append(pack_bits(live))
    bits = torch.cat(packed).to(layers[0].topology.mask.device)
    # The pieces do not overlap, so that adding bytes joins their bits.
    access.sum_over_shards(bits)
    sizes = [part.numel() for part in packed]
    return [
        unpack_bits(part, layer.topology.num_units).to(layer.topology.mask.device)
        for part, layer in zip(bits.split(sizes), layers, strict=True)
    ]


def _adopt(topology: Topology, live: Tensor) -> tuple[int, int]:
    """Replace the mask; returns units born and died."""
    before = topology.mask.reshape(-1)
    born, died = int((live & ~before).sum()), int((before & ~live).sum())
    topology.replace(live)
    return born, died


@torch.no_grad()
def _edit(fragment: StateFragment, topology: Topology, kept: Tensor) -> None:
    """Weights and moments of all but kept weights become 0, gradients of dead ones too.

    masked_fill rather than a product with the mask, which would turn an infinite gradient into NaN.
    """
    gone = ~kept
    fragment.master.masked_fill_(gone, 0)
    for moment in fragment.moments.values():
        moment.masked_fill_(gone, 0)
    fragment.gradient.masked_fill_(~topology.weights_slice(fragment.start, fragment.numel), 0)

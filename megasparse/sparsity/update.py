"""A topology update on the pieces of state that a rank holds: score, decide together, exchange masks, edit.

Layers of blocks: every rank adds the sums of squares of its slices into the block grid, one all-reduce completes them,
and each rank takes the same decision. Layers of single weights: scores stay where they are, the global top-k is a radix
select (``selection``), and only the new mask bits, one per weight, are exchanged, between the ranks that share a
tensor-parallel shard. Layers are taken a few at a time, which bounds the memory that a step needs. With packed storage
(``slots``) drop scores come from the blocks that a rank holds, growth scores from its share of the dense gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megasparse.sparsity.chunks import chunks, positions
from megasparse.sparsity.dense_gradients import BlockShare
from megasparse.sparsity.evolution import Evolved, LayerPiece, StepCounts, evolve
from megasparse.sparsity.scores import DROP_SCORES, block_norms, block_partial_sums
from megasparse.sparsity.slots import EMPTY, Slots
from megasparse.sparsity.state import StateAccess, StateFragment
from megasparse.sparsity.topology import Topology, pack_bits, unpack_bits

# Of one rank; a unit in hand takes some 40 bytes of scores, numbers and masks.
UNITS_AT_ONCE = 2**22
# Every rank of a shard receives the new masks of all of it, a byte per weight.
MOST_SHARES_AT_ONCE = 8
EXTENT_BYTES = 17
"""That a rank's piece of a mask takes besides its bits: where it lies, and what fills up its last byte."""


@dataclass(frozen=True)
class EvolvingLayer:
    """A layer that takes part in a topology update."""

    topology: Topology
    counts: tuple[StepCounts, ...]
    """Of the whole layer; or, where shards are kept in balance, of each tensor-parallel shard."""
    stream: int
    drop_score: str
    drop_score_lambda: float
    row_floor: bool
    keep_regrown: bool = False
    """Units that are dropped and grown again in the same update keep their weights and moments."""
    slots: Slots | None = None
    """Where the blocks lie, with packed storage; None: the weight is the whole matrix."""
    importance: Tensor | None = None
    """Drop scores of this rank's fragment, float32 [n], in place of those by `drop_score`."""

    def untouched(self, piece: LayerPiece, evolved: Evolved) -> Tensor:
        """Units of a piece whose weights and moments stay as they are, bool [n]."""
        return evolved.kept | (evolved.grown & piece.active) if self.keep_regrown else evolved.kept


@dataclass(frozen=True)
class Change:
    """Units of this rank's shard that were grown and dropped."""

    grown: int
    dropped: int


def update_layers(layers: Sequence[EvolvingLayer], access: StateAccess, seed: int, step: int) -> dict[str, Change]:
    """Change the topologies and the state of `layers`. Returns what changed in this rank's shards, by layer name."""
    fragments = access.fragments()
    changes: dict[str, Change] = {}
    for update, chosen in (
        (_update_blocks, [layer for layer in layers if layer.topology.block_size > 1]),
        (_update_weights, [layer for layer in layers if layer.topology.block_size == 1]),
    ):
        for some in _portions(chosen, access.shard.size):
            changes |= update(some, fragments, access, seed, step)
    access.gradients_changed(changes)
    return changes


def _portions(layers: Sequence[EvolvingLayer], num_ranks: int) -> Iterator[list[EvolvingLayer]]:
    """Layers, few enough at once; the same portions on every rank.

    num_ranks: ranks that hold the pieces of a shard. At ZeRO stages 1 and 2 a rank holds a run of whole layers, so
    those of one portion come from all runs: otherwise one rank would work at a time.
    """
    stride = max(-(-len(layers) // num_ranks), 1)
    limit = UNITS_AT_ONCE * min(num_ranks, MOST_SHARES_AT_ONCE)
    portion: list[EvolvingLayer] = []
    for layer in (layer for first in range(stride) for layer in layers[first::stride]):
        if portion and sum(each.topology.num_units for each in [*portion, layer]) > limit:
            yield portion
            portion = []
        portion.append(layer)
    if portion:
        yield portion


def _update_blocks(
    layers: Sequence[EvolvingLayer],
    fragments: Mapping[str, StateFragment],
    access: StateAccess,
    seed: int,
    step: int,
) -> dict[str, Change]:
    shares = {layer.topology.name: access.dense_gradients.get(layer.topology.name) for layer in layers if layer.slots}
    sums = [_block_sums(layer, fragments.get(layer.topology.name), shares.get(layer.topology.name)) for layer in layers]
    flat = torch.cat([layer.topology.spread(part) for layer, pair in zip(layers, sums, strict=True) for part in pair])
    access.whole.sum_(flat)
    active = _whole_masks(layers, access)
    pieces, position = [], 0
    for layer, mask in zip(layers, active, strict=True):
        num_units = layer.topology.num_units
        drop, growth = flat[position : position + 2 * num_units].view(2, num_units)
        position += 2 * num_units
        pieces.append(_block_pieces(layer, mask, block_norms(drop), block_norms(growth)))
    # The sums are complete on every rank, so the selection is local and the same everywhere.
    results = iter(evolve([piece for several in pieces for piece in several], seed, step))
    changes = {}
    for layer, several in zip(layers, pieces, strict=True):
        whole = torch.zeros(2, layer.topology.num_units, dtype=torch.bool, device=flat.device)
        for piece in several:
            evolved = next(results)
            whole[0, piece.indices] = layer.untouched(piece, evolved)
            whole[1, piece.indices] = evolved.kept | evolved.grown
        untouched, active = layer.topology.pick(whole[0]), layer.topology.pick(whole[1])
        changes[layer.topology.name] = _adopt(layer.topology, active)
        fragment = fragments.get(layer.topology.name)
        if layer.slots is not None:
            _edit_slots(layer.slots, layer.topology, fragment, shares[layer.topology.name], untouched)
        elif fragment is not None:
            _edit(fragment, layer.topology, layer.topology.weights_slice(fragment.start, fragment.numel, untouched))
    return changes


def _whole_masks(layers: Sequence[EvolvingLayer], access: StateAccess) -> list[Tensor]:
    """Present masks of the whole matrices, bool [num_units] each."""
    flat = torch.cat([layer.topology.spread(layer.topology.mask).to(torch.uint8) for layer in layers])
    access.tensor_parallel.sum_(flat)
    return [part.to(torch.bool) for part in flat.split([layer.topology.num_units for layer in layers])]


def _block_pieces(layer: EvolvingLayer, active: Tensor, drop: Tensor, growth: Tensor) -> list[LayerPiece]:
    """The whole layer as one piece, or as one per shard that decides for itself; tensors: [num_units]."""
    topology = layer.topology
    numbers = torch.arange(topology.num_units, device=active.device)
    shards = [numbers] if len(layer.counts) == 1 else [topology.pick(numbers, r) for r in range(len(layer.counts))]
    return [
        LayerPiece(
            stream=layer.stream,
            indices=shard,
            active=active[shard],
            drop_score=drop[shard],
            growth_score=growth[shard],
            counts=counts,
            row_length=topology.whole_grid.shape[1] if layer.row_floor else None,
        )
        for shard, counts in zip(shards, layer.counts, strict=True)
    ]


def _block_sums(
    layer: EvolvingLayer, fragment: StateFragment | None, share: BlockShare | None
) -> tuple[Tensor, Tensor]:
    """This rank's share of the sums of squares behind drop and growth scores, float64 on the shard's block grid.

    share: of the dense gradient, with packed storage, where growth asks for it.
    """
    grid, block_size = tuple(layer.topology.mask.shape), layer.topology.block_size
    device = layer.topology.mask.device
    nothing = torch.zeros(grid, dtype=torch.float64, device=device)
    if layer.slots is not None:
        of_growth = nothing if share is None else share.square_sums(grid).to(device)
        if fragment is None:
            return nothing, of_growth
        drop, _ = _weight_scores(layer, fragment)
        return layer.slots.block_sums(drop, fragment.start, grid).to(device), of_growth
    if fragment is None:
        return nothing, nothing
    drop, growth = _weight_scores(layer, fragment)
    return (
        block_partial_sums(drop, fragment.start, grid, block_size).to(device),
        block_partial_sums(growth, fragment.start, grid, block_size).to(device),
    )


def _update_weights(
    layers: Sequence[EvolvingLayer],
    fragments: Mapping[str, StateFragment],
    access: StateAccess,
    seed: int,
    step: int,
) -> dict[str, Change]:
    pieces = [_weight_pieces(layer, fragments.get(layer.topology.name)) for layer in layers]
    results = evolve([piece for several in pieces for piece in several], seed, step, access.whole.sum_)
    # Of the pieces of one layer at most one is this rank's: the others are empty.
    own, untouched, position = [], [], 0
    for layer, several in zip(layers, pieces, strict=True):
        number = layer.topology.rank if len(several) > 1 else 0
        own.append(results[position + number])
        untouched.append(layer.untouched(several[number], own[-1]))
        position += len(several)
    changes = {}
    for layer, active in zip(layers, _exchange_masks(layers, fragments, own, access), strict=True):
        changes[layer.topology.name] = _adopt(layer.topology, active)
    for layer, units in zip(layers, untouched, strict=True):
        fragment = fragments.get(layer.topology.name)
        if fragment is not None:
            _edit(fragment, layer.topology, units)
    return changes


def _weight_pieces(layer: EvolvingLayer, fragment: StateFragment | None) -> list[LayerPiece]:
    """This rank's piece of the layer; with shards that decide for themselves, one per shard, empty but for its own."""
    topology = layer.topology
    pieces = []
    for rank, counts in enumerate(layer.counts):
        is_own = fragment is not None and rank in (topology.rank, *([0] if len(layer.counts) == 1 else []))
        pieces.append(_weight_piece(layer, fragment if is_own else None, counts))
    return pieces


def _weight_piece(layer: EvolvingLayer, fragment: StateFragment | None, counts: StepCounts) -> LayerPiece:
    topology, device = layer.topology, layer.topology.mask.device
    if fragment is None:
        nothing = torch.zeros(0, device=device)
        empty = nothing.to(torch.int64), nothing.to(torch.bool)
        return LayerPiece(layer.stream, *empty, nothing, nothing, counts)
    drop, growth = _weight_scores(layer, fragment)
    return LayerPiece(
        stream=layer.stream,
        indices=topology.unit_numbers(fragment.start, fragment.numel),
        active=topology.weights_slice(fragment.start, fragment.numel).clone(),
        drop_score=drop.to(device),
        growth_score=growth.to(device),
        counts=counts,
    )


def _weight_scores(layer: EvolvingLayer, fragment: StateFragment) -> tuple[Tensor, Tensor]:
    gradient = fragment.gradient.to(torch.float32)
    if fragment.gradient_scale != 1.0:
        gradient = gradient / fragment.gradient_scale
    if layer.importance is not None:
        return layer.importance, gradient.abs()
    score = DROP_SCORES[layer.drop_score].score
    return score(fragment.master, gradient, layer.drop_score_lambda), gradient.abs()


def _exchange_masks(
    layers: Sequence[EvolvingLayer],
    fragments: Mapping[str, StateFragment],
    results: Sequence[Evolved],
    access: StateAccess,
) -> list[Tensor]:
    """The new mask of this rank's shard of each layer, from the pieces of its ranks: one bit per weight, gathered, or
    added up where there are so many ranks that it would take more to say which piece each has."""
    masks: dict[str, Tensor] = {}
    for exchange in (_gather_masks, _add_masks):
        some, own = [], {}
        for layer, evolved in zip(layers, results, strict=True):
            if masks_are_added(layer.topology, access.shard.size) == (exchange is _add_masks):
                some.append(layer)
                own[layer.topology.name] = evolved.kept | evolved.grown
        if some:
            masks |= exchange(some, fragments, own, access)
    return [masks[layer.topology.name].to(layer.topology.mask.device) for layer in layers]


def masks_are_added(topology: Topology, num_ranks: int) -> bool:
    """Whether the pieces of a mask are added up over the ranks of a shard: twice its bits, however many they are."""
    return num_ranks * EXTENT_BYTES > topology.shard_units // 8


def _add_masks(
    layers: Sequence[EvolvingLayer],
    fragments: Mapping[str, StateFragment],
    own: Mapping[str, Tensor],
    access: StateAccess,
) -> dict[str, Tensor]:
    """Masks by name. own: this rank's pieces. Pieces do not overlap, so that adding joins their bits."""
    sizes = [layer.topology.shard_units for layer in layers]
    active, start = torch.zeros(sum(sizes), dtype=torch.bool), 0
    for layer, size in zip(layers, sizes, strict=True):
        fragment = fragments.get(layer.topology.name)
        if fragment is not None:
            active[start + fragment.start :][: fragment.numel] = own[layer.topology.name].cpu()
        start += size
    bits = pack_bits(active).to(layers[0].topology.mask.device)
    joined = unpack_bits(access.shard.sum_(bits).cpu(), len(active)).split(sizes)
    return {layer.topology.name: mask for layer, mask in zip(layers, joined, strict=True)}


def _gather_masks(
    layers: Sequence[EvolvingLayer],
    fragments: Mapping[str, StateFragment],
    own: Mapping[str, Tensor],
    access: StateAccess,
) -> dict[str, Tensor]:
    """Masks by name. own: this rank's pieces."""
    device = layers[0].topology.mask.device
    extents, bits = [], []
    for layer in layers:
        fragment = fragments.get(layer.topology.name)
        extents.append((0, 0) if fragment is None else (fragment.start, fragment.numel))
        bits.append(pack_bits(own[layer.topology.name]))
    all_extents = access.shard.gather(torch.tensor(extents, device=device)).cpu()
    lengths = [int((-(-of_rank[:, 1] // 8)).sum()) for of_rank in all_extents]
    sent = torch.zeros(max(lengths), dtype=torch.uint8)
    sent[: lengths[access.shard.rank]] = torch.cat(bits)
    received = access.shard.gather(sent.to(device)).cpu()
    masks = {layer.topology.name: torch.zeros(layer.topology.shard_units, dtype=torch.bool) for layer in layers}
    for of_rank, row in zip(all_extents.tolist(), received, strict=True):
        position = 0
        for mask, (start, numel) in zip(masks.values(), of_rank, strict=True):
            num_bytes = -(-numel // 8)
            mask[start : start + numel] = unpack_bits(row[position : position + num_bytes], numel)
            position += num_bytes
    return masks


def _adopt(topology: Topology, active: Tensor) -> Change:
    """Replace the mask of the shard."""
    before = topology.mask.reshape(-1)
    both = int((active & before).count_nonzero())
    change = Change(int(active.count_nonzero()) - both, int(before.count_nonzero()) - both)
    topology.replace(active)
    return change


@torch.no_grad()
def _edit(fragment: StateFragment, topology: Topology, untouched: Tensor) -> None:
    """Weights and moments of all but untouched weights become 0, gradients of inactive ones too."""
    for tensor in (fragment.master, *fragment.moments.values()):
        _clear(tensor, untouched)
    _clear(fragment.gradient, topology.weights_slice(fragment.start, fragment.numel))


@torch.no_grad()
def _edit_slots(
    slots: Slots, topology: Topology, fragment: StateFragment | None, share: BlockShare | None, untouched: Tensor
) -> None:
    """Let the slots follow the new mask. Weights and moments of all but untouched blocks become 0; a slot that has a
    new block gets its dense gradient, where there is one; gradients of other blocks that came or went become 0.

    untouched: bool by block of the shard. share: all its owners call it alike.
    """
    before = slots.slot_blocks.clone()
    slots.follow(topology.mask)
    stays = (slots.slot_blocks == before) & (before != EMPTY)
    new = positions((slots.slot_blocks != EMPTY) & ~stays)
    gradients = None if share is None else share.gather(slots.slot_blocks[new].long().to(share.blocks.device))
    if fragment is None:
        return
    start, numel = fragment.start, fragment.numel
    kept = slots.entries(slots.of_blocks(untouched), start, numel)
    for tensor in (fragment.master, *fragment.moments.values()):
        _clear(tensor, kept)
    _clear(fragment.gradient, slots.entries(stays, start, numel))
    if gradients is not None:
        slots.write(fragment.gradient, start, new, gradients)


def _clear(values: Tensor, kept: Tensor) -> None:
    """Set all but the kept values to 0, also infinite ones: an AND of bits, at a fifth of the time of masked_fill."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    for part, mask in chunks(values.view(integers), kept.to(values.device)):
        part &= mask.to(integers).neg_()

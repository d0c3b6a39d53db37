"""What it costs to drop weights, by a second-order model of the loss: optimal BERT surgeon (oBERT).

    fisher = BlockFisher(topology, side=16, damping=0.01, ranks=access.shard)
    fisher.add(gradient)                                    # of each of M steps, the whole matrix's
    scores = fisher.scores(weights)                         # before a topology update
    change = fisher.compensation()                          # after it: of the weights that stay

Kurtic et al. 2022, arXiv 2203.07259: F = lambda I + 1/M sum of g g^T in blocks of B weights. Dropping the set Q costs
1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q, which is w_q^2 / (2 [F^-1]_qq) for one weight, if all others follow by
-F^-1_.Q ([F^-1]_QQ)^-1 w_Q. There the inverse is kept, by the Sherman-Morrison formula, gradient after gradient. Here
it is the sum of g g^T, of the same size, which is factorised once in float64: the same numbers, without what cancels in
float32 where lambda is small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megasparse.sparsity.state import Ranks
from megasparse.sparsity.topology import Topology

ENTRIES_AT_ONCE = 2**22
"""Of Fisher blocks that are factorised together, in float64."""
LEAST_DAMPING = 1e-30
"""Where no gradient reached an active weight: it costs nothing to drop it."""


class BlockFisher:
    """The empirical Fisher matrix of one sparse matrix, on the rank that owns some of its blocks.

    A block is `side` neighbours of a row, in the last of each row with zeros where the row ends. `ranks` share the
    blocks of the matrix evenly; all of them call every method alike. The matrix is not divided by tensor parallelism.
    """

    def __init__(self, topology: Topology, side: int, damping: float, ranks: Ranks) -> None:
        assert topology.num_shards == 1, topology.name
        self.topology, self.side, self.damping, self.ranks = topology, side, damping, ranks
        self.width = topology.shard_width
        self.rows = topology.numel // self.width
        self.per_row = -(-self.width // side)
        self.num_blocks = self.rows * self.per_row
        self.first, self.end = (self.num_blocks * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
        self.group = min(topology.block_size, side)
        """Weights of a block that are dropped together."""
        self.clear()

    def clear(self) -> None:
        """Forget all gradients."""
        self.sums: Tensor | None = None
        """Sum of g g^T, float32 [own blocks, side, side]."""
        self.count = 0
        self._weights = self._active = torch.zeros(0, self.side)

    @torch.no_grad()
    def add(self, gradient: Tensor) -> None:
        """gradient: float32 [numel] of the whole matrix. That of inactive weights is left out."""
        own = self._own(gradient.masked_fill(~self._mask(), 0.0))
        if self.sums is None:
            self.sums = own.new_zeros(len(own), self.side, self.side)
        self.sums.baddbmm_(own.unsqueeze(2), own.unsqueeze(1))
        self.count += 1

    @torch.no_grad()
    def scores(self, weights: Tensor) -> Tensor:
        """Scores whose squares, summed over a unit, are what dropping it costs: float32 [numel]. Where a unit reaches
        over several Fisher blocks, the costs of its parts add up. weights: float32 [numel], before the update."""
        self._weights, self._active = self._own(weights), self._own(self._mask())
        found = torch.zeros_like(self._weights)
        for part in self._parts():
            fisher = self._fisher(part)
            costs = drop_costs(fisher, self._weights[part].double(), self.group)
            found[part] = (costs / self.group).sqrt().repeat_interleave(self.group, dim=1)
        return self._whole(found)

    @torch.no_grad()
    def compensation(self) -> Tensor:
        """What is to be added to the weights that stay, now that the mask has changed: float32 [numel], 0 elsewhere.
        The weights are those that ``scores`` was given."""
        stays = self._own(self._mask()) & self._active
        gone = self._active & ~stays
        found = torch.zeros_like(self._weights)
        for part in self._parts():
            found[part] = compensate(self._fisher(part), self._weights[part].double(), gone[part], stays[part]).float()
        return self._whole(found)

    def packed(self) -> Tensor:
        """The sums of all blocks, lower triangles: float32 [num_blocks, side (side + 1) / 2], the same on all ranks."""
        assert self.sums is not None, "no gradient was added"
        row, column = torch.tril_indices(self.side, self.side, device=self.sums.device)
        whole = self.sums.new_zeros(self.num_blocks, len(row))
        whole[self.first : self.end] = self.sums[:, row, column]
        return self.ranks.sum_(whole)

    def unpack(self, saved: Tensor, count: int) -> None:
        """Go on from what ``packed`` gave after `count` gradients. Raises ValueError where it is of another shape."""
        row, column = torch.tril_indices(self.side, self.side)
        if saved.shape != (self.num_blocks, len(row)):
            raise ValueError(
                f"saved Fisher matrix of layer {self.topology.name} is {tuple(saved.shape)}, but second_order."
                f"fisher_block {self.side} makes it {(self.num_blocks, len(row))}"
            )
        own = saved[self.first : self.end].to(self.topology.mask.device)
        self.sums = own.new_zeros(len(own), self.side, self.side)
        self.sums[:, row, column] = own
        self.sums[:, column, row] = own
        self.count = count

    def _mask(self) -> Tensor:
        return self.topology.weights_slice(0, self.topology.numel)

    def _own(self, flat: Tensor) -> Tensor:
        """Own blocks [n, side] of a whole flat matrix."""
        padding = self.per_row * self.side - self.width
        rows = torch.nn.functional.pad(flat.view(self.rows, self.width), (0, padding))
        return rows.view(self.num_blocks, self.side)[self.first : self.end].clone()

    def _whole(self, own: Tensor) -> Tensor:
        """The whole flat matrix from the blocks of all ranks."""
        blocks = own.new_zeros(self.num_blocks, self.side)
        blocks[self.first : self.end] = own
        self.ranks.sum_(blocks)
        return blocks.view(self.rows, self.per_row * self.side)[:, : self.width].reshape(-1)

    def _parts(self) -> list[slice]:
        size = max(ENTRIES_AT_ONCE // self.side**2, 1)
        return [slice(start, start + size) for start in range(0, self.end - self.first, size)]

    def _fisher(self, part: slice) -> Tensor:
        """Some blocks with their damping, float64 [n, side, side]."""
        assert self.sums is not None, "no gradient was added"
        fisher = self.sums[part].double() / self.count
        diagonal = fisher.diagonal(dim1=1, dim2=2)
        mean = diagonal.sum(dim=1) / self._active[part].sum(dim=1).clamp(min=1)
        diagonal += (self.damping * mean).clamp(min=LEAST_DAMPING).unsqueeze(1)
        return fisher


def drop_costs(fisher: Tensor, weights: Tensor, group: int) -> Tensor:
    """1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q of each run Q of `group` weights: [n, side / group].

    fisher: [n, side, side], positive definite. weights: [n, side].
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(fisher))
    if group == 1:
        return weights.square() / (2 * inverse.diagonal(dim1=1, dim2=2))
    runs = weights.unflatten(1, (-1, group))
    number = runs.shape[1]
    own = inverse.view(-1, number, group, number, group).diagonal(dim1=1, dim2=3).movedim(-1, 1)
    return (runs * torch.linalg.solve(own, runs.unsqueeze(-1)).squeeze(-1)).sum(dim=2) / 2


def compensate(fisher: Tensor, weights: Tensor, gone: Tensor, stays: Tensor) -> Tensor:
    """The change of the weights K that stay by which the loss rises least once the set Q is gone, all of Q at a time:
    F_KK^-1 F_KQ w_Q, which is -F^-1_KQ ([F^-1]_QQ)^-1 w_Q. [n, side], 0 outside K.

    fisher: [n, side, side]. weights: [n, side]. gone, stays: bool, without a common weight.
    """
    right = (fisher @ (weights * gone).unsqueeze(-1)).squeeze(-1) * stays
    both = stays.unsqueeze(1) & stays.unsqueeze(2)
    identity = torch.eye(fisher.shape[1], dtype=fisher.dtype, device=fisher.device)
    factor = torch.linalg.cholesky(torch.where(both, fisher, identity))
    return torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1) * stays

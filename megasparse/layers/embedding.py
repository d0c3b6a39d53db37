"""Embeddings: the token table, learned positions, and their sum at the bottom of the model.

The rows of the token table are divided over the tensor-parallel ranks; each rank looks up the tokens that it holds, and
the sum over the ranks is the embedding. A tied head shares the parameter of the table. Where that head is sparse the
look-up must follow the same mask and gradient rule, so the table hands its look-ups to the head once it is tied.
Tensor names: B samples, T tokens, C hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megasparse.layers.init import divided_parameter
from megasparse.layers.linear import Linear
from megasparse.parallel import ShardSpec, TensorParallel


class Embedding(nn.Module):
    """A table [rows, width]; `name` keys the initial weights, see `Linear`.

    divided: each rank of `tensor_parallel` holds an equal range of the rows; otherwise all of them.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        width: int,
        *,
        divided: bool = False,
        tensor_parallel: TensorParallel | None = None,
        init_std: float = 0.02,
        seed: int | None = 0,
        deferred: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.rows, self.width = name, rows, width
        self.tensor_parallel = tensor_parallel or TensorParallel()
        partition = ShardSpec((rows, width), 0 if divided else None, self.tensor_parallel.size)
        rank = self.tensor_parallel.rank
        self.first_row, self.local_rows = (rank * partition.local_shape[0] if divided else 0), partition.local_shape[0]
        self.weight = divided_parameter(
            partition, rank, std=init_std, seed=seed, name=f"{name}.weight", deferred=deferred
        )
        self._tied: tuple[Linear, ...] = ()

    def tie(self, head: Linear) -> None:
        """Look rows up through `head`, whose parameter is this table's: a head in packed storage brings its own."""
        assert head.partition.shape == (self.rows, self.width), f"{head.name} is not of the shape of {self.name}"
        self.weight, head.drawn_as = head.weight, self.name
        # In a tuple the head does not become a submodule, so its parameters keep their one place and name.
        self._tied = (head,)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Integer ids of any shape -> [*ids.shape, width], the same on every rank."""
        if self.local_rows == self.rows:
            return self._lookup(ids)
        local = ids - self.first_row
        elsewhere = (local < 0) | (local >= self.local_rows)
        found = self._lookup(local.masked_fill(elsewhere, 0)).masked_fill(elsewhere.unsqueeze(-1), 0)
        return self.tensor_parallel.reduce_from_tensor_parallel_region(found)

    def _lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return self._tied[0].lookup(ids) if self._tied else F.embedding(ids, self.weight)

    def extra_repr(self) -> str:
        return f"{self.name}, {self.rows} x {self.width}"


class InputEmbedding(nn.Module):
    """Token embedding plus, where there is a table for them, learned positions.

    reset_positions: positions count from the first token of each document.
    """

    def __init__(self, tokens: Embedding, positions: Embedding | None, reset_positions: bool = False) -> None:
        super().__init__()
        self.tokens = tokens
        self.positions = positions
        self.reset_positions = reset_positions

    def forward(
        self, tokens_BT: torch.Tensor, documents_BT: torch.Tensor | None = None, first: int | tuple[int, ...] = 0
    ) -> torch.Tensor:
        """Returns [B, T, C], under sequence parallelism this rank's share of the T tokens.

        documents_BT: see `GPT.forward`. first: position of the first token, or those of all of them.
        Raises ValueError where the positions exceed the table of learned ones.
        """
        x_BTC = self.tokens(tokens_BT)
        if self.positions is not None:
            end = max(first) + 1 if isinstance(first, tuple) else first + tokens_BT.shape[1]
            if end > self.positions.rows:
                raise ValueError(f"seq_length: {end} tokens exceed the {self.positions.rows} learned positions")
            position = torch.arange(end, device=tokens_BT.device)
            position = position[list(first)] if isinstance(first, tuple) else position[first:]
            if self.reset_positions and documents_BT is not None:
                position = position - document_starts(documents_BT)
            x_BTC = x_BTC + self.positions(position)
        return self.tokens.tensor_parallel.scatter_to_sequence_parallel_region(x_BTC)


def document_starts(documents_BT: torch.Tensor) -> torch.Tensor:
    """For each token the position of the first token of its document in the sample, int64 [B, T]."""
    rows = documents_BT.contiguous()
    return torch.searchsorted(rows, rows)

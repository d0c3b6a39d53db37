"""Embeddings: the token table, learned positions, and their sum at the bottom of the model.

A tied head shares the parameter of the token table. Where that head is sparse the look-up must follow the same mask
and gradient rule, so the table hands its look-ups to the head once it is tied.
Tensor names: B samples, T tokens, C hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megasparse.layers.init import normal_
from megasparse.layers.linear import Linear


class Embedding(nn.Module):
    """A table [rows, width]; `name` keys the initial weights, see `Linear`."""

    def __init__(self, name: str, rows: int, width: int, *, init_std: float = 0.02, seed: int = 0) -> None:
        super().__init__()
        self.name, self.rows, self.width = name, rows, width
        self.weight = nn.Parameter(torch.empty(rows, width))
        normal_(self.weight, init_std, seed, f"{name}.weight")
        self._tied: tuple[Linear, ...] = ()

    def tie(self, head: Linear) -> None:
        """Look rows up through `head`, which shares this table's weight."""
        assert head.weight is self.weight, f"{head.name} does not share the weight of {self.name}"
        # In a tuple the head does not become a submodule, so its parameters keep their one place and name.
        self._tied = (head,)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Integer ids of any shape -> [*ids.shape, width]."""
        if self._tied:
            return self._tied[0].lookup(ids)
        return F.embedding(ids, self.weight)

    def extra_repr(self) -> str:
        return f"{self.name}, {self.rows} x {self.width}"


class InputEmbedding(nn.Module):
    """Token embedding plus, where there is a table for them, learned positions."""

    def __init__(self, tokens: Embedding, positions: Embedding | None) -> None:
        super().__init__()
        self.tokens = tokens
        self.positions = positions

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Returns [B, T, C]. Raises ValueError where T exceeds the table of learned positions."""
        x_BTC = self.tokens(tokens_BT)
        if self.positions is None:
            return x_BTC
        T = tokens_BT.shape[1]
        if T > self.positions.rows:
            raise ValueError(f"seq_length: {T} tokens exceed the {self.positions.rows} learned positions")
        return x_BTC + self.positions(torch.arange(T, device=tokens_BT.device))

"""The factory that decides, layer by layer, between a plain and a sparse linear layer.

Models ask the factory for their layers by name and stay free of sparsity: ``LayerFactory(sparse=rule, seed=1234)``,
where the rule returns a ``SparseSpec`` for the layers that shall be sparse and None for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from megasparse.layers.embedding import Embedding
from megasparse.layers.linear import Linear, SparseLinear


@dataclass(frozen=True)
class SparseSpec:
    """How a sparse layer is built."""

    unit: int
    """Side of the square blocks that live and die together; 1: single weights."""
    low_rank: int = 0
    """Rank of the dense side path; 0: none."""


def never_sparse(name: str) -> SparseSpec | None:
    """The rule of a dense model."""
    return None


@dataclass(frozen=True)
class LayerFactory:
    """Makes the layers of a model; all initial weights depend on `seed` and on the layers' names only."""

    sparse: Callable[[str], SparseSpec | None] = never_sparse
    """Layer name, such as `layers.3.mlp.up` or `head`, -> how it is sparse; None: plain."""
    seed: int = 0
    """Seed of the initial weights."""
    kernel: str = "auto"
    """Kernel of the sparse linear layers."""

    def linear(
        self,
        name: str,
        in_features: int,
        out_features: int,
        bias: bool,
        init_std: float,
        weight: nn.Parameter | None = None,
    ) -> Linear:
        """A linear layer, sparse if the rule says so; `weight` is a parameter to share (tied head).

        Raises ValueError where the unit does not divide the widths.
        """
        spec = self.sparse(name)
        common = {"bias": bias, "init_std": init_std, "seed": self.seed, "weight": weight}
        if spec is None:
            return Linear(name, in_features, out_features, **common)
        return SparseLinear(
            name, in_features, out_features, unit=spec.unit, low_rank=spec.low_rank, kernel=self.kernel, **common
        )

    def embedding(self, name: str, rows: int, width: int, init_std: float) -> Embedding:
        """A table of `rows` vectors."""
        return Embedding(name, rows, width, init_std=init_std, seed=self.seed)

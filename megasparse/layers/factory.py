"""The factory that decides, layer by layer, between a plain and a sparse linear layer.

Models ask the factory for their layers by name and stay free of sparsity: ``LayerFactory(sparse=rule, seed=1234)``,
where the rule returns a ``SparseSpec`` for the layers that shall be sparse and None for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from torch import nn

from megasparse.config.schema import ModelConfig
from megasparse.config.tensor_train import TensorTrainConfig
from megasparse.layers.delta import DeltaLinear
from megasparse.layers.embedding import Embedding
from megasparse.layers.linear import Linear, SparseLinear
from megasparse.layers.normalization import Normalization, NormalizationOfSum
from megasparse.layers.packed import PackedLinear
from megasparse.layers.residual_weight import PlainSum, ResidualWeight
from megasparse.layers.tensor_train import TensorTrainLinear
from megasparse.parallel import TensorParallel, shard_spec_of

Norm = TypeVar("Norm", bound=Normalization)


@dataclass(frozen=True)
class SparseSpec:
    """How a sparse layer is built."""

    block_size: int
    """Side of the square blocks that are dropped and grown together; 1: single weights."""
    low_rank: int = 0
    """Rank of the dense low-rank branch; 0: none."""
    capacity: int | None = None
    """Blocks that each rank has room for in packed storage (``PackedLinear``); None: dense storage."""


@dataclass(frozen=True)
class LayerFactory:
    """Makes the layers of a model; all initial weights depend on `seed` and on the layers' names only."""

    sparse: Callable[[str], SparseSpec | None] = lambda name: None
    """Layer name, such as `layers.3.mlp.up` or `head`, -> how it is sparse; None: plain."""
    seed: int | None = 0
    """Seed of the initial weights."""
    kernel: str = "auto"
    """Kernel of the sparse linear layers."""
    tensor_parallel: TensorParallel = field(default_factory=TensorParallel)
    """The ranks that share each layer."""
    break_even: float | None = None
    """Density above which the kernel `auto` takes dense products; None: as measured."""
    elementwise: str = "auto"
    """Kernel of what lies between the products."""
    deferred: bool = False
    """Parameters are divided further as soon as they are made (ZeRO stage 3), and only then are initial weights
    drawn."""
    dense: str = "auto"
    """What computes dense products."""
    tuned: Callable[[str], int | None] = lambda name: None
    """Layer name -> side of the units of which some are trained while all else is frozen (``DeltaLinear``); None: it is
    not such a layer."""
    train: Callable[[str], TensorTrainConfig | None] = lambda name: None
    """Layer name -> rank and cores of its weight, a tensor train; None: it is a matrix."""

    def column(
        self,
        name: str,
        in_features: int,
        parts: int | Sequence[int],
        bias: bool,
        init_std: float,
        weight: nn.Parameter | None = None,
    ) -> Linear:
        """A linear layer whose outputs are divided over the ranks; several `parts` are fused, each divided by itself.

        weight: a parameter to share (tied head); a layer in packed storage has one of its own, which the table takes
        over (``Embedding.tie``). Raises ValueError where the unit does not divide the shards.
        """
        parts = (parts,) if isinstance(parts, int) else tuple(parts)
        settings = {"parts": parts if len(parts) > 1 else (), "weight": weight, "division": "column"}
        layer = self._linear(name, in_features, sum(parts), bias=bias, init_std=init_std, **settings)
        assert weight is None or shard_spec_of(weight) == layer.partition, f"{name}: {shard_spec_of(weight)} is shared"
        return layer

    def row(self, name: str, in_features: int, out_features: int, bias: bool, init_std: float) -> Linear:
        """A linear layer whose inputs are divided over the ranks. Raises ValueError as ``column`` does."""
        return self._linear(name, in_features, out_features, bias=bias, init_std=init_std, division="row")

    def embedding(self, name: str, rows: int, width: int, init_std: float, *, divided: bool = False) -> Embedding:
        """A table of `rows` vectors, whose rows may be divided over the ranks."""
        return Embedding(name, rows, width, divided=divided, init_std=init_std, **self._drawing())

    def norm(self, config: ModelConfig) -> Normalization:
        """A normalisation between layers."""
        return self._norm(Normalization, config)

    def norm_of_sum(self, config: ModelConfig) -> NormalizationOfSum:
        """One that comes after an addition to the residual stream."""
        return self._norm(NormalizationOfSum, config)

    def _norm(self, made: type[Norm], config: ModelConfig) -> Norm:
        kind, size, epsilon, bias = config.normalization, config.hidden_size, config.normalization_epsilon, config.bias
        settings: dict[str, Any] = {"tensor_parallel": self.tensor_parallel, "kernel": self.elementwise}
        return made(kind, size, epsilon=epsilon, bias=bias, **settings)

    def residual_sum(self, config: ModelConfig) -> ResidualWeight | PlainSum:
        """The sum of a branch and its input, where normalisation comes after it."""
        if config.residual_weight == "admin":
            return ResidualWeight(config.hidden_size, self.tensor_parallel)
        return PlainSum()

    def _linear(self, name: str, in_features: int, out_features: int, **settings: Any) -> Linear:
        settings |= self._drawing() | {"dense_kernel": self.dense}
        unit = self.tuned(name)
        if unit is not None:
            return DeltaLinear(name, in_features, out_features, unit=unit, **settings)
        spec, train = self.sparse(name), self.train(name)
        if train is not None and train.rank is not None:
            if spec is not None:
                raise ValueError(
                    f"algorithm: layer {name} is a tensor train (tensor_train.rank), whose entries are no parameters; "
                    "must be dense"
                )
            settings.pop("weight", None)
            return TensorTrainLinear(name, in_features, out_features, rank=train.rank, cores=train.cores, **settings)
        if spec is None:
            return Linear(name, in_features, out_features, **settings)
        options = asdict(spec)
        capacity = options.pop("capacity")
        settings |= {"kernel": self.kernel, "break_even": self.break_even, **options}
        if capacity is None:
            return SparseLinear(name, in_features, out_features, **settings)
        settings.pop("weight", None)
        return PackedLinear(name, in_features, out_features, capacity=capacity, **settings)

    def _drawing(self) -> dict[str, Any]:
        return {"seed": self.seed, "tensor_parallel": self.tensor_parallel, "deferred": self.deferred}

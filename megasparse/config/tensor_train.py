"""The section `tensor_train`: matrices of MLPs as products of small cores (Chekalina et al. 2023, arXiv 2306.02697),
the sizes of these, and what they do not go with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from megasparse.config.section import PositiveInt, Section

if TYPE_CHECKING:
    from megasparse.config.schema import RunConfig


class TensorTrainConfig(Section):
    rank: PositiveInt | None = None
    """Rank between neighbouring cores of each MLP matrix, which is trained as a tensor train; checkpoints hold the
    cores, model folders and exports the matrices. Unset: matrices."""
    cores: Annotated[int, Field(ge=2, le=4)] = 2
    """Cores of a matrix. The widths of the MLP are divided into as many factors, as equal as they can be."""


@dataclass(frozen=True)
class TensorTrainShape:
    """A matrix of prod(rows) x prod(columns) entries W[i_1 .. i_d, j_1 .. j_d] = G_1[i_1, j_1] ... G_d[i_d, j_d], each
    G_k[i, j] a matrix of ranks[k - 1] x ranks[k]."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    ranks: tuple[int, ...]
    """From the left of the first core, 1, to the right of the last one, 1."""

    @classmethod
    def of(cls, parts: Sequence[int], in_features: int, cores: int, rank: int) -> TensorTrainShape:
        """parts: equal widths of the fused outputs, which the first core tells apart. Between two cores the rank is no
        larger than that of any matrix there."""
        assert len(set(parts)) == 1, parts
        first, *others = factors(parts[0], cores)
        rows, columns = (len(parts) * first, *others), factors(in_features, cores)
        sizes = [m * n for m, n in zip(rows, columns, strict=True)]
        largest = [min(prod(sizes[:k]), prod(sizes[k:])) for k in range(cores + 1)]
        return cls(rows, columns, tuple(min(rank, most) for most in largest))

    @property
    def cores(self) -> list[tuple[int, int, int, int]]:
        """Rank on the left, rows, columns, rank on the right of each core."""
        return list(zip(self.ranks[:-1], self.rows, self.columns, self.ranks[1:], strict=True))


def factors(width: int, count: int) -> tuple[int, ...]:
    """`count` factors of a width, the largest first, as equal as its divisors allow."""
    if count == 1:
        return (width,)
    first = next(d for d in range(1, width + 1) if width % d == 0 and d**count >= width)
    return (first, *factors(width // first, count - 1))


def mlp_shapes(config: RunConfig, rank: int) -> dict[str, TensorTrainShape]:
    """Of the matrices of an MLP, by name."""
    # Here, as it imports torch.
    from megasparse.utils.activations import ACTIVATIONS

    hidden, width, cores = config.model.hidden_size, config.model.mlp_width, config.tensor_train.cores
    name, parts = ("gate_up", [width] * 2) if ACTIVATIONS[config.model.activation].gated else ("up", [width])
    return {
        name: TensorTrainShape.of(parts, hidden, cores, rank),
        "down": TensorTrainShape.of([hidden], width, cores, rank),
    }


def without_tensor_train(config: RunConfig) -> RunConfig:
    """For a model whose matrices have been assembled."""
    return config.model_copy(update={"tensor_train": TensorTrainConfig()})


def tensor_train_conflicts(config: RunConfig) -> list[str]:
    """What contradicts the section, one sentence each."""
    rank, size = config.tensor_train.rank, config.parallel.tensor_parallel_size
    if rank is None:
        return []
    most = min(max(shape.ranks) for shape in mlp_shapes(config, 2**62).values())
    first = factors(config.model.mlp_width, config.tensor_train.cores)[0]
    refused: dict[str, tuple[bool, object, str]] = {
        # Ranks divide the first core.
        "parallel.tensor_parallel_size": (
            first % size > 0,
            size,
            f"a divisor of {first}, the first factor of the MLP's width {config.model.mlp_width}",
        ),
        # Folders hold matrices, which are not divided into cores.
        "train.init_from": (config.train.init_from is not None, config.train.init_from, "unset"),
        # Masks, clusters and adapters are of the entries of matrices.
        "sparsity.algorithm": (config.sparsity.algorithm != "dense", config.sparsity.algorithm, "dense"),
        "smt.density": (config.smt.density is not None, config.smt.density, "unset"),
        "spiel.density": (config.spiel.density is not None, config.spiel.density, "unset"),
        "switching.clusters": (config.switching.clusters is not None, config.switching.clusters, "unset"),
        "activation_sparsity.pattern": (config.activation_sparsity.pattern != "none", "2:4", "none"),
    }
    # With the largest rank a train is any matrix.
    found = [f"tensor_train.rank: {rank} is more than the model's matrices have; must be 1 to {most}"] * (rank > most)
    return found + [
        f"{field}: {value} does not go with tensor_train.rank; must be {must}, or tensor_train.rank unset"
        for field, (is_refused, value, must) in refused.items()
        if is_refused
    ]

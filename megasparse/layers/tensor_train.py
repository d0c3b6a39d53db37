"""Linear layers whose weight is a tensor train, a product of small cores (Chekalina et al. 2023, arXiv 2306.02697).

    layer = TensorTrainLinear(name, inputs, outputs, rank=16, cores=2, bias=True)    # from the factory
    y = layer(x)
    weights = with_matrices(checkpoint, specs, config.tensor_train)                 # what a dense model loads

The cores are the parameters, so gradients, optimizer state, traffic and checkpoints are as small as they are. A product
contracts the input with one core after the other, from the last or from the first one, or puts the matrix together and
multiplies by that: whatever takes fewest FLOPs for the number of tokens.

Of the layer's tensor-parallel ranks each holds its rows of the first core (`column`) or its columns of it (`row`), and
all of the others, whose gradients they add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from megasparse.config.tensor_train import TensorTrainConfig, TensorTrainShape
from megasparse.layers.linear import Linear
from megasparse.parallel import ShardSpec

CoreShape = tuple[int, int, int, int]
"""Rank on the left, rows, columns, rank on the right."""
CORE = ".core_"
"""Between the name of a layer and the number of a core."""


class TensorTrainLinear(Linear):
    """y = x W^T + b, the matrix W [out, in] given by `shape`; `settings` are those of ``Linear``.

    Core k, counted from 0, is the parameter `core_<k>` [left rank x rows, columns x right rank]. Initial cores are
    drawn from normal(0, s) with s^(2 d) x (product of the ranks) = init_std^2 for d cores: an entry of W is a sum over
    the ranks of products of d independent entries, so that its standard deviation is `init_std` exactly.
    """

    def __init__(
        self, name: str, in_features: int, out_features: int, *, rank: int, cores: int, **settings: Any
    ) -> None:
        # Before the parameters are made.
        self.shape = TensorTrainShape.of(settings.get("parts") or (out_features,), in_features, cores, rank)
        super().__init__(name, in_features, out_features, **settings)

    def _add_weight(self, weight: nn.Parameter | None) -> None:
        assert weight is None, f"{self.name}: cores are shared with nobody"
        std = (self.init_std**2 / prod(self.shape.ranks)) ** (0.5 / len(self.shape.rows))
        for number, (left, rows, columns, right) in enumerate(self.shape.cores):
            spec = ShardSpec((left * rows, columns * right))
            if number == 0:
                fused = len(self.partition.parts)
                parts = (rows // fused,) * fused if fused else ()
                spec = ShardSpec(spec.shape, self.partition.dim, self.partition.size, parts)
            setattr(self, f"core_{number}", self._drawn(f"core_{number}", spec, std))

    @property
    def cores(self) -> list[nn.Parameter]:
        """This rank's, from the first to the last."""
        return [getattr(self, f"core_{number}") for number in range(len(self.shape.rows))]

    @property
    def core_shapes(self) -> list[CoreShape]:
        """Of this rank's cores."""
        (_, rows, columns, right), *others = self.shape.cores
        size = self.partition.size
        if self.division == "column":
            return [(1, rows // size, columns, right), *others]
        return [(1, rows, columns // size, right), *others]

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        first, *others = self.cores
        cores = [first, *map(self.tensor_parallel.copy_to_tensor_parallel_region, others)]
        whole = [core.view(shape) for core, shape in zip(cores, self.core_shapes, strict=True)]
        flat_TN = x.flatten(0, -2)
        y_TM = _multiply(flat_TN, whole, self._way(flat_TN.shape[0]))
        y = y_TM.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias

    def _way(self, tokens: int) -> str:
        return min(WAYS, key=lambda way: flops(WAYS[way](tokens, self.core_shapes)))

    def products(self, tokens: int) -> list[tuple[int, int, int]]:
        return WAYS[self._way(tokens)](tokens, self.core_shapes)

    def product_parameters(self) -> list[Tensor]:
        return [*self.cores, *([] if self.bias is None else [self.bias])]

    def whole_weight(self) -> None:
        return None

    def lookup(self, ids: Tensor) -> Tensor:
        raise AssertionError(f"{self.name}: a tensor train is no table")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ranks={self.shape.ranks}"


def _multiply(x_TN: Tensor, cores: Sequence[Tensor], way: str) -> Tensor:
    """[T, N] -> x W^T [T, M], of cores as in ``CoreShape``."""
    if way == "assembled":
        return F.linear(x_TN, _matrix(cores))
    if way == "last":
        return _contract(x_TN, cores)
    # The same train, read from its end: indices of inputs and outputs are in the opposite order.
    reversed_x = _reversed(x_TN, [core.shape[2] for core in cores])
    y_TM = _contract(reversed_x, [core.permute(3, 1, 2, 0) for core in reversed(cores)])
    return _reversed(y_TM, [core.shape[1] for core in reversed(cores)])


def _contract(x_TN: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """Take the cores from the last to the first one."""
    tokens, done, left_over = x_TN.shape[0], 1, x_TN.shape[1]
    state = x_TN
    for core in reversed(cores):
        left, rows, columns, right = core.shape
        left_over //= columns
        # Tokens, outputs that are done, inputs that are left, and what this core takes.
        taken = state.reshape(tokens, done, left_over, columns * right)
        given = F.linear(taken, core.reshape(left * rows, columns * right))
        state = given.view(tokens, done, left_over, left, rows).permute(0, 4, 1, 2, 3)
        done *= rows
    return state.reshape(tokens, done)


def _reversed(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """[T, product of sizes] with the indices that its columns consist of in the opposite order."""
    return x.view(-1, *sizes).permute(0, *range(len(sizes), 0, -1)).reshape(x.shape)


def _matrix(cores: Sequence[Tensor]) -> Tensor:
    """[M, N]."""
    found = cores[-1].squeeze(3)
    for core in reversed(cores[:-1]):
        (left, rows, columns, right), (_, more_rows, more_columns) = core.shape, found.shape
        joined = core.reshape(-1, right) @ found.reshape(right, -1)
        joined = joined.view(left, rows, columns, more_rows, more_columns).transpose(2, 3)
        found = joined.reshape(left, rows * more_rows, columns * more_columns)
    return found.squeeze(0)


def _from_last(tokens: int, shapes: Sequence[CoreShape]) -> list[tuple[int, int, int]]:
    found, done, left_over = [], 1, prod(shape[2] for shape in shapes)
    for left, rows, columns, right in reversed(shapes):
        left_over //= columns
        found.append((tokens * done * left_over, columns * right, left * rows))
        done *= rows
    return found


def _from_first(tokens: int, shapes: Sequence[CoreShape]) -> list[tuple[int, int, int]]:
    return _from_last(tokens, [(right, rows, columns, left) for left, rows, columns, right in reversed(shapes)])


def _of_matrix(tokens: int, shapes: Sequence[CoreShape]) -> list[tuple[int, int, int]]:
    found, (_, all_rows, all_columns, _) = [], shapes[-1]
    for left, rows, columns, right in reversed(shapes[:-1]):
        found.append((left * rows * columns, right, all_rows * all_columns))
        all_rows, all_columns = all_rows * rows, all_columns * columns
    return [*found, (tokens, all_columns, all_rows)]


WAYS = {"last": _from_last, "first": _from_first, "assembled": _of_matrix}
"""(tokens, cores) -> products of matrices, as in ``Linear.products``."""


def flops(products: Sequence[tuple[int, int, int]]) -> int:
    """Of products as in ``Linear.products``."""
    return sum(2 * prod(product) for product in products)


def matrix_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of parameters, with `<layer>.weight` in the place of a layer's cores, and which parameters each consists
    of."""
    found: dict[str, list[str]] = {}
    for name in names:
        layer, is_core, _ = name.partition(CORE)
        found.setdefault(f"{layer}.weight" if is_core else name, []).append(name)
    return {name: sorted(parameters) for name, parameters in found.items()}


def assembled(cores: Sequence[Tensor], spec: ShardSpec, settings: TensorTrainConfig) -> Tensor:
    """The matrix [out, in] of whole cores, as parameters and files hold them. spec: of the matrix."""
    assert settings.rank is not None
    shape = TensorTrainShape.of(spec.parts or spec.shape[:1], spec.shape[1], settings.cores, settings.rank)
    return _matrix([core.view(size) for core, size in zip(cores, shape.cores, strict=True)])


def with_matrices(
    weights: Mapping[str, Tensor], specs: Mapping[str, ShardSpec], settings: TensorTrainConfig
) -> dict[str, Tensor]:
    """Weights by name with matrices in the place of cores. specs: of the matrices, by name."""
    return {
        name: weights[name] if name in weights else assembled([weights[n] for n in parameters], specs[name], settings)
        for name, parameters in matrix_names(weights).items()
    }

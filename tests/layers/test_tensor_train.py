"""Linear layers whose weight is a tensor train, against the matrix that the cores say entry by entry."""

from __future__ import annotations

import random
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megasparse.config.checks import check_run
from megasparse.config.loader import ConfigError, load_config
from megasparse.config.tensor_train import TensorTrainConfig, TensorTrainShape, factors
from megasparse.layers import TensorTrainLinear
from megasparse.layers.tensor_train import WAYS, _multiply, assembled, flops, matrix_names
from megasparse.models.build import build_model
from megasparse.training.plan import make_plan


def entries(cores: list[Tensor], shape: TensorTrainShape) -> Tensor:
    """W[i_1 .. i_d, j_1 .. j_d] = G_1[i_1, j_1] ... G_d[i_d, j_d] as one sum over all ranks, by its letters."""
    count = len(cores)
    bonds, rows, columns = "abcde"[: count + 1], "ijklm"[:count], "pqrst"[:count]
    terms = ",".join(bonds[k] + rows[k] + columns[k] + bonds[k + 1] for k in range(count))
    whole = [core.view(size) for core, size in zip(cores, shape.cores, strict=True)]
    matrix = torch.einsum(f"{terms}->{bonds[0]}{rows}{columns}{bonds[-1]}", *whole)
    return matrix.reshape(prod(shape.rows), prod(shape.columns))


def random_layer(cores: int, **settings) -> TensorTrainLinear:
    in_features, out_features = random.choice([12, 24, 30]), random.choice([18, 32, 40])
    layer = TensorTrainLinear(
        "layer", in_features, out_features, rank=random.randint(2, 5), cores=cores, **{"bias": True, **settings}
    )
    layer = layer.double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("cores", [2, 3, 4])
@pytest.mark.parametrize("way", WAYS)
def test_outputs_and_gradients_are_those_of_the_matrix(cores: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(cores)
    monkeypatch.setattr(layer, "_way", lambda tokens: way)
    x = torch.randn(2, 5, layer.in_features, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 5, layer.out_features, dtype=torch.float64)
    given = [x, *layer.parameters()]
    y = layer(x)
    expected = F.linear(x, entries(layer.cores, layer.shape), layer.bias)
    torch.testing.assert_close(y, expected)
    gradients = [torch.autograd.grad(result, given, direction) for result in (y, expected)]
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize("tokens", [1, 7, 4000])
def test_the_count_of_flops_is_that_of_the_products(cores: int, tokens: int) -> None:
    """And of all ways the one with fewest is taken."""
    layer = random_layer(cores).float()
    x = torch.randn(tokens, layer.in_features, requires_grad=True)
    whole = [core.view(shape) for core, shape in zip(layer.cores, layer.core_shapes, strict=True)]
    counted = {}
    for way, products in WAYS.items():
        with FlopCounterMode(display=False) as counter:
            _multiply(x, whole, way).sum().backward()
        counted[way] = counter.get_total_flops()
        assert counted[way] == 3 * flops(products(tokens, layer.core_shapes)), way
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == flops(layer.products(tokens)) == min(counted.values()) // 3


def test_cores_have_the_parameters_of_the_formula() -> None:
    assert [factors(*args) for args in ((3072, 2), (768, 3), (36, 2), (7, 2), (30, 1))] == [
        (64, 48), (12, 8, 8), (6, 6), (7, 1), (30,),
    ]  # fmt: skip
    layer = TensorTrainLinear("layer", 768, 3072, rank=10, cores=2, bias=False)
    # 64 of 3,072 outputs and 32 of 768 inputs, then 48 and 24.
    assert sum(p.numel() for p in layer.parameters()) == 64 * 32 * 10 + 10 * 48 * 24
    # No matrix of 4 x 6 has a rank above 4, whatever is asked for.
    assert TensorTrainShape.of((4,), 6, 2, 100).ranks == (1, 4, 1)


@pytest.mark.parametrize(("cores", "rank"), [(2, 1), (2, 8), (3, 4), (4, 3)])
def test_entries_of_the_matrix_begin_with_the_deviation_that_was_asked_for(cores: int, rank: int) -> None:
    layers = [
        TensorTrainLinear(
            "layer", 48, 64, rank=rank, cores=cores, bias=False, init_std=0.3, seed=random.getrandbits(40)
        )
        for _ in range(1000)
    ]
    settings = TensorTrainConfig(rank=rank, cores=cores)
    squares = torch.tensor(
        [float(assembled(layer.cores, layer.partition, settings).detach().square().mean()) for layer in layers]
    )
    # Standard error of the mean over 1,000 matrices: 2 % with four cores, whose products have a long tail.
    error = float(squares.std()) / 1000**0.5
    assert error < 0.05 * 0.09
    assert abs(float(squares.mean()) - 0.09) < 4 * error


def test_names_of_cores_become_those_of_matrices() -> None:
    config = load_config([], [*TINY, "tensor_train.rank=3", "tensor_train.cores=3"])
    names = dict(build_model(config, 64).named_parameters())
    dense = dict(build_model(load_config([], TINY), 64).named_parameters())
    found = matrix_names(names)
    assert list(found) == list(dense)
    assert [n for parameters in found.values() for n in parameters] == list(names)
    assert found["layers.1.mlp.up.weight"] == [f"layers.1.mlp.up.core_{number}" for number in range(3)]


TINY = [
    "model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=4", "model.vocab_size=64",
    "sparsity.algorithm=dense",
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # up: 128 = 16 x 8 outputs, 32 = 8 x 4 inputs; the second core has 32 entries, so that the rank is at most 32.
        (["tensor_train.rank=33"], "tensor_train.rank: 33 is more than .*; must be 1 to 32"),
        (["model.ffn_hidden_size=36", "parallel.tensor_parallel_size=4"], "parallel.tensor_parallel_size: 4 .* of 6,"),
        (["train.init_from=somewhere"], "train.init_from: somewhere does not go with tensor_train.rank; must be unset"),
        (["sparsity.algorithm=rigl"], "sparsity.algorithm: rigl does not go with tensor_train.rank; must be dense"),
        (
            ["switching.clusters=8", "model.activation=relu2"],
            "switching.clusters: 8 does not go with tensor_train.rank",
        ),
        (["activation_sparsity.pattern=2:4", "model.activation=relu2"], "activation_sparsity.pattern: 2:4 does not"),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_run(load_config([], [*TINY, "tensor_train.rank=4", *words]), 4)


def test_what_goes_together() -> None:
    check_run(
        load_config([], [*TINY, "tensor_train.rank=32", "model.activation=swiglu", "layer_dropping.theta=0.5"]), 4
    )


def test_plans_count_the_cores() -> None:
    """Rank 2: up takes 16 x 8 outputs from 8 x 4 inputs, its first core first; down the same the other way round."""
    dense, trained = (
        make_plan(load_config([], [*TINY, *words]), 2, "cpu")
        for words in ([], ["tensor_train.rank=2", "parallel.tensor_parallel_size=2"])
    )
    tokens, per_token = dense["tokens"]["total"], 2 * (4 * 8 * 16 * 2) + 2 * (16 * 8 * 8)
    saved = 3 * tokens * 2 * 2 * (2 * 32 * 128 - per_token)
    assert trained["flops"]["dense"] == dense["flops"]["dense"]
    for kind in ("algorithmic", "executed"):
        assert trained["flops"][kind] == dense["flops"][kind] - saved
    cores = 16 * 8 * 2 + 2 * 8 * 4
    assert dense["parameters"]["total"] - trained["parameters"]["total"] == 2 * 2 * (32 * 128 - cores)

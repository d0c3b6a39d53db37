"""Models that begin sparse: the scale of their initial weights, and which runs begin so."""

from __future__ import annotations

import pytest
import torch

from megasparse.config.loader import load_config
from megasparse.models.build import build_model
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.schedule import build_density_schedule

MODEL = [
    "model.num_layers=2", "model.hidden_size=256", "model.num_attention_heads=4", "model.vocab_size=64",
    "model.bias=false",
]  # fmt: skip


def variances(*overrides: str) -> dict[str, float]:
    """Variance of the outputs of each sparse matrix for independent inputs, after the start of the topologies."""
    config = load_config([], [*MODEL, *overrides])
    layers = build_model(config, 64).sparse_layers()
    Controller(config, layers).start_topologies()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return {
            name: float((torch.randn(512, layer.in_features, generator=generator) @ layer.weight.T).var())
            for name, layer in layers.items()
        }


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("distribution", ["uniform", "erdos_renyi"])
def test_outputs_vary_as_those_of_the_dense_model(block_size, distribution) -> None:
    born = ["sparsity.points=[[0,0.2],[0.8,1]]", f"sparsity.distribution={distribution}"]
    unit = f"sparsity.block_size={block_size}"
    dense = variances(unit)
    for name, variance in variances(unit, *born, "sparsity.init_density_power=0.5").items():
        assert variance == pytest.approx(dense[name], rel=0.05), name
    for name, variance in variances(unit, *born).items():
        assert variance < 0.5 * dense[name], name


def test_a_run_that_begins_dense_keeps_its_weights() -> None:
    assert variances("sparsity.init_density_power=0.5") == variances()


@pytest.mark.parametrize("algorithm", ["mst", "dense", "static", "set", "rigl", "gradual", "spdf"])
@pytest.mark.parametrize(
    "more", ["density=0.1", "density=1.0", "warmup_end=0.0", "points=[[0,1],[1,0.5]]", "points=[[0,0.5],[1,1]]"]
)
def test_which_schedules_start_dense(algorithm, more) -> None:
    sparsity = load_config([], [f"sparsity.algorithm={algorithm}", f"sparsity.{more}"]).sparsity
    assert sparsity.starts_dense == (build_density_schedule(sparsity).density(0.0) == 1.0)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["sparsity.algorithm=set", "sparsity.lr_density_power=auto"], 16.0),
        (["sparsity.algorithm=set", "sparsity.lr_density_power=auto", "train.init_from=folder"], 4.0),
        (["sparsity.algorithm=gradual", "sparsity.lr_density_power=auto"], 4.0),
        (["sparsity.algorithm=set"], 4.0),
        (["sparsity.algorithm=set", "sparsity.lr_density_power=1"], 4.0),
        (["sparsity.algorithm=set", "sparsity.lr_density_power=0.75", "sparsity.lr_density_cap=null"], 8.0),
    ],
)
def test_the_learning_rate_follows_the_origin_of_the_mask(overrides, expected) -> None:
    config = load_config([], [*MODEL, "sparsity.density=0.0625", "sparsity.block_size=1", *overrides])
    controller = Controller(config, build_model(config, 64).sparse_layers())
    for name, topology in controller.topologies.items():
        controller.expect_active(name, topology.num_units // 16)
        assert controller.lr_multiplier(name) == pytest.approx(expected)
        controller.expect_active(name, topology.num_units)
        assert controller.lr_multiplier(name) == 1.0

"""Settings of single matrices: the first group that matches wins, and says only what differs."""

from __future__ import annotations

import pytest

from megasparse.config.loader import ConfigError, load_config
from megasparse.config.schema import SparsityConfig, SparsityGroup
from megasparse.sparsity.groups import check_groups, layer_settings, unmatched_groups

GROUPS = [
    SparsityGroup(pattern="layers.0.*", dense=True),
    SparsityGroup(pattern="layers.*.mlp.*", block_size=16, density=0.3, growth="random"),
    SparsityGroup(pattern="layers.?.attention.qkv.weight", drop_score="magnitude_over_gradient"),
    SparsityGroup(pattern="layers.1.mlp.up", block_size=2),
]


def test_the_first_group_that_matches_wins() -> None:
    sparsity = SparsityConfig(groups=GROUPS, block_size=32, growth_ratio=3.0)
    assert layer_settings(sparsity, "layers.0.mlp.up") is None
    mlp = layer_settings(sparsity, "layers.1.mlp.up")
    assert (mlp.block_size, mlp.min_density, mlp.gradient_share, mlp.drop_score) == (16, 0.3, 0.0, "magnitude")
    qkv = layer_settings(sparsity, "layers.1.attention.qkv")
    assert (qkv.block_size, qkv.min_density, qkv.gradient_share, qkv.drop_score) == (
        32,
        None,
        0.75,
        "magnitude_over_gradient",
    )
    # `?` is one character: layer 10 falls to no group.
    other = layer_settings(sparsity, "layers.10.attention.qkv")
    assert (other.block_size, other.drop_score) == (32, "magnitude")


def test_the_head_is_sparse_on_request_and_nothing_is_where_sparsity_is_off() -> None:
    assert layer_settings(SparsityConfig(), "head") is None
    assert layer_settings(SparsityConfig(head=True), "head").block_size == SparsityConfig().block_size
    assert layer_settings(SparsityConfig(algorithm="dense", head=True), "head") is None
    assert layer_settings(SparsityConfig(algorithm="dense"), "layers.0.mlp.up") is None


@pytest.mark.parametrize(
    ("algorithm", "growth", "share", "zeta"),
    [
        ("mst", None, 0.75, 0.3), ("set", None, 0.0, 0.3), ("rigl", None, 1.0, 0.3), ("static", None, 0.75, 0.0),
        ("gradual", None, 0.75, 0.0), ("spdf", None, 0.75, 0.0), ("set", "gradient", 1.0, 0.3),
        ("mst", "random", 0.0, 0.3),
    ],
)  # fmt: skip
def test_defaults_of_the_algorithms(algorithm, growth, share, zeta) -> None:
    sparsity = SparsityConfig(algorithm=algorithm, growth=growth)
    settings = layer_settings(sparsity, "layers.0.mlp.up")
    assert settings.gradient_share == share and settings.drop_fraction == zeta
    if algorithm not in ("static", "spdf"):
        own = SparsityConfig(algorithm=algorithm, drop_fraction=0.1)
        assert layer_settings(own, "layers.0.mlp.up").drop_fraction == 0.1


def test_a_group_may_follow_another_algorithm() -> None:
    groups = [
        SparsityGroup(pattern="*.qkv", algorithm="set"),
        SparsityGroup(pattern="*.up", algorithm="static"),
        SparsityGroup(pattern="*.down", algorithm="rigl", drop_fraction=0.2),
    ]
    sparsity = SparsityConfig(growth="mixed", drop_fraction=0.4, groups=groups)
    rules = [
        (settings.gradient_share, settings.drop_fraction)
        for name in ("attention.qkv", "mlp.up", "mlp.down", "attention.output")
        if (settings := layer_settings(sparsity, f"layers.0.{name}"))
    ]
    assert rules == [(0.0, 0.3), (0.75, 0.0), (1.0, 0.2), (0.75, 0.4)]


def test_groups_that_no_layer_falls_to() -> None:
    sparsity = SparsityConfig(groups=[*GROUPS, SparsityGroup(pattern="layer.1.*")])
    names = ["layers.0.mlp.up", "layers.1.mlp.up", "layers.1.attention.qkv"]
    assert unmatched_groups(sparsity, names) == ["layers.1.mlp.up", "layer.1.*"]


@pytest.mark.parametrize(
    "group",
    [
        "{pattern: 'layer.0.*', density: 0.5}",
        "{pattern: 'layers.0.mpl.*', dense: true}",
        "{pattern: head, block_size: 8}",
    ],
)
def test_groups_that_say_nothing_are_refused(group: str) -> None:
    """A misspelt name, dense or not, and the head while it is not among the sparse layers."""
    names = ["layers.0.attention.qkv", "layers.0.mlp.up", "head"]
    sparsity = load_config([], [f"sparsity.groups=[{group}]"]).sparsity
    with pytest.raises(ConfigError, match=r"sparsity.groups: no layer falls to .*layers\.0\.mlp\.up"):
        check_groups(sparsity, names)
    check_groups(sparsity.model_copy(update={"algorithm": "dense"}), names)

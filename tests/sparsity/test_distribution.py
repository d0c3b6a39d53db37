"""Layer densities: the budget is met, and Erdos-Renyi agrees with an implementation that caps layer by layer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasparse.sparsity.distribution import LayerShape, layer_densities, unit_target

SHAPES = [(768, 256), (256, 256), (1024, 256), (256, 1024), (64, 16), (16, 16)]


def shapes(**more) -> list[LayerShape]:
    return [LayerShape(f"layers.{i}", n, m, depth=i / (len(SHAPES) - 1), **more) for i, (n, m) in enumerate(SHAPES)]


def capped_erdos_renyi(sizes: list[tuple[int, int]], density: float) -> list[float]:
    """The rule of Evci et al. 2020, round by round: layers that would exceed 1 become dense, the factor is set anew."""
    dense: set[int] = set()
    while True:
        budget = density * sum(n * m for n, m in sizes) - sum(sizes[i][0] * sizes[i][1] for i in dense)
        factor = budget / sum(n + m for i, (n, m) in enumerate(sizes) if i not in dense)
        over = {i for i, (n, m) in enumerate(sizes) if i not in dense and factor * (n + m) / (n * m) > 1.0}
        if not over:
            return [1.0 if i in dense else factor * (n + m) / (n * m) for i, (n, m) in enumerate(sizes)]
        dense |= over


@pytest.mark.parametrize("density", [0.01, 0.1, 0.3, 0.6, 0.95])
def test_erdos_renyi_equals_the_iterative_rule(density) -> None:
    found = layer_densities(shapes(), density, 0.01, "erdos_renyi")
    assert list(found.values()) == pytest.approx(capped_erdos_renyi(SHAPES, density), rel=1e-12)
    assert max(found.values()) == 1.0 if density > 0.05 else max(found.values()) <= 1.0


def test_uniform_is_the_target_everywhere() -> None:
    assert set(layer_densities(shapes(), 0.37, 0.1, "uniform").values()) == {0.37}


sizes = st.lists(st.tuples(st.integers(1, 4096), st.integers(1, 4096)), min_size=1, max_size=8)


@given(sizes, st.floats(0.001, 1.0), st.sampled_from(["uniform", "erdos_renyi"]), st.floats(0.0, 3.0))
def test_the_budget_is_met(sizes, density, distribution, boost) -> None:
    layers = [LayerShape(str(i), n, m, depth=i / len(sizes)) for i, (n, m) in enumerate(sizes)]
    found = layer_densities(layers, density, 0.001, distribution, boost)
    active = sum(found[layer.name] * layer.numel for layer in layers)
    assert active == pytest.approx(density * sum(layer.numel for layer in layers), rel=1e-9)
    assert all(0.0 < value <= 1.0 for value in found.values())
    if density == 1.0:
        assert set(found.values()) == {1.0}


def test_depth_boost_favours_the_ends() -> None:
    layers = [LayerShape(str(i), 64, 64, depth=i / 4) for i in range(5)] + [LayerShape("head", 64, 64)]
    found = layer_densities(layers, 0.1, 0.1, "uniform", depth_boost=1.0)
    middle = found["2"]
    assert found["0"] == pytest.approx(2 * middle) == pytest.approx(found["4"])
    assert found["1"] == pytest.approx(1.5 * middle)
    assert found["head"] == pytest.approx(middle)


def test_own_densities_follow_the_curve_outside_of_the_budget() -> None:
    own = LayerShape("own", 100, 100, min_density=0.5)
    for density, expected in [(0.1, 0.5), (0.55, 0.75), (1.0, 1.0)]:
        found = layer_densities([own, *shapes()], density, 0.1, "erdos_renyi")
        assert found["own"] == pytest.approx(expected)
        others = layer_densities(shapes(), density, 0.1, "erdos_renyi")
        assert {name: found[name] for name in others} == others
    assert layer_densities([own], 0.1, 0.1, "uniform") == {"own": 0.5}
    assert layer_densities([own], 1.0, 1.0, "uniform") == {"own": 1.0}


def test_unit_targets_round_and_keep_one() -> None:
    assert [unit_target(d, 16) for d in (1.0, 0.99, 0.1, 0.09375, 0.0937, 0.001)] == [16, 16, 2, 2, 1, 1]
    assert all(unit_target(1.0, n) == n for n in range(1, 2000))

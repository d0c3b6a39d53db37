"""The settings of each sparse matrix: the section `sparsity`, refined by the first group that matches its name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megasparse.config.loader import ConfigError
from megasparse.config.schema import SparsityConfig, SparsityGroup
from megasparse.config.stages import original

DEFAULT_GROWTH = {"set": "random", "rigl": "gradient"}
DEFAULT_DROP_FRACTION = {"mst": 0.3, "set": 0.3, "rigl": 0.3}


@dataclass(frozen=True)
class LayerSettings:
    """How one matrix is thinned."""

    block_size: int
    min_density: float | None
    """Own lowest density; None: a share of the global one."""
    drop_score: str
    gradient_share: float
    """Share of grown units that are chosen by gradient: 1 gradient, 0 random, r / (r + 1) mixed."""
    drop_fraction: float
    """zeta: the share of active units that a topology update replaces, before its decay."""


def layer_settings(sparsity: SparsityConfig, name: str) -> LayerSettings | None:
    """Settings of the linear layer `name`, or None where it stays dense."""
    if sparsity.algorithm == "dense" or (name == "head" and not sparsity.head):
        return None
    group = next((group for group in sparsity.groups if _matches(group, name)), None)
    group = group or SparsityGroup(pattern="*")
    if group.dense:
        return None
    return LayerSettings(
        block_size=group.block_size or sparsity.block_size,
        min_density=group.density,
        drop_score=group.drop_score or sparsity.drop_score,
        gradient_share=_gradient_share(sparsity, group),
        drop_fraction=_drop_fraction(sparsity, group),
    )


def unmatched_groups(sparsity: SparsityConfig, names: Iterable[str]) -> list[str]:
    """Patterns of groups that no layer falls to: a misspelt name, or one behind a wider pattern."""
    names = list(names)
    first = {next((group.pattern for group in sparsity.groups if _matches(group, name)), None) for name in names}
    return [group.pattern for group in sparsity.groups if group.pattern not in first]


def check_groups(sparsity: SparsityConfig, names: Iterable[str]) -> None:
    """Raise ConfigError for a group that says nothing about any of the linear layers `names`."""
    names = [name for name in names if name != "head" or sparsity.head]
    unmatched = unmatched_groups(sparsity, names) if sparsity.algorithm != "dense" else []
    if unmatched:
        raise ConfigError(
            f"sparsity.groups: no layer falls to {unmatched[0]!r}; must be patterns that match one of "
            f"{', '.join(names[:6])}, ... before an earlier group does"
        )


def check_copied_settings(sparsity: SparsityConfig, names: Iterable[str], small: int) -> None:
    """Raise ConfigError where one of the linear layers `names` has other settings than its original among the first
    `small` layers, whose masks it could not take over."""
    for name in names:
        if layer_settings(sparsity, name) != layer_settings(sparsity, original(name, small)):
            raise ConfigError(
                f"sparsity.groups: layer {name} has other settings than {original(name, small)}, whose copy it "
                "becomes; must be patterns that take both, such as layers.*.mlp.*"
            )


def _matches(group: SparsityGroup, name: str) -> bool:
    return fnmatchcase(name, group.pattern) or fnmatchcase(f"{name}.weight", group.pattern)


def _gradient_share(sparsity: SparsityConfig, group: SparsityGroup) -> float:
    growth: str | None = group.growth
    if growth is None and group.algorithm is None:
        growth = sparsity.growth
    growth = growth or DEFAULT_GROWTH.get(group.algorithm or sparsity.algorithm, "mixed")
    if growth == "gradient":
        return 1.0
    if growth == "random":
        return 0.0
    return sparsity.growth_ratio / (sparsity.growth_ratio + 1.0)


def _drop_fraction(sparsity: SparsityConfig, group: SparsityGroup) -> float:
    if group.drop_fraction is not None:
        return group.drop_fraction
    if group.algorithm is None and sparsity.drop_fraction is not None:
        return sparsity.drop_fraction
    return DEFAULT_DROP_FRACTION.get(group.algorithm or sparsity.algorithm, 0.0)

"""Which layers keep only their active blocks, and how many they have room for, in which steps (`sparsity.storage`).

    plan = plan_storage(config, controller)
    plan.capacities(plan.at(step))              # blocks that each packed layer's shard has room for
    plan.fitting(step, controller.shard_active) # the same where a run stands elsewhere than its schedule

The capacity of a layer changes in a few steps, since the engine is built anew for it: a ladder of densities, and in
each step a rung that holds what the schedule asks for before and after any topology update until the next change. The
rungs are those of least cost, counted in steps with dense storage: room that is held, and
`sparsity.capacity_change_cost` for each change, so that short stretches are passed over. Layers' densities rise with
the global one, so that a rung holds every layer at once. What a topology update that was put off by skipped steps asks
for is held too: every step is looked at, not those of updates alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from megasparse.config.schema import RunConfig
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.distribution import unit_target
from megasparse.sparsity.schedule import DensitySchedule

MAX_CHANGES = 12
"""In a run: each costs as much as some steps."""
TOP_DENSITY = 0.5
"""Above it packed storage saves little, so that the next rung is the highest density of the run."""
SMALLEST_RATIO = 1.5
"""Of two rungs."""
MOST_RUNGS = 12
ROUNDING = 1e-9
"""Relative: densities of a schedule are computed in other ways than rungs."""


@dataclass(frozen=True)
class StoragePlan:
    """rungs: densities, highest first. changes: (first step, number of the rung) in order, the first one at step 0."""

    rungs: tuple[float, ...]
    changes: tuple[tuple[int, int], ...]
    slots: tuple[Mapping[str, int], ...]
    """By rung: blocks that each layer's shard has room for; layers that are whole matrices are left out."""

    def at(self, step: int) -> int:
        """The rung that the schedule asks for in step `step` (0-based)."""
        return next(rung for first, rung in reversed(self.changes) if first <= step)

    def capacities(self, rung: int) -> Mapping[str, int]:
        return self.slots[rung]

    def holds(self, rung: int, shard_active: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether every shard of every layer has room for its active blocks."""
        return all(max(shard_active[name]) <= room for name, room in self.slots[rung].items())

    def stretches(self, steps: int) -> Iterator[tuple[int, int, int]]:
        """(first step, step after the last one, rung) of the stretches of a run of so many steps."""
        for (first, rung), (end, _) in pairwise([*self.changes, (steps, 0)]):
            yield first, end, rung

    def fitting(self, step: int, shard_active: Mapping[str, tuple[int, ...]]) -> int:
        """The lowest rung that serves step `step` and holds what is active now, which differs from the schedule where
        topology updates were put off or settings changed. Raises ValueError where none does."""
        for rung in range(self.at(step), -1, -1):
            if self.holds(rung, shard_active):
                return rung
        name = next(name for name, room in self.slots[0].items() if max(shard_active[name]) > room)
        raise ValueError(
            f"sparsity.storage: packed, but layer {name} has {max(shard_active[name])} active blocks, more than the "
            f"{self.slots[0][name]} that its schedule ever asks for; must be dense"
        )


def plan_storage(config: RunConfig, controller: Controller) -> StoragePlan:
    """For the sparse layers of a model, which may be on the meta device."""
    steps = config.train.steps
    stretches = list(_stretches(controller.schedule, config.sparsity.update_interval, steps))
    densities = [density for _, density in stretches]
    found = list[tuple[float, tuple[float, ...], list[tuple[int, int]]]]()
    for rungs in _ladders(min(densities), max(densities)):
        cost, changes = _cheapest_changes(stretches, rungs, steps, config.sparsity.capacity_change_cost)
        if len(changes) - 1 <= MAX_CHANGES or len(rungs) == 1:
            found.append((cost, rungs, changes))
    _, rungs, changes = min(found, key=lambda one: one[0])
    used = sorted({rung for _, rung in changes} | {0})
    rungs, changes = tuple(rungs[rung] for rung in used), [(first, used.index(rung)) for first, rung in changes]
    return StoragePlan(rungs, tuple(changes), tuple(_slots(controller, rung) for rung in rungs))


def _cheapest_changes(
    stretches: list[tuple[int, float]], rungs: tuple[float, ...], steps: int, change_cost: float
) -> tuple[float, list[tuple[int, int]]]:
    """Cost, and (first step, rung) of the changes that cost least, the first rung included, for the stretches of
    ``_stretches``: by dynamic programming over the rung of each stretch."""
    costs, before = [0.0] * len(rungs), list[list[int]]()
    for (first, density), (end, _) in pairwise([*stretches, (steps, 0.0)]):
        cheapest = min(range(len(rungs)), key=costs.__getitem__)
        stays = [not before or cost <= costs[cheapest] + change_cost for cost in costs]
        before.append([rung if stay else cheapest for rung, stay in enumerate(stays)])
        costs = [
            math.inf
            if density > held * (1 + ROUNDING)
            else (cost if stay else costs[cheapest] + change_cost) + (end - first) * held
            for held, cost, stay in zip(rungs, costs, stays, strict=True)
        ]
    rung = min(range(len(rungs)), key=costs.__getitem__)
    cost, path = costs[rung], list[int]()
    for came_from in reversed(before):
        path.append(rung)
        rung = came_from[rung]
    path.reverse()
    return cost, [
        (first, rung)
        for (first, _), rung, last in zip(stretches, path, [None, *path[:-1]], strict=True)
        if rung != last
    ]


def _stretches(schedule: DensitySchedule, interval: int, steps: int) -> Iterator[tuple[int, float]]:
    """(first step, highest density) of the steps that have the topology of one update, the next one included."""
    bends = {math.floor(segment.start * steps) + near for segment in schedule.segments for near in (-1, 0, 1)}
    before = schedule.density(0.0)
    for first, end in pairwise([0, *range(interval + 1, steps, interval), steps]):
        # Inside a segment the density only rises or only falls.
        looked_at = {first, end - 1, *(step for step in bends if first <= step < end)}
        yield first, max(before, *(schedule.density(step / steps) for step in looked_at))
        before = schedule.density((end - 1) / steps)


def _ladders(lowest: float, highest: float) -> Iterator[tuple[float, ...]]:
    """Ladders from many rungs to one, densities from the highest down; ratios are equal below the first step."""
    top = min(TOP_DENSITY, highest)
    for count in range(MOST_RUNGS, 0, -1):
        if lowest < top:
            ratio = (top / lowest) ** (1 / (count - 1)) if count > 1 else 1.0
            if count > 1 and ratio < SMALLEST_RATIO:
                continue
            powers = range(count - 1 if top < highest else count - 2, 0, -1)
            lower = [lowest * ratio**power for power in powers]
        else:
            lower = []
        yield tuple(dict.fromkeys([highest, *lower, lowest]))
    yield (highest,)


def _slots(controller: Controller, density: float) -> dict[str, int]:
    """Room of each layer's shard at a density; none of a layer that is then full."""
    densities, found = controller.densities_for(min(density * (1 + ROUNDING), 1.0)), {}
    for name, topology in controller.topologies.items():
        # Shards are kept in balance, so that none has more than its share, rounded up.
        room = -(-unit_target(densities[name], topology.num_units) // topology.num_shards)
        if topology.block_size > 1 and room < topology.shard_units:
            found[name] = room
    return found

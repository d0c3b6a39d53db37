"""What a topology must fulfil: a schedule that can be met, and exact zeros outside of the active units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.config.stages import growth_step
from megasparse.sparsity.distribution import unit_target
from megasparse.sparsity.groups import check_copied_settings
from megasparse.sparsity.schedule import DensitySchedule, build_density_schedule
from megasparse.sparsity.slots import Slots
from megasparse.sparsity.state import StateAccess
from megasparse.sparsity.topology import Topology

MAX_UNITS = 2**31 - 1
"""Counts of units travel as int32."""


def check_schedule(
    config: RunConfig, schedule: DensitySchedule, topologies: Mapping[str, Topology], lowest: Mapping[str, float]
) -> None:
    """Raise ConfigError for a schedule that this model and number of steps cannot meet.

    lowest: density of each layer where the global one is lowest.
    """
    sparsity, steps = config.sparsity, config.train.steps
    last_update = (steps - 1) // sparsity.update_interval * sparsity.update_interval
    if topologies and last_update == 0 and schedule.min_density < schedule.density(0.0):
        raise ConfigError(
            f"sparsity.update_interval: {sparsity.update_interval} leaves no topology update in train.steps {steps}, "
            f"so the model would stay dense; must be below {steps}, or sparsity.algorithm dense"
        )
    if topologies and schedule.density(1.0) >= 1.0 and schedule.density(last_update / steps) < 1.0:
        largest = _largest_interval(schedule, steps)
        allowed = f"such as {largest}" if largest else "none, unless the restoration ends before the last step"
        raise ConfigError(
            f"sparsity.update_interval: {sparsity.update_interval} leaves no topology update between the end of the "
            f"restoration and train.steps {steps}, so the model would not become dense again; must be {allowed}"
        )
    if config.optimizer.decay_start == "dense" and schedule.dense_from is None:
        raise ConfigError(
            f"optimizer.decay_start: dense, but by the schedule of sparsity.algorithm {sparsity.algorithm} the model "
            "never becomes dense; must be schedule"
        )
    if sparsity.fold_low_rank and sparsity.algorithm != "dense" and schedule.dense_from is None:
        raise ConfigError(
            f"sparsity.fold_low_rank: true, but by the schedule of sparsity.algorithm {sparsity.algorithm} the model "
            "never becomes dense; must be false"
        )
    for name, topology in topologies.items():
        if topology.num_units > MAX_UNITS:
            raise ConfigError(
                f"sparsity.block_size: {topology.block_size} divides layer {name} into {topology.num_units} units, "
                f"more than {MAX_UNITS}; must be larger ones"
            )
        if sparsity.row_floor and topology.block_size > 1:
            _check_row_floor(topology, lowest[name])


def _largest_interval(schedule: DensitySchedule, steps: int) -> int:
    """Largest update interval with a topology update at full density."""
    full = next(step for step in range(1, steps + 1) if schedule.density(step / steps) >= 1.0)
    return max((n for n in range(1, steps) if (steps - 1) // n * n >= full), default=0)


def _check_row_floor(topology: Topology, density: float) -> None:
    rows, columns = topology.whole_grid.shape
    num_active = unit_target(density, topology.num_units)
    if num_active < rows:
        raise ConfigError(
            f"sparsity.row_floor: layer {topology.name} has {rows} rows of blocks and at density {density:.3g} only "
            f"{num_active} active blocks; must be false, or a density of at least {1 / columns:.3g}"
        )


def check_stacked_layers(config: RunConfig, names: Iterable[str]) -> None:
    """Raise ConfigError where a layer of the whole model cannot take over what its original in the small one has.

    names: of the linear layers of the whole model. Layers that share a learning rate have one density.
    """
    small, sparsity = config.stacking.num_layers, config.sparsity
    assert small is not None, "the run has no small model"
    check_copied_settings(sparsity, names, small)
    growth = growth_step(config) or 0
    schedule = build_density_schedule(sparsity)
    # The topology of step s shows from s + 1 on, so what is asked for at the growth itself is not yet there.
    if sparsity.depth_boost and any(schedule.density(step / config.train.steps) < 1.0 for step in range(growth)):
        raise ConfigError(
            f"sparsity.depth_boost: {sparsity.depth_boost} gives copies another density than their originals, and at "
            f"step {growth:,}, where stacking.until {config.stacking.until} copies them, the model is sparse; must be "
            "0, or a schedule that is dense until then"
        )


def check_invariant(
    topologies: Iterable[Topology], access: StateAccess, slots: Mapping[str, Slots] | None = None
) -> None:
    """Raise RuntimeError naming the first layer whose weights or moments are not 0 outside its topology.

    slots: of the layers with packed storage, by name: what is in no block is outside. Per-weight steps of inactive
    weights count on; they begin anew when a weight is grown.
    """
    fragments = access.fragments()
    for topology in topologies:
        fragment = fragments.get(topology.name)
        if fragment is None:
            continue
        of_weights = (slots or {}).get(topology.name)
        if of_weights is None:
            active = topology.weights_slice(fragment.start, fragment.numel)
        else:
            active = of_weights.active_entries(fragment.start, fragment.numel)
        inactive = ~active.to(fragment.master.device)
        moments = {label: tensor for label, tensor in fragment.moments.items() if label != "weight_steps"}
        for label, tensor in {"weight": fragment.master, **moments}.items():
            wrong = int(tensor[inactive].count_nonzero())
            if wrong:
                raise RuntimeError(f"{wrong} inactive entries of {label} of layer {topology.name} are not 0")

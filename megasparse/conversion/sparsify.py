"""A topology for a dense state, and a sparse state made dense: saved states seen through masks, or without them.

    sparse = sparsify(saved, config, "magnitude", step=0)      # config: with section sparsity as it shall be
    dense, config = densify(saved, config)

Which units are active is decided by what decides it in a run: the densities of the controller, its exact selection, its
random numbers. Tensors are read, masked and handed on one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megasparse.checkpoint.saved_state import (
    EVER,
    LIVE,
    TABLE,
    WEIGHT,
    RunFacts,
    SavedState,
    layers_of,
    sparse_parameters,
)
from megasparse.checkpoint.store import CheckpointError
from megasparse.config.loader import ConfigError, changed_settings, check_config
from megasparse.config.schema import RunConfig
from megasparse.engine.optimizer import MAX_WEIGHT_STEPS
from megasparse.layers import SparseLinear
from megasparse.models.build import build_model
from megasparse.parallel import CommunicationGroup, ShardSpec
from megasparse.sparsity.controller import Controller, stream_number
from megasparse.sparsity.dense_gradients import BlockShare
from megasparse.sparsity.distribution import unit_target
from megasparse.sparsity.evolution import random_topology, step_counts
from megasparse.sparsity.state import StateFragment
from megasparse.sparsity.topology import Topology, pack_bits
from megasparse.sparsity.update import EvolvingLayer, update_layers

METHODS = ("magnitude", "random")
Report = Callable[[str, float], None]


def check_only_sparsity(before: RunConfig, after: RunConfig) -> None:
    """Raise ConfigError unless two configurations differ in section `sparsity` only, and the second one is sparse."""
    odd = [change for change in changed_settings(before, after) if not change.startswith("sparsity.")]
    if odd:
        raise ConfigError(f"{odd[0]}: only section sparsity can change here; must be sparsity.<field>=<value>")
    if after.sparsity.algorithm == "dense":
        raise ConfigError("sparsity.algorithm: dense has no topology; must be one of static, set, rigl, gradual, ...")
    if after.sparsity.lr_density_power == "auto":
        raise ConfigError(
            "sparsity.lr_density_power: auto would not know that these masks come from trained weights; must be a "
            "number, such as 0.5"
        )


def sparsify(
    saved: SavedState, config: RunConfig, method: str, step: int, report: Report = lambda layer, density: None
) -> MaskedState:
    """`saved` with the topology that `config` wants at a step; weights and moments of inactive units are exactly 0.

    step: at which training will go on. method: `magnitude` keeps the units of largest norm, `random` those that a run
    of this seed would start with. report: called with the name and the density of each layer when it is decided.
    Raises ConfigError for settings that do not fit the model, CheckpointError for a state that is sparse already.
    """
    assert method in METHODS, method
    if saved.topology():
        raise CheckpointError("the state is sparse already; must be a dense one, such as --densify makes")
    controller, parameters = _plan(saved, config)
    if not parameters:
        raise ConfigError("sparsity.groups: every layer stays dense; must be patterns that leave some")
    densities = controller.densities_at(min(step / config.train.steps, 1.0))
    if all(density == 1.0 for density in densities.values()):
        raise ConfigError(
            f"sparsity.algorithm: {config.sparsity.algorithm} is dense at step {step} of "
            f"{config.train.steps}; here it must be static, set, rigl, or points that are below 1 there"
        )
    masks = {}
    for layer, topology in controller.topologies.items():
        target = unit_target(densities[layer], topology.num_units)
        if method == "random":
            masks[layer] = _random_mask(topology, target, config)
        else:
            # A copy: the topology update edits what it decides on.
            weight = saved.tensor(parameters[layer], WEIGHT).to(torch.float32, copy=True)
            masks[layer] = _largest(topology, target, weight, config, step)
        report(layer, target / topology.num_units)
    return MaskedState(saved, config, {layer: pack_bits(mask) for layer, mask in masks.items()})


class DenseState:
    """A state without its topology: a ``SavedState``. Zeros stay zeros, moments are kept, per-weight steps are not."""

    def __init__(self, saved: SavedState) -> None:
        self.saved = saved
        self.step, self.shapes = saved.step, saved.shapes
        self.facts: RunFacts = saved.facts

    def kinds(self, name: str) -> list[str]:
        return [kind for kind in self.saved.kinds(name) if kind != "weight_steps"]

    def tensor(self, name: str, kind: str) -> Tensor:
        return self.saved.tensor(name, kind)

    def topology(self) -> dict[str, Tensor]:
        return {}

    def loss_scaler(self) -> Mapping[str, float]:
        return self.saved.loss_scaler()


class MaskedState(DenseState):
    """A dense state seen through masks. Moments of active units are kept, per-weight steps begun where needed."""

    def __init__(self, dense: SavedState, config: RunConfig, active: Mapping[str, Tensor]) -> None:
        """active: packed bits by layer."""
        super().__init__(dense)
        self.config, self._active = config, dict(active)
        self.sparse = sparse_parameters(config, dense.shapes, list(active))
        sparsity = config.sparsity
        self._needs_weight_steps = sparsity.per_weight_step_counts or sparsity.regrowth_warmup_steps > 0

    def kinds(self, name: str) -> list[str]:
        wanted = name in self.sparse and self._needs_weight_steps and self.step > 0
        return [*super().kinds(name), *(["weight_steps"] if wanted else [])]

    def tensor(self, name: str, kind: str) -> Tensor:
        if name not in self.sparse:
            return self.saved.tensor(name, kind)
        if kind == "weight_steps" and kind not in self.saved.kinds(name):
            whole = torch.full(self.shapes[name], min(self.step, MAX_WEIGHT_STEPS), dtype=torch.int16)
        else:
            whole = self.saved.tensor(name, kind).clone()
        sparse = self.sparse[name]
        return whole.masked_fill_(sparse.inactive_entries(sparse.mask(self._active[sparse.layer])), 0)

    def topology(self) -> dict[str, Tensor]:
        # Copies: safetensors refuses tensors that share memory.
        return {f"{kind}{layer}": bits.clone() for kind in (LIVE, EVER) for layer, bits in self._active.items()}


def densify(saved: SavedState, config: RunConfig) -> tuple[DenseState, RunConfig]:
    """`saved` as a dense state, and its configuration as one of dense training.

    Raises CheckpointError where it is dense already, ConfigError where low-rank branches would be left without a place.
    """
    if not layers_of(saved.topology()):
        raise CheckpointError("the state is dense already: it has no topology")
    if config.sparsity.low_rank:
        raise ConfigError(
            f"sparsity.low_rank: {config.sparsity.low_rank}: a dense model has no low-rank branches; must be 0"
        )
    values = config.model_dump(mode="json")
    values["sparsity"]["algorithm"] = "dense"
    return DenseState(saved), check_config(values)


@dataclass
class _PlannedLayer:
    """A sparse layer without its weight: what the controller asks for, whole."""

    weight: nn.Parameter
    mask: Tensor
    block_size: int
    grid: ShardSpec
    collect_dense_gradient: bool = False

    def topology_changed(self, num_active: int | None = None) -> None:
        """No kernel waits for it."""


def _plan(saved: SavedState, config: RunConfig) -> tuple[Controller, dict[str, str]]:
    """The controller of a run of `config`, and by layer the parameter that is its weight.

    Raises ConfigError where section sparsity does not fit the model, CheckpointError where `saved` is of another one.
    """
    if TABLE not in saved.shapes:
        raise CheckpointError(f"the state has no {TABLE}: it is of another kind of model")
    with torch.device("meta"):
        model = build_model(config, saved.shapes[TABLE][0])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    odd = sorted(set(names.values()) ^ set(saved.shapes))
    if odd:
        raise CheckpointError(f"the state is of another model than its configuration: they differ at {odd[0]}")
    layers: dict[str, SparseLinear] = model.sparse_layers()
    planned = {
        name: _PlannedLayer(
            layer.weight, torch.ones(layer.grid.shape, dtype=torch.bool), layer.block_size, ShardSpec(layer.grid.shape)
        )
        for name, layer in layers.items()
    }
    parameters = {name: names[id(layer.weight)] for name, layer in layers.items()}
    for name, layer in layers.items():
        found, expected = saved.shapes[parameters[name]], tuple(layer.weight.shape)
        if found != expected:
            raise ConfigError(
                f"sparsity.head: true needs a vocabulary without padding, {parameters[name]} has {found[0]} rows and "
                f"is padded to {expected[0]}; must be false"
            )
    return Controller(config, planned), parameters


def _random_mask(topology: Topology, target: int, config: RunConfig) -> Tensor:
    """As a run that starts sparse draws it: bool [units]."""
    floor = config.sparsity.row_floor and topology.block_size > 1
    row_length = topology.whole_grid.shape[1] if floor else None
    seed = config.run.seed
    return random_topology(topology.num_units, target, stream_number(topology.name), seed, row_length)


def _largest(topology: Topology, target: int, weight: Tensor, config: RunConfig, step: int) -> Tensor:
    """As a topology update that drops and grows nothing else leaves it: bool, the grid."""
    layer = EvolvingLayer(
        topology=topology,
        counts=(step_counts(topology.num_units, target, topology.num_units, 0.0, 0.0),),
        stream=stream_number(topology.name),
        drop_score="magnitude",
        drop_score_lambda=0.0,
        row_floor=config.sparsity.row_floor,
    )
    fragment = StateFragment(0, weight.view(-1), torch.zeros(weight.numel()))
    update_layers([layer], _OneMatrix(topology.name, fragment), config.run.seed, step)
    return topology.mask


class _OneMatrix:
    """The state of one whole matrix on one rank: a ``StateAccess``."""

    shard = tensor_parallel = whole = CommunicationGroup()

    def __init__(self, name: str, fragment: StateFragment) -> None:
        self._fragments = {name: fragment}
        self.dense_gradients: Mapping[str, BlockShare] = {}

    def fragments(self) -> Mapping[str, StateFragment]:
        return self._fragments

    def gradients_changed(self, names: Iterable[str]) -> None:
        """There are none."""

"""Model, training methods and engine of a run, put together on a rank; and anew where packed storage changes its
capacity.

    storage = RunStorage.of(config, vocab_size, mesh.tensor_parallel)           # None: everything is dense
    methods, engine = build_engine(config, vocab_size, mesh, capacities=storage.plan.capacities(0))
    renewal = Renewal(config, vocab_size, mesh, storage)            # the loop asks it before each step

Apart from ``methods``, which plans use without importing DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megasparse.config.schema import RunConfig
from megasparse.engine.memory_state import MemoryState
from megasparse.engine.restore import apply_state, read_state
from megasparse.engine.training_engine import DTYPES, TrainingEngine, draws_pieces, model_construction
from megasparse.launching.host_memory import return_memory
from megasparse.methods.callback import MethodFactory, TrainingMethod
from megasparse.methods.mixed_sparsity import MixedSparsityTraining
from megasparse.methods.registry import build_methods
from megasparse.models.build import build_model
from megasparse.objectives.distillation import Distillation
from megasparse.objectives.objective import NextTokenCrossEntropy, Objective
from megasparse.objectives.stored_states import StoredTeacher
from megasparse.objectives.teacher import open_teacher
from megasparse.parallel import CommunicationGroup, Mesh, TensorParallel
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.storage import StoragePlan, plan_storage


def build_engine(
    config: RunConfig,
    vocab_size: int,
    mesh: Mesh,
    objective: Objective | None = None,
    methods: Sequence[MethodFactory] = (),
    *,
    capacities: Mapping[str, int] | None = None,
    drawn: bool = True,
) -> tuple[list[TrainingMethod], TrainingEngine]:
    """Training methods and engine of a run on this rank, at its beginning.

    objective: None: that of the configuration. methods: besides those that the configuration asks for. capacities: of
    the layers with packed storage, by name, in blocks on each rank. drawn: False: no initial weights, as a state is
    loaded.
    """
    with model_construction(config, mesh) as opened:
        # Topologies and their index lists hold the masks: these must not move afterwards.
        ranks, deferred = mesh.tensor_parallel, draws_pieces(config)
        model = build_model(config, vocab_size, ranks, capacities=capacities, drawn=drawn, deferred=deferred)
        model = model.to(mesh.device)
        made = build_methods(config, model, mesh.tensor_parallel, methods)
        for method in made:
            method.start(opened)
    engine = TrainingEngine(model, made, config, mesh, objective or build_objective(config, vocab_size, mesh))
    for method in made:
        method.attach(engine, mesh)
    return made, engine


class RunStorage:
    """Capacities of the layers of a run with `sparsity.storage` packed, in each of its steps."""

    def __init__(self, plan: StoragePlan, controller: Controller) -> None:
        self.plan, self._controller = plan, controller

    @classmethod
    def of(cls, config: RunConfig, vocab_size: int, tensor_parallel: CommunicationGroup) -> RunStorage | None:
        """None where every layer is a whole matrix all along."""
        if config.sparsity.storage != "packed":
            return None
        ranks = CommunicationGroup(tensor_parallel.rank, tensor_parallel.size)
        with torch.device("meta"):
            model = build_model(config, vocab_size, ranks)
        controller = Controller(config, model.sparse_layers(), ranks)
        return cls(plan_storage(config, controller), controller)

    def rung_of_saved(self, step: int, topology: Mapping[str, Tensor]) -> int:
        """The rung from step `step` (0-based) on, for a saved topology as ``Controller.state`` gives it. Raises
        ValueError where it is of another model or fits into none."""
        return self.plan.fitting(step, self._controller.count_active(topology))


@dataclass(frozen=True)
class Renewal:
    """Builds the engine anew between two steps. objective, methods: as for ``build_engine``."""

    config: RunConfig
    vocab_size: int
    mesh: Mesh
    storage: RunStorage
    objective: Objective | None = None
    methods: Sequence[MethodFactory] = ()

    def due(self, engine: TrainingEngine, methods: Sequence[TrainingMethod], step: int) -> Mapping[str, int] | None:
        """Capacities with which the engine must be built before step `step` (0-based); None: it has them."""
        (controller,) = (method.controller for method in methods if isinstance(method, MixedSparsityTraining))
        plan = self.storage.plan
        wanted = plan.capacities(plan.fitting(step, controller.shard_active))
        return None if wanted == capacities_of(engine) else wanted

    def keep(self, engine: TrainingEngine, methods: Sequence[TrainingMethod]) -> KeptState:
        """All that goes on, on the host; then both may be closed. Every rank calls it."""
        masks = {name: layer.mask.cpu().clone() for name, layer in engine.model.sparse_layers().items()}
        return KeptState(MemoryState(engine), masks, {method.name: method.state() for method in methods})

    def build(self, kept: KeptState, capacities: Mapping[str, int]) -> tuple[list[TrainingMethod], TrainingEngine]:
        """The engine with other capacities, and methods, standing where the closed ones stood; every rank calls it."""
        return_memory(self.mesh.device)
        random = torch.get_rng_state()
        arguments = (self.config, self.vocab_size, self.mesh, self.objective, self.methods)
        methods, engine = build_engine(*arguments, capacities=capacities, drawn=False)
        apply_state(engine, read_state(engine, kept.tensors, kept.tensors.slots_for(engine, kept.masks)))
        for method in methods:
            method.load_state(kept.methods[method.name])
            method.check_state()
        torch.set_rng_state(random)
        return methods, engine


@dataclass(frozen=True)
class KeptState:
    """What goes on when an engine is replaced."""

    tensors: MemoryState
    masks: Mapping[str, Tensor]
    methods: Mapping[str, dict[str, Tensor]]


def capacities_of(engine: TrainingEngine) -> dict[str, int]:
    """Blocks that each layer with packed storage has room for, by name."""
    return {layer.name: layer.capacity for layer in engine.packed_layers.values()}


def build_objective(config: RunConfig, vocab_size: int, mesh: Mesh) -> Objective:
    """Next-token prediction, and what the section `distillation` adds to it."""
    if config.distillation.teacher is None:
        return NextTokenCrossEntropy()
    if config.distillation.states is None:
        return Distillation(config.distillation, open_teacher(config, vocab_size, mesh))
    ranks = TensorParallel(mesh.tensor_parallel, config.parallel.sequence_parallel)
    folder, dtype = Path(config.distillation.states), DTYPES[config.train.precision]
    return Distillation(config.distillation, StoredTeacher(folder, ranks, mesh.device, dtype))

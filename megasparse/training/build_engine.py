"""Model, training methods and engine of a run, put together on a rank.

Apart from ``methods``, which plans use without importing DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Sequence

from megasparse.config.schema import RunConfig
from megasparse.engine.training_engine import TrainingEngine, model_construction
from megasparse.models.build import build_model
from megasparse.objectives.distillation import Distillation
from megasparse.objectives.objective import NextTokenCrossEntropy, Objective
from megasparse.objectives.teacher import open_teacher
from megasparse.parallel import Mesh
from megasparse.training.callback import MethodFactory, TrainingMethod
from megasparse.training.methods import build_methods


def build_engine(
    config: RunConfig,
    vocab_size: int,
    mesh: Mesh,
    objective: Objective | None = None,
    methods: Sequence[MethodFactory] = (),
) -> tuple[list[TrainingMethod], TrainingEngine]:
    """Training methods and engine of a run on this rank, at its beginning.

    objective: None: that of the configuration. methods: besides those that the configuration asks for.
    """
    with model_construction(config, mesh) as opened:
        # Topologies and their index lists hold the masks: these must not move afterwards.
        model = build_model(config, vocab_size, mesh.tensor_parallel).to(mesh.device)
        made = build_methods(config, model, mesh.tensor_parallel, methods)
        for method in made:
            method.start(opened)
    engine = TrainingEngine(model, made, config, mesh, objective or build_objective(config, vocab_size, mesh))
    for method in made:
        method.attach(engine, mesh)
    return made, engine


def build_objective(config: RunConfig, vocab_size: int, mesh: Mesh) -> Objective:
    """Next-token prediction, and what the section `distillation` adds to it."""
    if config.distillation.teacher is None:
        return NextTokenCrossEntropy()
    return Distillation(config.distillation, open_teacher(config, vocab_size, mesh))

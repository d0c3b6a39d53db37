"""Model, training methods and engine of a run, put together on a rank.

Apart from ``methods``, which plans use without importing DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Sequence

from megasparse.config.schema import RunConfig
from megasparse.engine.training_engine import TrainingEngine, draws_pieces, model_construction
from megasparse.models.build import build_model
from megasparse.parallel import Mesh
from megasparse.training.callback import MethodFactory, TrainingMethod
from megasparse.training.methods import build_methods
from megasparse.training.objectives import NextTokenCrossEntropy, Objective


def build_engine(
    config: RunConfig,
    vocab_size: int,
    mesh: Mesh,
    objective: Objective | None = None,
    methods: Sequence[MethodFactory] = (),
) -> tuple[list[TrainingMethod], TrainingEngine]:
    """Training methods and engine of a run on this rank, at its beginning.

    objective: None: next-token prediction. methods: besides those that the configuration asks for.
    """
    with model_construction(config, mesh) as opened:
        # Topologies and their index lists hold the masks: these must not move afterwards.
        deferred = draws_pieces(config)
        model = build_model(config, vocab_size, mesh.tensor_parallel, deferred=deferred).to(mesh.device)
        made = build_methods(config, model, mesh.tensor_parallel, methods)
        for method in made:
            method.start(opened)
    engine = TrainingEngine(model, made, config, mesh, objective or NextTokenCrossEntropy())
    for method in made:
        method.attach(engine, mesh)
    return made, engine

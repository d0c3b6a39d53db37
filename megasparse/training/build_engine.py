"""Model, controller and engine of a run, put together on a rank.

Apart from ``build``, which plans use without importing DeepSpeed.
"""

from __future__ import annotations

from megasparse.config.schema import RunConfig
from megasparse.engine.training_engine import TrainingEngine, model_construction
from megasparse.models.build import build_model
from megasparse.parallel import Mesh
from megasparse.sparsity.controller import Controller
from megasparse.training.objectives import NextTokenCrossEntropy, Objective


def build_engine(
    config: RunConfig, vocab_size: int, mesh: Mesh, objective: Objective | None = None
) -> tuple[Controller, TrainingEngine]:
    """Model, controller and engine of a run on this rank, at its beginning. objective: None: next-token prediction."""
    with model_construction(config, mesh) as opened:
        # Topologies and their index lists hold the masks: these must not move afterwards.
        model = build_model(config, vocab_size, mesh.tensor_parallel).to(mesh.device)
        controller = Controller(config, model.sparse_layers(), mesh.tensor_parallel)
        controller.start_topologies(opened)
    return controller, TrainingEngine(model, controller, config, mesh, objective or NextTokenCrossEntropy())

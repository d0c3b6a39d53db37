"""The training methods that a configuration can ask for.

    methods = build_methods(config, model, mesh.tensor_parallel)

A new one stands in a file of its own, has its settings in ``config.schema``, and is named in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Sequence

from megasparse.config.schema import RunConfig
from megasparse.methods.activation_sparsity import activation_sparsity
from megasparse.methods.admin import admin
from megasparse.methods.callback import MethodFactory, TrainingMethod
from megasparse.methods.layer_dropping import layer_dropping
from megasparse.methods.layer_tying import layer_tying
from megasparse.methods.low_rank_folding import low_rank_folding
from megasparse.methods.mixed_sparsity import MixedSparsityTraining
from megasparse.methods.second_order_pruning import second_order_pruning
from megasparse.methods.sparse_matrix_tuning import sparse_matrix_tuning
from megasparse.methods.spiel_variants import spiel
from megasparse.methods.switching import switching
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup

METHODS: tuple[MethodFactory, ...] = (
    MixedSparsityTraining,
    second_order_pruning,
    low_rank_folding,
    layer_dropping,
    activation_sparsity,
    sparse_matrix_tuning,
    spiel,
    switching,
    admin,
    layer_tying,
)


def build_methods(
    config: RunConfig, model: GPT, tensor_parallel: CommunicationGroup, more: Sequence[MethodFactory] = ()
) -> list[TrainingMethod]:
    """Those that the configuration asks for, and those of `more`, in the order in which their hooks are called."""
    made = [factory(config, model, tensor_parallel) for factory in (*METHODS, *more)]
    methods = [method for method in made if method is not None]
    names = [method.name for method in methods]
    assert all(names) and len(set(names)) == len(names), f"every method needs a name of its own: {names}"
    return methods

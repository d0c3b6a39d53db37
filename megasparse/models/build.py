"""From a configuration to a model.

model = build_model(config, vocab_size, mesh.tensor_parallel)
"""

from __future__ import annotations

from collections.abc import Mapping

from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.config.tensor_train import TensorTrainConfig
from megasparse.layers import LayerFactory, Linear, SparseSpec
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup, TensorParallel
from megasparse.sparsity.groups import check_groups, layer_settings


def build_model(
    config: RunConfig,
    vocab_size: int,
    tensor_parallel: CommunicationGroup | None = None,
    *,
    capacities: Mapping[str, int] | None = None,
    drawn: bool = True,
    deferred: bool = False,
) -> GPT:
    """This rank's shard of the model on the default device, with the initial weights of `run.seed`; all active.

    tensor_parallel: the ranks that share it; None: this process alone. capacities: of the layers with packed storage,
    by name, in blocks on each rank; their slots are empty. drawn: False: weights are zeros, for a state to be loaded.
    deferred: see ``LayerFactory``.
    """
    ranks = TensorParallel(tensor_parallel or CommunicationGroup(), config.parallel.sequence_parallel)

    def sparse_rule(name: str) -> SparseSpec | None:
        settings = layer_settings(config.sparsity, name)
        if settings is None:
            return None
        return SparseSpec(settings.block_size, config.sparsity.low_rank, (capacities or {}).get(name))

    def tuned_rule(name: str) -> int | None:
        return config.adapter_unit if ".attention." in name or ".mlp." in name else None

    def train_rule(name: str) -> TensorTrainConfig | None:
        return config.tensor_train if ".mlp." in name else None

    try:
        model = GPT(
            config.model,
            config.attention,
            vocab_size,
            LayerFactory(
                sparse_rule,
                config.run.seed if drawn else None,
                config.kernels.block_sparse,
                ranks,
                config.kernels.break_even,
                "torch" if config.train.compile == "blocks" else config.kernels.elementwise,
                deferred,
                config.kernels.dense,
                tuned_rule,
                train_rule,
            ),
            recompute=config.train.activation_recomputation,
            attention_kernel=config.kernels.hybrid_attention,
            loss_kernel=config.kernels.loss,
            reset_positions=config.data.document_masking and config.data.reset_positions,
        )
    except ValueError as error:
        raise ConfigError(f"sparsity.{error}") from None
    check_groups(config.sparsity, [layer.name for layer in model.modules() if isinstance(layer, Linear)])
    return model

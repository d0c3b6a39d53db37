"""From a configuration to the parts of a run: vocabulary, model, data."""

from __future__ import annotations

from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.data import build_datasets
from megasparse.data.tokenizer import Tokenizer, load_tokenizer
from megasparse.layers import LayerFactory, Linear, SparseSpec
from megasparse.models.gpt import GPT
from megasparse.parallel import Axis, TensorParallel
from megasparse.sparsity.groups import check_groups, layer_settings


def open_tokenizer(config: RunConfig) -> Tokenizer | None:
    """The run's tokenizer, where one is named. Raises ValueError for a file that is none."""
    if config.data.tokenizer is None:
        return None
    return load_tokenizer(config.data.tokenizer, config.data.tokenizer_path)


def vocabulary_size(config: RunConfig, tokenizer: Tokenizer | None) -> int:
    """Entries that tokens may have. Raises ConfigError where model and tokenizer contradict each other."""
    wanted = config.model.vocab_size
    if tokenizer is None:
        assert wanted is not None, "check_run asks for one of the two"
        return wanted
    if wanted is not None and wanted < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {wanted} is below the {tokenizer.vocab_size} entries of data.tokenizer_path; "
            f"legal values: unset, or at least {tokenizer.vocab_size}"
        )
    return wanted or tokenizer.vocab_size


def build_model(config: RunConfig, vocab_size: int, tensor_parallel: Axis | None = None) -> GPT:
    """This rank's shard of the model on the default device, with the initial weights of `run.seed`; all units live.

    tensor_parallel: the ranks that share it; None: this process alone.
    """
    ranks = TensorParallel(tensor_parallel or Axis(), config.parallel.sequence_parallel)

    def sparse_rule(name: str) -> SparseSpec | None:
        settings = layer_settings(config.sparsity, name)
        return None if settings is None else SparseSpec(settings.unit, config.sparsity.low_rank)

    try:
        model = GPT(
            config.model,
            config.attention,
            vocab_size,
            LayerFactory(sparse_rule, config.run.seed, config.kernels.block_sparse, ranks, config.kernels.break_even),
            recompute=config.train.activation_recomputation,
            attention_kernel=config.kernels.hybrid_attention,
            reset_positions=config.data.document_masking and config.data.reset_positions,
        )
    except ValueError as error:
        raise ConfigError(f"sparsity.{error}") from None
    check_groups(config.sparsity, [layer.name for layer in model.modules() if isinstance(layer, Linear)])
    return model


def build_data(config: RunConfig, vocab_size: int):
    """Training and validation sets: (anything indexed by global sample number, sequence or None)."""
    if config.data.train is None:
        raise ConfigError("data.train: unset; a list of {path: <prefix of .bin and .idx>, weight: <share>}")
    valid = config.data.valid
    return build_datasets(
        train_sources=[(source.path, source.weight) for source in config.data.train],
        valid_sources=None if valid is None else [(source.path, source.weight) for source in valid],
        split_fractions=(1.0 - config.data.valid_fraction, config.data.valid_fraction),
        seq_length=config.model.seq_length,
        vocab_size=vocab_size,
        seed=config.run.seed,
        documents=config.data.document_masking,
    )

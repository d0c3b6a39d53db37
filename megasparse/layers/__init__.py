"""Layers: what models are made of. They import kernels and the types of the configuration.

Linear layers come from a ``LayerFactory``, which knows which of them are sparse; everything else is built directly.
"""

from megasparse.kernels.hybrid_attention import active_entries
from megasparse.layers.attention import Attention
from megasparse.layers.cache import AnyLayerCache, JoinedCaches, KeyValueCache, LayerCache
from megasparse.layers.delta import Adapter, DeltaLinear, freeze, frozen_buffers
from megasparse.layers.embedding import Embedding, InputEmbedding
from megasparse.layers.factory import LayerFactory, SparseSpec
from megasparse.layers.linear import Linear, SparseLinear
from megasparse.layers.loss import HeadInChunks, Vocabulary
from megasparse.layers.mlp import MLP
from megasparse.layers.normalization import Normalization
from megasparse.layers.packed import PackedLinear
from megasparse.layers.residual import scaled_branch
from megasparse.layers.residual_weight import ResidualWeight
from megasparse.layers.tensor_train import TensorTrainLinear
from megasparse.parallel import shard_spec_of

__all__ = [
    "AnyLayerCache",
    "Adapter",
    "Attention",
    "DeltaLinear",
    "Embedding",
    "HeadInChunks",
    "InputEmbedding",
    "JoinedCaches",
    "KeyValueCache",
    "LayerCache",
    "LayerFactory",
    "Linear",
    "MLP",
    "Normalization",
    "PackedLinear",
    "ResidualWeight",
    "SparseLinear",
    "SparseSpec",
    "TensorTrainLinear",
    "Vocabulary",
    "active_entries",
    "scaled_branch",
    "freeze",
    "frozen_buffers",
    "shard_spec_of",
]

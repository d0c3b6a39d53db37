"""What computes the dense products of each linear layer of a run: for the plan, and for what the first start measures.

    dense_kernels(config, model, "cpu")
    # [{"layer": "mlp.up", "count": 12, "in": 768, "out": 3072, "tokens": 2048, "kernel": "onednn"}, ...]

Sparse layers stand there too: they have dense products in dense phases and above their break-even density. The layers
choose in the same way, by ``dense_products.choose``.
"""

from __future__ import annotations

from typing import Any

from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.cost.layer_kernels import DTYPES, layer_kind
from megasparse.kernels.dense_products import choose, onednn
from megasparse.kernels.dense_products.table import TABLE
from megasparse.layers import Linear, TensorTrainLinear
from megasparse.models.gpt import GPT


def dense_kernels(config: RunConfig, model: GPT, device: str) -> list[dict[str, Any]]:
    """One row per distinct kind of layer, with the shard of a tensor-parallel rank.

    model: rank 0's shard; meta device will do. Raises ConfigError where the kernel that was asked for cannot run.
    """
    asked, dtype = config.kernels.dense, DTYPES[config.train.precision]
    if asked == "onednn" and (reason := onednn.why_not(device, dtype)) is not None:
        raise ConfigError(f"kernels.dense: onednn cannot be used here: {reason}; must be auto or torch")
    tokens = config.train.micro_batch_size * config.model.seq_length
    rows: dict[tuple, dict[str, Any]] = {}
    for layer in model.modules():
        if not isinstance(layer, Linear) or isinstance(layer, TensorTrainLinear):
            continue
        outer, inner = layer.partition.local_shape
        # The head sees a chunk of the tokens at a time.
        seen = model.head_in_chunks.chunk_rows(tokens, dtype) if layer is model.head else tokens
        # The head is in no block: torch.compile does not trace it.
        is_traced = config.train.compile == "blocks" and layer is not model.head
        wanted = "torch" if is_traced else asked
        kernel, kind = choose(wanted, device, dtype, seen, (inner, outer)), layer_kind(layer.name)
        sizes = {"in": inner, "out": outer, "tokens": seen}
        row = rows.setdefault((kind, inner, outer), {"layer": kind, "count": 0, **sizes, "kernel": kernel})
        row["count"] += 1
    return list(rows.values())


def dense_warnings(config: RunConfig, device: str) -> list[str]:
    """What keeps `auto` from what was measured: a table that cannot be read."""
    decides = config.kernels.dense == "auto" and onednn.why_not(device, DTYPES[config.train.precision]) is None
    return [problem] if decides and (problem := TABLE.problem()) else []

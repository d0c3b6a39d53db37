"""What a rank needs of its machine, before anything is started: bytes of memory, and bytes sent per step.

    memory_per_rank(config, model, world_size)
    communication_per_rank(config, model, controller, world_size)

`model` is rank 0's shard on the meta device. Bytes sent are those of ring algorithms, in which an all-reduce of b bytes
over n ranks sends 2 b (n - 1) / n and a gather or a scatter b (n - 1) / n.
"""

from __future__ import annotations

from math import prod

from megasparse.config.schema import RunConfig
from megasparse.cost.layer_kernels import DTYPES
from megasparse.layers import DeltaLinear, PackedLinear, TensorTrainLinear
from megasparse.models.gpt import GPT
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.selection import ROUNDS
from megasparse.sparsity.topology import Topology
from megasparse.sparsity.update import EXTENT_BYTES, masks_are_added
from megasparse.utils.activations import ACTIVATIONS

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Defaults of DeepSpeed 0.19, in elements.
BUCKET = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
SELECTIONS = 3
"""Kept, grown by gradient, grown at random."""


def memory_per_rank(config: RunConfig, model: GPT, world_size: int) -> dict[str, int]:
    """Bytes by kind on the accelerator: what training holds at its peak; `host_optimizer` is outside of the total."""
    stage, size = config.deepspeed.zero_stage, BYTES[config.train.precision]
    local = sum(parameter.numel() for parameter in model.parameters())
    sparse = model.sparse_layers().values()
    share = world_size // config.parallel.tensor_parallel_size if stage >= 1 else 1
    separate_master = stage >= 1 or size < 4
    optimizer = local * (4 * separate_master + 8)
    if config.sparsity.per_weight_step_counts or config.sparsity.regrowth_warmup_steps:
        optimizer += 2 * sum(layer.weight.numel() for layer in sparse)
    frozen, accumulators = 0, 0
    if config.adapter_field is not None:
        # All other weights are whole on every rank; each trained entry counts its steps.
        optimizer += 2 * local
        frozen = sum(buffer.numel() for buffer in model.buffers() if buffer.is_floating_point())
    if config.spiel.trains_by_sm3:
        # No moments and no counts, and on every rank's accelerator a number for each row and column.
        optimizer, accumulators = local * 4 * separate_master, 4 * _rows_and_columns(model)
    optimizer //= share
    masks = sum(layer.mask.numel() for layer in sparse)
    offloaded = config.deepspeed.offload_optimizer == "cpu"
    summed = 4 if config.deepspeed.gradient_accumulation_dtype == "fp32" else size
    parts = {
        "weights": frozen * size
        + (local * size if stage < 3 else local * size // share + min(local, MAX_LIVE_PARAMETERS) * size),
        # One byte per unit, active or not, one bit per unit that was ever active.
        "masks": masks + masks // 8,
        # Stages 2 and 3 reduce bucket by bucket and keep a share.
        "gradients": local * size if stage < 2 else local * summed // share + min(local, BUCKET) * size,
        "optimizer": accumulators + (0 if offloaded else optimizer),
        **_dense_gradients(model, share),
        **_tuned_entries(config, model),
        "activations": activation_bytes(config) + size * _contracted_entries(config, model),
        "logits": logits_bytes(config, model),
    }
    total = sum(parts.values())
    return {**parts, **({"host_optimizer": optimizer} if offloaded else {}), "total": total}


def _contracted_entries(config: RunConfig, model: GPT) -> int:
    """What layers keep for their backward pass besides the inputs, where several products compute one."""
    tokens, found = config.train.micro_batch_size * config.model.seq_length, 0
    for layer in model.modules():
        if isinstance(layer, TensorTrainLinear):
            found += sum(rows * inner for rows, inner, _ in layer.products(tokens)[1:])
    return found // config.model.num_layers if config.train.activation_recomputation else found


def _dense_gradients(model: GPT, share: int) -> dict[str, int]:
    """Of layers with packed storage, in a topology update: a share of each in float32, and one of them whole. Nothing
    without such layers."""
    entries = [prod(layer.partition.local_shape) for layer in packed_layers(model)]
    return {"dense_gradients": 4 * (sum(entries) // share + max(entries))} if entries else {}


def _rows_and_columns(model: GPT) -> int:
    return sum(layer.out_features + layer.in_features for layer in model.modules() if isinstance(layer, DeltaLinear))


def _tuned_entries(config: RunConfig, model: GPT) -> dict[str, int]:
    """Of an adapter, on every rank: places of the trained units and their values in the base; and of SpIEL's candidates
    while their gradients are collected: place, sum and sum of squares, and the gradient of the step. Nothing without an
    adapter."""
    if config.adapter_unit is None:
        return {}
    local = sum(parameter.numel() for parameter in model.parameters())
    found = {"tuned_entries": 4 * local + 8 * local // config.adapter_unit**2}
    collects = config.spiel.density is not None and not config.spiel.trains_by_sm3
    return found | ({"candidates": 16 * local} if collects else {})


def packed_layers(model: GPT) -> list[PackedLinear]:
    return [layer for layer in model.sparse_layers().values() if isinstance(layer, PackedLinear)]


def activation_bytes(config: RunConfig) -> int:
    """Tensors that the backward pass of one micro-batch needs of all blocks, on a rank."""
    model, size, ranks = config.model, BYTES[config.train.precision], config.parallel.tensor_parallel_size
    tokens = config.train.micro_batch_size * model.seq_length
    key_value = 2 * model.key_value_heads * model.head_dim
    mlp = model.mlp_width * ACTIVATIONS[model.activation].inner_tensors
    # Per block and token: input and output of both norms between layers; then query, key, value, attention output and
    # the inside of the MLP, which tensor-parallel ranks share. A whole input of each column layer stays with all ranks.
    between = model.hidden_size * 4 // (ranks if config.parallel.sequence_parallel else 1)
    queries = model.num_attention_heads * model.head_dim
    block = between + (2 * queries + key_value + mlp) // ranks
    kept = model.hidden_size // (ranks if config.parallel.sequence_parallel else 1)
    blocks = model.num_layers * kept + block if config.train.activation_recomputation else model.num_layers * block
    return tokens * blocks * size


def logits_bytes(config: RunConfig, model: GPT) -> int:
    """What the head and the loss hold: one chunk of logits at a time, and the gradients that they make on the way."""
    size, loss, hidden = BYTES[config.train.precision], model.head_in_chunks, config.model.hidden_size
    tokens = config.train.micro_batch_size * config.model.seq_length
    # The scores are float32: the logits themselves, or a copy, which only kernels.loss cpu does without.
    rows = loss.chunk_rows(tokens, DTYPES[config.train.precision])
    chunk = rows * loss.vocabulary.share * (size if size == 4 else size + 4)
    # With several chunks the gradient of the weight is summed in float32, beside that of the present one.
    weight = loss.vocabulary.share * hidden * (size if rows == tokens else size + 4)
    return chunk + tokens * hidden * size + weight


def communication_per_rank(config: RunConfig, model: GPT, controller: Controller, world_size: int) -> dict[str, float]:
    """Bytes that a rank sends: `data_parallel` and `tensor_parallel` in an ordinary step, `topology_step` at most in a
    topology update on top of it, and `topology_average` of these over the update interval."""
    size, ranks = BYTES[config.train.precision], config.parallel.tensor_parallel_size
    replicas = world_size // ranks
    micro_batches = config.train.accumulation_steps(replicas)
    stage = config.deepspeed.zero_stage
    step = sum(topology_bytes(topology, replicas, ranks, stage) for topology in controller.topologies.values())
    # Dense gradients of packed layers are averaged in each micro-batch; those of grown blocks, which are at most as
    # many as there is room for, are put together.
    for layer in packed_layers(model):
        ring = 8 * (replicas - 1) / replicas
        step += ring * micro_batches * prod(layer.partition.local_shape)
        step += ring * layer.capacity * layer.block_size**2 if stage else 0
    return {
        "data_parallel": sum(data_parallel_bytes(config, model, world_size).values()),
        "tensor_parallel": micro_batches * _tensor_parallel_bytes(config, size, ranks),
        "topology_step": step,
        "topology_average": step / config.sparsity.update_interval,
    }


def step_bytes(config: RunConfig, model: GPT, world_size: int) -> dict[str, float]:
    """Bytes that a rank sends in a step without a topology update: `reduced` (gradients), `gathered` (weights) and
    `tensor_parallel`."""
    size, ranks = BYTES[config.train.precision], config.parallel.tensor_parallel_size
    of_data = data_parallel_bytes(config, model, world_size)
    micro_batches = config.train.accumulation_steps(world_size // ranks)
    return {
        "reduced": of_data["gradient_reduce"],
        "gathered": of_data["weight_gather"],
        "tensor_parallel": micro_batches * _tensor_parallel_bytes(config, size, ranks),
    }


def data_parallel_bytes(config: RunConfig, model: GPT, world_size: int) -> dict[str, float]:
    """Bytes that a rank sends in a step to reduce gradients, with what goes along with them, and to gather weights."""
    replicas, stage = world_size // config.parallel.tensor_parallel_size, config.deepspeed.zero_stage
    micro_batches = config.train.accumulation_steps(replicas)
    # ZeRO stage 3 leaves nothing of a parameter where it was.
    count = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    weights = count * BYTES[config.train.precision] * (replicas - 1) / replicas
    # Gradients are reduced once, or at stages 2 and 3 with every micro-batch; weights are gathered after the step, or
    # at stage 3 before every use: backward passes reuse those of the forward pass while all of them fit.
    gathers = 1 if count <= MAX_LIVE_PARAMETERS else 2
    reduces = {0: 2, 1: 2, 2: 2 * micro_batches, 3: micro_batches}[stage]
    # The largest of SM3's accumulators, float32, of all ranks once a step.
    accumulators = 2 * 4 * _rows_and_columns(model) * (replicas - 1) / replicas if config.spiel.trains_by_sm3 else 0.0
    return {
        "gradient_reduce": reduces * weights + accumulators,
        "weight_gather": {0: 0, 1: 1, 2: 1, 3: gathers * micro_batches}[stage] * weights,
    }


def topology_bytes(topology: Topology, replicas: int, ranks: int, stage: int) -> float:
    """Bytes that a rank sends at most in a topology update of one layer."""
    sharing = replicas if stage >= 1 else 1
    whole = 2 * (1 - 1 / (sharing * ranks))
    between_shards = 2 * (1 - 1 / ranks)
    statistics = 8 * (3 + topology.num_shards + topology.whole_grid.shape[0]) * between_shards
    if topology.block_size > 1:
        # Two float64 sums of squares over all, a byte of the present mask between the shards.
        return topology.num_units * (16 * whole + between_shards) + statistics
    # Every selection takes its rounds by score and, where scores tie, by key: histograms of int32.
    histograms = SELECTIONS * 2 * sum(2**bits for _, bits in ROUNDS) * 4 * whole
    bits = topology.shard_units // 8
    mask = 2 * (bits + 1) if masks_are_added(topology, sharing) else bits + sharing * EXTENT_BYTES
    return histograms + mask * (1 - 1 / sharing) + statistics


def _tensor_parallel_bytes(config: RunConfig, size: int, ranks: int) -> float:
    """Of one micro-batch: two sums per block in each direction, the embedding's, the head's, and the softmax's."""
    model, train = config.model, config.train
    tokens, ring = train.micro_batch_size * model.seq_length, 2 * (1 - 1 / ranks)
    activation = ring * tokens * model.hidden_size * size
    # Blocks that are computed again stop before their last sum.
    sums = (5 if train.activation_recomputation else 4) * model.num_layers + 2
    softmax = 3 * ring * tokens * 4
    between = 0.0
    if config.parallel.sequence_parallel:
        # A sum is a scatter and a gather, the same bytes. Besides, the embedding's gradient is gathered, and parameters
        # between layers sum up theirs.
        norms = (2 * model.num_layers + 1) * (2 if model.bias and model.normalization == "layernorm" else 1)
        row_biases = 2 * model.num_layers if model.bias else 0
        between = activation / 2 + (norms + row_biases) * ring * model.hidden_size * size
    return sums * activation + softmax + between

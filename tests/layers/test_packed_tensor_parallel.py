"""Models in packed storage divided over two ranks against dense storage on one: loss, logits and all gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from harness import run_distributed
from next_token import next_token_loss
from torch import Tensor

from megasparse.config.schema import AttentionConfig, ModelConfig
from megasparse.kernels.block_sparse import apply_mask_, assign_slots, pack, unpack
from megasparse.layers import LayerFactory, PackedLinear, SparseLinear, SparseSpec
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup, Mesh, ShardSpec, TensorParallel, shard_spec_of

GPT2 = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "vocab_size_multiple": 8}
LLAMA = {**GPT2, "position_embedding": "rope", "normalization": "rmsnorm", "activation": "swiglu", "bias": False}
# (model, rank of the low-rank branch, sequence parallel). Heads are sparse too; GPT-2's is tied.
CASES = {
    "gpt2": (GPT2, 0, False),
    "gpt2-low-rank-sequence": (GPT2, 2, True),
    "llama-low-rank": ({**LLAMA, "tie_embeddings": False}, 2, False),
    "llama-sequence": ({**LLAMA, "tie_embeddings": False}, 0, True),
}
BLOCK, ACTIVE, CAPACITY, VOCABULARY = 4, 20, 30, 37
"""Active blocks and slots of each of two ranks. The smallest shard, of the attention output, has 32 blocks."""


def build(case: str, axis: CommunicationGroup, capacity: int | None) -> GPT:
    settings, low_rank, sequence_parallel = CASES[case]
    ranks = TensorParallel(axis, sequence_parallel)
    spec = SparseSpec(BLOCK, low_rank, capacity)
    factory = LayerFactory(lambda name: spec, 5, tensor_parallel=ranks)
    model = GPT(ModelConfig(**settings), AttentionConfig(stride=4), VOCABULARY, factory).double()
    model.head_in_chunks.chunk_elements = 40 * 13 // axis.size
    model.set_attention_patterns([("full",) * 4] * 2)
    sparse = {layer.weight for layer in model.sparse_layers().values()}
    for name, parameter in model.named_parameters():
        if parameter not in sparse:
            parameter.data.add_(_noise(name, shard_spec_of(parameter), axis.rank), alpha=0.1)
    for name, layer in model.sparse_layers().items():
        _fill(name, layer, axis.rank)
    return model


def _noise(name: str, partition: ShardSpec, rank: int) -> Tensor:
    """The same for every division."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return partition.shard(torch.randn(partition.shape, generator=generator, dtype=torch.float64), rank)


@torch.no_grad()
def _fill(name: str, layer: SparseLinear, rank: int) -> None:
    """Random weights in `ACTIVE` random blocks of each of two shards."""
    grid, generator = layer.grid, torch.Generator().manual_seed(len(name))
    halves = ShardSpec(grid.shape, grid.dim, 2, grid.parts)
    shards = [torch.zeros(halves.local_shape, dtype=torch.bool) for _ in range(2)]
    for shard in shards:
        shard.view(-1)[torch.randperm(shard.numel(), generator=generator)[:ACTIVE]] = True
    layer.mask.copy_(grid.shard(halves.merge(shards), rank))
    weight = apply_mask_(0.2 * _noise(name, layer.partition, rank), layer.mask, BLOCK)
    if isinstance(layer, PackedLinear):
        slots = assign_slots(layer.mask, layer.capacity)
        layer.slot_blocks.copy_(slots[torch.randperm(len(slots), generator=generator)])
        layer.weight.copy_(pack(weight, layer.slot_blocks, BLOCK))
    else:
        layer.weight.copy_(weight)
    layer.topology_changed()


def results(model: GPT, axis: CommunicationGroup, collect: bool) -> dict[str, Tensor]:
    """Loss, logits and the whole gradients, those of sparse weights as matrices [out, in]; `collect`: their dense
    ones, which packed layers hand over once."""
    generator = torch.Generator().manual_seed(3)
    inputs, targets = (torch.randint(VOCABULARY, (3, 16), generator=generator) for _ in range(2))
    layers, received = model.sparse_layers(), {}
    for name, layer in layers.items():
        layer.collect_dense_gradient = collect
        if isinstance(layer, PackedLinear) and collect:
            layer.dense_gradient_ready = partial(_receive, received, name)
    loss = next_token_loss(model, inputs, targets)
    loss.backward()
    found = {"loss": loss.detach().double(), "logits": model(inputs).detach()}
    weights = {layer.weight for layer in layers.values()}
    for name, parameter in model.named_parameters():
        if parameter not in weights:
            found[name] = _whole(axis, shard_spec_of(parameter), parameter.grad)
    for name, layer in layers.items():
        gradient = layer.weight.grad
        if isinstance(layer, PackedLinear):
            rows, columns = layer.mask.shape
            packed = unpack(gradient, layer.slot_blocks, (rows, columns))
            gradient = received[name] if collect else packed
            torch.testing.assert_close(apply_mask_(gradient.clone(), layer.mask, BLOCK), packed)
        found[f"{name}, matrix"] = _whole(axis, layer.partition, gradient)
    return found


def _receive(received: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    assert name not in received, f"{name}: a second dense gradient in one backward pass"
    received[name] = gradient.clone()


def _whole(axis: CommunicationGroup, partition: ShardSpec, gradient: Tensor) -> Tensor:
    shards = axis.gather(gradient.contiguous())
    return partition.merge(list(shards)).clone()


def divided_results(mesh: Mesh) -> dict[tuple[str, bool], dict[str, Tensor]]:
    return {
        (case, collect): results(build(case, mesh.world, CAPACITY), mesh.world, collect)
        for case in CASES
        for collect in (False, True)
    }


@pytest.fixture(scope="module")
def divided() -> list[dict]:
    return run_distributed(divided_results, 2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("collect", [False, True])
def test_packed_on_two_ranks_is_dense_storage_on_one(divided, case, collect) -> None:
    """Weights are float64; the loss takes its softmax in float32 on purpose, which bounds what follows from it."""
    alone = CommunicationGroup()
    expected = results(build(case, alone, None), alone, collect)
    for found in divided:
        assert found[case, collect].keys() == expected.keys()
        for name, tensor in expected.items():
            tolerance = {"loss": 3e-6, "logits": 1e-12}.get(name, 1e-6 * float(tensor.abs().max()))
            torch.testing.assert_close(
                found[case, collect][name], tensor, rtol=0, atol=tolerance, msg=f"{case}: {name}"
            )


def test_a_tied_model_has_one_parameter_for_table_and_head() -> None:
    model = build("gpt2", CommunicationGroup(), 2 * CAPACITY)
    names = [name for name, parameter in model.named_parameters() if parameter is model.head.weight]
    assert names == ["embedding.tokens.weight"] and model.head.weight.shape == (2 * CAPACITY, BLOCK, BLOCK)

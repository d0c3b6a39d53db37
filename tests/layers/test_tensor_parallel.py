"""Layers and models divided over two and four ranks against the same on one: outputs, losses and all gradients."""

from __future__ import annotations

import pytest
import torch
from harness import run_distributed
from next_token import next_token_loss
from torch import Tensor, nn

from megasparse.config.loader import load_config
from megasparse.config.schema import AttentionConfig, ModelConfig
from megasparse.inference.generation import generate
from megasparse.layers import LayerFactory, SparseSpec
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup, Mesh, ShardSpec, TensorParallel, shard_spec_of
from megasparse.training.plan import make_plan

GPT2 = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "vocab_size_multiple": 8}
LLAMA = {
    **GPT2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "ffn_hidden_size": 48,
    "position_embedding": "rope",
    "normalization": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "tie_embeddings": False,
}
MODELS = {"gpt2": GPT2, "llama": LLAMA}
# (model, vocabulary, sparse rule's spec, sequence parallel); 37 of 40 rows are entries; 20 of 40: ranks of padding.
CASES = {
    "gpt2": ("gpt2", 37, None, False),
    "gpt2-sequence": ("gpt2", 37, None, True),
    "llama": ("llama", 37, None, False),
    "llama-sequence": ("llama", 37, None, True),
    "padding-only": ("gpt2", 20, None, False),
    "sparse": ("llama", 37, SparseSpec(4), False),
    "low-rank": ("gpt2", 37, SparseSpec(4, low_rank=2), False),
    "low-rank-sequence": ("gpt2", 37, SparseSpec(4, low_rank=2), True),
    "sparse-head": ("gpt2", 37, SparseSpec(2), False),
    "low-rank-head-sequence": ("llama", 37, SparseSpec(2, low_rank=2), True),
}
SPARSE_HEADS = ("sparse-head", "low-rank-head-sequence")


def build(case: str, axis: CommunicationGroup) -> GPT:
    kind, vocab_size, spec, sequence_parallel = CASES[case]
    settings = {**MODELS[kind], **({"vocab_size_multiple": 40} if case == "padding-only" else {})}
    factory = LayerFactory(
        lambda name: None if name == "head" and case not in SPARSE_HEADS else spec,
        5,
        tensor_parallel=TensorParallel(axis, sequence_parallel),
    )
    # With several heads on a rank, each has an offset of its own; ranks must take those of their heads.
    attention = AttentionConfig(stride=4, stride_offsets="spread" if kind == "llama" else "none")
    model = GPT(ModelConfig(**settings), attention, vocab_size, factory).double()
    # Some chunks of the 48 tokens, the last one smaller.
    model.head_in_chunks.chunk_elements = 40 * 13 // axis.size
    heads = settings["num_attention_heads"]
    model.set_attention_patterns([tuple(["local", "full", "strided", "sparse"] * 2)[:heads]] * 2)
    for name, parameter in model.named_parameters():
        # All parameters different from their initial zeros and ones; the same for every division.
        partition = shard_spec_of(parameter)
        noise = torch.randn(partition.shape, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64)
        parameter.data.add_(partition.shard(noise, axis.rank), alpha=0.1)
    return model


def tokens(case: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randint(CASES[case][1], (3, 16), generator=generator) for _ in range(2))


def results(case: str, model: nn.Module, axis: CommunicationGroup) -> dict[str, Tensor]:
    """Loss, logits, and the whole gradients from the shards of all ranks."""
    inputs, targets = tokens(case)
    loss = next_token_loss(model, inputs, targets)
    loss.backward()
    found = {"loss": loss.detach().double(), "logits": model(inputs).detach()}
    for name, parameter in model.named_parameters():
        partition, shards = shard_spec_of(parameter), axis.gather(parameter.grad)
        if not partition.is_divided:
            assert all(torch.equal(shards[0], shard) for shard in shards), f"{case}: {name} differs between ranks"
        found[name] = partition.merge(list(shards)).clone()
    return found


def divided_results(mesh: Mesh) -> dict[str, dict[str, Tensor]]:
    found = {case: results(case, build(case, mesh.world), mesh.world) for case in CASES}
    for case in ("llama", "llama-sequence", "gpt2-sequence"):
        found[f"generated {case}"] = {"tokens": continued(build(case, mesh.world))}
    return found


def continued(model: GPT) -> Tensor:
    """Three tokens and fifteen more, beyond the context of sixteen."""
    return generate(model.eval(), torch.tensor([[3, 1, 4], [2, 7, 1]]), 15, temperature=0)


@pytest.fixture(scope="module")
def divided() -> dict[int, list[dict]]:
    return {world: run_distributed(divided_results, world) for world in (2, 4)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, 4])
def test_a_divided_model_is_the_same_model(divided, world, case) -> None:
    """Weights are float64; the loss takes its softmax in float32 on purpose, which bounds what follows from it."""
    expected = results(case, build(case, CommunicationGroup()), CommunicationGroup())
    for found in divided[world]:
        assert found[case].keys() == expected.keys()
        for name, tensor in expected.items():
            tolerance = {"loss": 3e-6, "logits": 1e-12}.get(name, 1e-6 * float(tensor.abs().max()))
            torch.testing.assert_close(found[case][name], tensor, rtol=0, atol=tolerance, msg=f"{case}: {name}")


@pytest.mark.parametrize("case", ["llama", "llama-sequence", "gpt2-sequence"])
@pytest.mark.parametrize("world", [2, 4])
def test_a_divided_model_continues_a_prompt_alike(divided, world, case) -> None:
    """Neither the prompt's length nor a single token is a multiple of the ranks that divide the tokens."""
    expected = continued(build(case, CommunicationGroup()))
    for found in divided[world]:
        assert torch.equal(found[f"generated {case}"]["tokens"], expected)


@pytest.mark.parametrize(
    "partition",
    [ShardSpec((12, 4), 0, 4), ShardSpec((6, 8), 1, 2), ShardSpec((24, 2), 0, 2, (12, 8, 4)), ShardSpec((3,), 0, 3)],
    ids=str,
)
def test_shards_make_up_the_whole(partition) -> None:
    whole = torch.randn(partition.shape)
    shards = [partition.shard(whole, rank) for rank in range(partition.size)]
    assert all(tuple(shard.shape) == partition.local_shape and shard.is_contiguous() for shard in shards)
    assert torch.equal(partition.merge(shards), whole)
    for rank, shard in enumerate(shards):
        assert torch.equal(whole.index_select(partition.dim, partition.indices(partition.dim, rank)), shard)


def test_every_parameter_declares_its_division() -> None:
    model = build("llama", CommunicationGroup(1, 4))
    divided = {name for name, parameter in model.named_parameters() if shard_spec_of(parameter).is_divided}
    assert {name for name, _ in model.named_parameters()} - divided == {
        name for name, _ in model.named_parameters() if "norm" in name
    }
    for name, parameter in model.named_parameters():
        assert tuple(parameter.shape) == shard_spec_of(parameter).local_shape, name
        assert parameter.tensor_model_parallel == (name in divided), name
    assert shard_spec_of(model.layers[0].attention.qkv.weight).parts == (32, 16, 16)
    assert model.num_parameters() == build("llama", CommunicationGroup()).num_parameters()


def test_blocks_that_do_not_fill_a_shard_are_refused_with_the_possible_ones() -> None:
    """Key and value rows: 4 heads of 16 over 4 ranks are 16 each, which blocks of 32 do not fill."""
    overrides = [
        "model.vocab_size=64", "model.num_layers=1", "model.hidden_size=128", "model.num_attention_heads=8",
        "model.num_key_value_heads=4", "sparsity.block_size=32", "parallel.tensor_parallel_size=4",
    ]  # fmt: skip
    with pytest.raises(ValueError) as caught:
        make_plan(load_config([], overrides), 4)
    for part in ("sparsity.block_size: 32", "layers.0.attention.qkv", "4 tensor-parallel ranks", "1, 2, 4, 8, 16"):
        assert part in str(caught.value)

"""What a plan says of `train.init_from`: what is refused, and what the user is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megasparse.checkpoint.model_folder import ModelFolderWriter, load_topology
from megasparse.checkpoint.tensor_files import save_tensors
from megasparse.config.loader import load_config
from megasparse.config.schema import RunConfig
from megasparse.models.build import build_model
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.topology import pack_bits, unpack_bits
from megasparse.training.plan import make_plan

SETTINGS = [
    "model.num_layers=1", "model.hidden_size=32", "model.num_attention_heads=2", "model.seq_length=8",
    "model.vocab_size=97", "model.position_embedding=rope", "sparsity.block_size=16", "train.steps=40",
    "sparsity.update_interval=2",
]  # fmt: skip
STATIC = ["sparsity.algorithm=static", "sparsity.density=0.25"]


def config_of(*overrides: str) -> RunConfig:
    return load_config([], [*SETTINGS, *overrides])


def write(folder: Path, *overrides: str, topology: bool = False) -> Path:
    config = config_of(*overrides)
    model = build_model(config, config.model.vocab_size)
    controller = Controller(config, model.sparse_layers())
    controller.start_topologies()
    weights = dict(model.named_parameters())
    with ModelFolderWriter(folder, config, {name: torch.float32 for name in weights}) as writer:
        for name in writer.names:
            writer.write(name, weights[name].detach()[: writer.specs[name].shape[0]])
        if topology:
            writer.topology(controller.state())
    return folder


def warnings(folder: Path, *overrides: str) -> list[str]:
    found = make_plan(config_of(f"train.init_from={folder}", *overrides), 1, "cpu")["warnings"]
    return [warning for warning in found if "init_from" in warning]


def test_a_start_that_fits_has_no_warnings(tmp_path) -> None:
    assert warnings(write(tmp_path / "dense", "sparsity.algorithm=dense")) == []
    assert warnings(write(tmp_path / "sparse", *STATIC, topology=True), *STATIC) == []
    # A plan for other ranks has the folder's vocabulary padded in another way.
    config = config_of(f"train.init_from={tmp_path / 'sparse'}", *STATIC, "parallel.tensor_parallel_size=2")
    assert make_plan(config, 2, "cpu")["parallel"]["tensor_parallel_size"] == 2


def test_a_dense_run_starts_from_any_folder_of_its_model(tmp_path) -> None:
    """It has no topologies, and so no density to compare."""
    dense = "sparsity.algorithm=dense"
    assert warnings(write(tmp_path / "plain", dense), dense) == []
    (message,) = warnings(write(tmp_path / "sparse", *STATIC, topology=True), dense)
    assert "the topology of train.init_from is not used" in message


def test_what_becomes_of_topologies_is_said(tmp_path) -> None:
    dense, sparse = write(tmp_path / "dense"), write(tmp_path / "sparse", *STATIC, topology=True)
    (message,) = warnings(dense, *STATIC)
    assert "has no topology, and the schedule starts at density 0.25" in message
    (message,) = warnings(sparse)
    assert "topology of train.init_from is not used: all weights are active at the start" in message
    (message,) = warnings(sparse, "sparsity.algorithm=dense")
    assert "is not used" in message
    # A topology in which everything lives says nothing.
    assert warnings(write(tmp_path / "all-active", topology=True)) == []
    assert warnings(tmp_path / "all-active", "sparsity.algorithm=dense") == []
    with pytest.raises(ValueError, match="topology of density 0.25.*, and the schedule starts at 0.5000; must be"):
        warnings(sparse, *STATIC, "sparsity.density=0.5")
    with pytest.raises(ValueError, match="topology of another grid of units"):
        warnings(sparse, *STATIC, "sparsity.block_size=8")


def test_context_may_change_and_is_said(tmp_path) -> None:
    folder = write(tmp_path / "dense", "sparsity.algorithm=dense")
    (message,) = warnings(folder, "model.rope_theta=500000", "model.seq_length=16")
    assert message == "model.rope_theta: 10000.0 in train.init_from, 500000.0 here"
    window = ["attention.windows=[{start: 0.0, end: 1.0, pattern: local}]", "attention.stride=4"]
    windowed = write(tmp_path / "windowed", "sparsity.algorithm=dense", *window)
    (message,) = warnings(windowed)
    assert "has a window of 4 tokens" in message and warnings(windowed, *window) == []


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.num_layers=2", "model.num_layers: 2 here, 1 in train.init_from .*; must be 1"),
        ("model.hidden_size=64", "model.hidden_size: 64 here, 32"),
        ("model.vocab_size=98", "model.vocab_size: 98 here, 97 in train.init_from .*; must be 97"),
        ("model.activation=swiglu", "model.activation: 'swiglu' here, 'gelu'"),
        ("model.num_key_value_heads=1", "model.key_value_heads: 1 here, 2"),
        ("model.qkv_bias=false", "model.has_qkv_bias: False here, True"),
        ("model.position_embedding=learned", "model.position_embedding: 'learned' here, 'rope'"),
        ("model.tie_embeddings=false", "model.tie_embeddings: False here, True"),
        ("sparsity.low_rank=2", "of another model: tensors differ at layers.0.attention.output.side_in"),
    ],
)
def test_another_model_is_refused(tmp_path, override, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        warnings(write(tmp_path / "dense", "sparsity.algorithm=dense"), override)


def test_a_folder_that_is_none_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="train.init_from: .*nowhere: no model folder there; must be unset"):
        warnings(tmp_path / "nowhere")
    folder = write(tmp_path / "dense", "sparsity.algorithm=dense")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        warnings(folder)


def test_a_run_that_goes_on_needs_the_folder_no_more(tmp_path) -> None:
    """A batch job that is requeued must not fail because the folder has been moved since."""
    gone = [f"train.init_from={tmp_path / 'gone'}", f"run.folder={tmp_path}", "run.name=x"]
    (tmp_path / "x" / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert make_plan(config_of(*gone, "train.resume=auto"), 1, "cpu")
    for fresh in ([*gone, "train.resume=never"], [*gone, "run.name=y", "train.resume=auto"]):
        with pytest.raises(ValueError, match="train.init_from: .*gone: no model folder there"):
            make_plan(config_of(*fresh), 1, "cpu")


@pytest.mark.parametrize(("block_size", "units"), [(1, "weights"), (16, "blocks")])
def test_masks_that_contradict_the_weights_are_refused(tmp_path, block_size, units) -> None:
    settings = [*STATIC, f"sparsity.block_size={block_size}"]
    folder = write(tmp_path / "sparse", *settings, topology=True)
    assert warnings(folder, *settings) == []
    bits = load_topology(folder / "topology.safetensors")
    name = "active/layers.0.mlp.up"
    # As many units as before, but others.
    bits[name] = pack_bits(unpack_bits(bits[name], 8 * bits[name].numel()).roll(1))
    save_tensors(bits, folder / "topology.safetensors")
    with pytest.raises(ValueError, match=rf"{units} of layer layers.0.mlp.up are not 0 and inactive in its topology"):
        warnings(folder, *settings)


def test_a_prompt_of_the_last_sample_that_the_context_does_not_hold_is_refused() -> None:
    def plan(*settings: str):
        return make_plan(config_of("model.vocab_size=257", "data.tokenizer=bytes", *settings), 1, "cpu")

    assert plan("train.sample_prompt=abcdefgh")
    with pytest.raises(ValueError, match="train.sample_prompt: 9 tokens; must be at most 8, the model's seq_length"):
        plan("train.sample_prompt=abcdefghi")
    assert plan("train.sample_prompt=abcdefghi", "train.sample_tokens=0")

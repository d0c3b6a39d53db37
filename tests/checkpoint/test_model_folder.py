"""Model folders: tensors streamed in and out, shards, damage, and folders that appear whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_files import files_of_at_most

from megasparse.checkpoint.model_folder import ModelFolder, ModelFolderWriter, is_model_folder, load_weights
from megasparse.checkpoint.store import CheckpointError
from megasparse.checkpoint.tensor_files import TensorFiles, TensorFileWriter, TensorSpec
from megasparse.config.loader import load_config
from megasparse.config.schema import RunConfig
from megasparse.models.build import build_model
from megasparse.utils.files import describe_failure
from megasparse.utils.folders import new_folder

SETTINGS = [
    "model.num_layers=1", "model.hidden_size=16", "model.num_attention_heads=2", "model.seq_length=8",
    "model.vocab_size=11", "sparsity.algorithm=dense",
]  # fmt: skip


def config_of(*overrides: str) -> RunConfig:
    return load_config([], [*SETTINGS, *overrides])


def random_weights(writer: ModelFolderWriter) -> dict[str, torch.Tensor]:
    return {name: torch.randn(spec.shape).to(spec.dtype) for name, spec in writer.specs.items()}


def write(folder: Path, *overrides: str, dtype: torch.dtype = torch.float32, **options) -> dict[str, torch.Tensor]:
    """A model folder of random weights; returns them."""
    config = config_of(*overrides)
    model = build_model(config, 11)
    dtypes = {name: dtype for name, _ in model.named_parameters()}
    with ModelFolderWriter(folder, config, dtypes, **options) as writer:
        weights = random_weights(writer)
        for name in writer.names:
            writer.write(name, weights[name])
    return weights


def content(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("limit", [0, 500, 5000])
def test_a_folder_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path, limit) -> None:
    with files_of_at_most(limit), pytest.raises(OSError) as raised:
        write(tmp_path / "model")
    assert "model.safetensors: File too large" in describe_failure(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [10**9, 3000])
def test_what_is_written_is_read_in_one_file_or_several(tmp_path, dtype, limit) -> None:
    folder = tmp_path / "model"
    weights = write(folder, dtype=dtype, max_file_bytes=limit, facts={"step": 3})
    assert is_model_folder(folder) and not is_model_folder(tmp_path)
    model = ModelFolder(folder)
    assert model.names == list(weights) and model.facts == {"step": 3} and model.topology() == {}
    for name, weight in weights.items():
        assert (model.shape(name), model.dtype(name)) == (tuple(weight.shape), dtype)
        assert torch.equal(model.tensor(name), weight)
    assert torch.equal(model.rows("embedding.tokens.weight", 3, 5), weights["embedding.tokens.weight"][3:5])
    model.check_files()
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (limit == 3000) == (folder / "model.safetensors.index.json").exists()
    # The library reads what this writer wrote, and finds the same.
    read = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in weights)


def test_a_model_takes_the_weights_and_pads_the_vocabulary(tmp_path) -> None:
    weights = write(tmp_path / "model", "model.tie_embeddings=false")
    model = build_model(config_of("model.tie_embeddings=false"), 11)
    load_weights(model, ModelFolder(tmp_path / "model"))
    for name, parameter in model.named_parameters():
        wanted = weights[name]
        assert torch.equal(parameter[: wanted.shape[0]], wanted) and not parameter[wanted.shape[0] :].any()
    assert model.head.weight.shape[0] == 64
    with pytest.raises(CheckpointError, match="another model: they differ at head.weight"):
        load_weights(build_model(config_of(), 11), ModelFolder(tmp_path / "model"))
    with pytest.raises(CheckpointError, match=r"positions.weight has shape \[8, 16\] there and \[9, 16\] here"):
        other = config_of("model.tie_embeddings=false", "model.seq_length=9")
        load_weights(build_model(other, 11), ModelFolder(tmp_path / "model"))


def test_a_relative_tokenizer_path_leads_into_the_folder(tmp_path) -> None:
    write(tmp_path / "model", "data.tokenizer=sentencepiece", "data.tokenizer_path=tokenizer.model")
    config = ModelFolder(tmp_path / "model").config
    assert config.data.tokenizer_path == str(tmp_path / "model" / "tokenizer.model")
    assert "tokenizer_path: tokenizer.model" in (tmp_path / "model" / "config.yaml").read_text()


def test_side_paths_are_stored(tmp_path) -> None:
    sparse = ["sparsity.algorithm=mst", "sparsity.low_rank=2", "sparsity.block_size=8"]
    weights = write(tmp_path / "model", *sparse)
    assert weights["layers.0.mlp.up.side_in"].shape == (2, 16) and ModelFolder(tmp_path / "model").names


def _drop_a_shard(folder: Path) -> str:
    victim = sorted(folder.glob("model-*.safetensors"))[1]
    victim.unlink()
    return f"{victim.name} is missing"


def _truncate(folder: Path) -> str:
    victim = sorted(folder.glob("model-*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:-4])
    return f"{victim.name}: not a whole safetensors file"


def _other_shape(folder: Path) -> str:
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("seq_length: 8", "seq_length: 9"))
    return r"embedding.positions.weight has shape \[8, 16\], config.yaml asks for \[9, 16\]"


def _other_names(folder: Path) -> str:
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("num_layers: 1", "num_layers: 2"))
    return "tensors and config.yaml differ at layers.1."


def _other_format(folder: Path) -> str:
    for path in folder.glob("*.safetensors"):
        save_file(load_file(path), path, {"format": "pt"})
    return "format None; must be 1"


def _index_elsewhere(folder: Path) -> str:
    path = folder / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    values["weight_map"] = {name: f"../{file}" for name, file in values["weight_map"].items()}
    path.write_text(json.dumps(values))
    return "is no name of a file in the same folder"


def _index_differs(folder: Path) -> str:
    path = folder / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    del values["weight_map"]["final_norm.weight"]
    path.write_text(json.dumps(values))
    return "index and files differ at final_norm.weight"


def _no_json(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text("{")
    return "index.json: not readable as JSON"


@pytest.mark.parametrize(
    "damage",
    [_drop_a_shard, _truncate, _other_shape, _other_names, _other_format, _index_elsewhere, _index_differs, _no_json],
)
def test_damage_is_named(tmp_path, damage) -> None:
    write(tmp_path / "model", max_file_bytes=3000)
    reason = damage(tmp_path / "model")
    with pytest.raises(CheckpointError, match=reason):
        ModelFolder(tmp_path / "model")


def test_checksums_find_what_sizes_do_not(tmp_path) -> None:
    write(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="model.safetensors does not have its checksum"):
        ModelFolder(tmp_path / "model").check_files()


def test_a_folder_that_is_there_stays_until_the_new_one_is_whole(tmp_path) -> None:
    folder = tmp_path / "model"
    write(folder)
    before = content(folder)
    with pytest.raises(ValueError, match="holds something already; must be"):
        write(folder)
    config = config_of()
    dtypes = {name: torch.float32 for name, _ in build_model(config, 11).named_parameters()}
    with pytest.raises(CheckpointError, match="final_norm.bias: has shape"):
        with ModelFolderWriter(folder, config, dtypes, replace=True) as writer:
            for name, weight in random_weights(writer).items():
                writer.write(name, weight if name != "final_norm.bias" else weight[1:])
    with pytest.raises(AssertionError, match="tensors were not written"):
        with ModelFolderWriter(folder, config, dtypes, replace=True):
            pass
    assert content(folder) == before and [path.name for path in tmp_path.iterdir()] == ["model"]
    weights = write(folder, replace=True)
    assert torch.equal(ModelFolder(folder).tensor("final_norm.bias"), weights["final_norm.bias"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_new_folder_takes_an_empty_one_and_no_file(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as partial:
        (partial / "x").write_text("x")
    assert content(tmp_path / "empty") == {Path("x"): b"x"}
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"), new_folder(tmp_path / "file"):
        pass
    with new_folder(tmp_path / "deep" / "er"):
        pass
    assert (tmp_path / "deep" / "er").is_dir()


@pytest.mark.parametrize("shape", [(0, 4), (), (3,)])
def test_every_shape_and_dtype_is_written_as_the_library_reads_it(tmp_path, shape) -> None:
    tensors = {
        str(dtype): torch.zeros(shape, dtype=dtype) + (1 if dtype == torch.bool else 3)
        for dtype in (torch.float64, torch.float16, torch.int64, torch.int16, torch.uint8, torch.bool)
    }
    tensors = {name: tensor.to(getattr(torch, name.removeprefix("torch."))) for name, tensor in tensors.items()}
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    writer = TensorFileWriter(tmp_path, specs, {})
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    files = TensorFiles(tmp_path)
    assert files.specs == specs and all(torch.equal(files.tensor(name), tensor) for name, tensor in tensors.items())

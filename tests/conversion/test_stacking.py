"""A model made deeper: every layer a copy of one of the small model, masks too, and a run can start from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_states import TinyState, content, dense_config, write_model, write_run
from tool_calls import call

from megasparse.checkpoint.model_folder import ModelFolder
from megasparse.config.loader import ConfigError, load_config
from megasparse.config.schema import AttentionConfig, PatternOverride, StackingConfig
from megasparse.inference.trained import open_trained
from megasparse.training.plan import make_plan

STACKED = ["model.num_layers=4", "stacking.num_layers=2"]


def grow(model: Path, output: Path, layers: int = 6) -> tuple[int, str]:
    return call("grow_model", "--model", model, "--layers", str(layers), "--output", output)


def test_every_layer_is_a_copy_and_the_rest_stays(tmp_path) -> None:
    local = AttentionConfig(overrides=[PatternOverride(layers=[1], pattern="local")])
    config = dense_config().model_copy(update={"attention": local})
    small = ModelFolder(write_model(tmp_path / "small", TinyState(config), config))
    status, output = grow(tmp_path / "small", tmp_path / "deep")
    assert status == 0 and "2 layers are copied to 6" in output and "loss is higher" in output
    deep = ModelFolder(tmp_path / "deep")
    deep.check_files()
    assert deep.config.model == small.config.model.model_copy(update={"num_layers": 6})
    assert deep.config.attention.overrides[0].layers == [1, 3, 5]
    layers = {name.split(".")[1] for name in deep.names if name.startswith("layers.")}
    assert layers == set("012345") and len(set(deep.names)) == len(deep.names)
    for name in deep.names:
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = str(int(parts[1]) % 2)
        assert torch.equal(deep.tensor(name), small.tensor(".".join(parts))), name


def test_the_topology_is_copied_and_a_run_starts_with_it(tmp_path) -> None:
    config = dense_config()
    write_model(tmp_path / "dense", TinyState(config), config)
    words = ["--model", tmp_path / "dense", "--density", "0.3", "--block-size", "8"]
    assert call("sparsify", *words, "--output", tmp_path / "small")[0] == 0
    assert grow(tmp_path / "small", tmp_path / "deep")[0] == 0
    small, deep = (ModelFolder(tmp_path / name).topology() for name in ("small", "deep"))
    assert len(deep) == 3 * len(small)
    for key, bits in deep.items():
        number = int(key.split(".")[1])
        assert torch.equal(bits, small[key.replace(f"layers.{number}.", f"layers.{number % 2}.")]), key
    start = load_config([tmp_path / "deep" / "config.yaml"], [f"train.init_from={tmp_path / 'deep'}"])
    warnings = make_plan(start, 1)["warnings"]
    assert not any("no topology" in text or "random" in text for text in warnings), warnings


def test_a_model_of_a_run_that_has_not_grown_is_what_it_is(tmp_path) -> None:
    """Tools see the small model in a checkpoint of it, though the run is to have four layers."""
    small = dense_config()
    data = small.data.model_copy(update={"tokenizer": "bytes"})
    model = small.model.model_copy(update={"num_layers": 4, "vocab_size": 288})
    whole = small.model_copy(update={"model": model, "stacking": StackingConfig(num_layers=2), "data": data})
    state = TinyState(whole.model_copy(update={"model": model.model_copy(update={"num_layers": 2})}), vocab_size=288)
    write_run(tmp_path / "run", state, whole)
    assert open_trained(tmp_path / "run").config.model.num_layers == 2
    status, output = call("convert_checkpoint", "from-run", "--input", tmp_path / "run", "--output", tmp_path / "model")
    assert status == 0, output
    folder = ModelFolder(tmp_path / "model")
    assert folder.config.model.num_layers == 2 and folder.config.stacking.num_layers is None
    assert grow(tmp_path / "run", tmp_path / "deep", 4)[0] == 0


@pytest.mark.parametrize(
    ("model", "layers", "sparsity", "message"),
    [
        ("missing", 6, {}, "must be a run folder or a model folder"),
        ("small", 5, {}, "--layers: 5 is not 2, 3, ... times the 2 layers of the model; must be 4, 6, 8, ..."),
        ("small", 2, {}, "--layers: 2 is not 2, 3, ... times"),
        (
            "small",
            4,
            {"algorithm": "static", "groups": [{"pattern": "layers.0.*", "dense": True}]},
            "sparsity.groups: layer layers.2.attention.qkv has other settings than layers.0.attention.qkv",
        ),
    ],
)
def test_what_cannot_grow_is_refused(tmp_path, model, layers, sparsity, message) -> None:
    config = dense_config(**sparsity)
    write_model(tmp_path / "small", TinyState(config), config)
    status, output = grow(tmp_path / model, tmp_path / "deep", layers)
    assert status == 2 and message in output and not (tmp_path / "deep").exists()


def test_a_folder_that_is_there_is_left_alone(tmp_path) -> None:
    config = dense_config()
    write_model(tmp_path / "small", TinyState(config), config)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "mine.txt").write_text("mine")
    status, output = grow(tmp_path / "small", tmp_path / "deep")
    assert status == 2 and str(tmp_path / "deep") in output
    assert content(tmp_path / "deep") == {"mine.txt": b"mine"}


def test_a_run_that_grows_starts_from_a_folder_of_its_small_model(tmp_path) -> None:
    config = dense_config()
    write_model(tmp_path / "small", TinyState(config), config)
    assert grow(tmp_path / "small", tmp_path / "deep", 4)[0] == 0

    def plan(folder: str) -> dict:
        words = [*STACKED, f"train.init_from={tmp_path / folder}"]
        return make_plan(load_config([tmp_path / "small" / "config.yaml"], words), 1)

    assert plan("small")["stages"][0]["num_layers"] == 2
    with pytest.raises(ConfigError, match=r"model.num_layers: 2 here, 4 in train.init_from"):
        plan("deep")

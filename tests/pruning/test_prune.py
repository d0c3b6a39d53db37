"""A trained model folder pruned from end to end: what is on disk, what is refused, kills, and ranks."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
import trained_model
from harness import run_distributed
from random_models import our_model

from megasparse.checkpoint.model_folder import ModelFolder
from megasparse.checkpoint.saved_state import layers_of
from megasparse.checkpoint.store import CheckpointError
from megasparse.config.loader import ConfigError, load_config
from megasparse.conversion.sources import FolderSource, write_source
from megasparse.data.indexed import IndexedDatasetWriter
from megasparse.inference.trained import open_trained
from megasparse.launching import LaunchEnvironment
from megasparse.models.build import build_model
from megasparse.parallel import CommunicationGroup
from megasparse.pruning import plan as pruning_plan
from megasparse.pruning.calibrated_walk import CalibratedWalk
from megasparse.pruning.criteria import magnitude, wanda
from megasparse.pruning.methods import METHODS
from megasparse.pruning.model_in_blocks import ModelInBlocks
from megasparse.pruning.patterns import Pattern, parse_pattern
from megasparse.pruning.plan import make_plan
from megasparse.pruning.run import Pruner, prune
from megasparse.pruning.settings import METHOD_NAMES, PruneSettings
from megasparse.pruning.sparsegpt import sparsegpt
from megasparse.pruning.statistics import InputGram, collecting, output_error
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.topology import pack_bits, unpack_bits
from megasparse.training.initial_checks import initial_warnings

ROOT = Path(__file__).resolve().parents[2]
ALONE = LaunchEnvironment.from_variables({})
PRUNED = ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A trained model, `model`, and a text, `text.txt`."""
    folder = tmp_path_factory.mktemp("trained")
    config = trained_model.model_config()
    trained_model.write_folder(folder / "model", config, trained_model.trained(config))
    (folder / "text.txt").write_text(trained_model.text(), encoding="utf-8")
    return folder


def settings(trained: Path, output: Path, **changes) -> PruneSettings:
    base = PruneSettings(
        trained / "model", output, density=0.5, calibration=str(trained / "text.txt"), samples=12, window=31
    )
    if changes.get("method") == "magnitude":
        base = dataclasses.replace(base, calibration=None, samples=None, window=None)
    if "pattern" in changes:
        changes["pattern"] = parse_pattern(changes["pattern"])
        if changes["pattern"].group:
            changes = {"density": None, **changes}
    return dataclasses.replace(base, **changes)


def masks(folder: Path) -> dict[str, torch.Tensor]:
    """Active units by layer, bool in the shape of the grid."""
    opened, found = ModelFolder(folder), {}
    size = opened.config.sparsity.block_size
    for layer in layers_of(opened.topology()):
        rows, columns = (width // size for width in opened.shape(f"{layer}.weight"))
        found[layer] = unpack_bits(opened.topology()[f"active/{layer}"], rows * columns).view(rows, columns)
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    opened = ModelFolder(folder)
    return {name: opened.tensor(name).clone() for name in opened.names}


def as_weights(mask: torch.Tensor, block_size: int) -> torch.Tensor:
    return mask.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)


# Every method with every pattern, and with both distributions. 2:4 prescribes the density of every layer.
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(
    ("pattern", "distribution"),
    [
        ("unstructured", "uniform"),
        ("2:4", "uniform"),
        ("8x8", "uniform"),
        ("unstructured", "alpha"),
        pytest.param("8x8", "alpha", marks=pytest.mark.exhaustive),
    ],
)
def test_zeros_are_exact_and_the_folder_is_a_model(trained, tmp_path, method, pattern, distribution) -> None:
    output = tmp_path / "pruned"
    prune(settings(trained, output, method=method, pattern=pattern, distribution=distribution), ALONE)
    size = parse_pattern(pattern).block_size
    before, after, active = weights(trained / "model"), weights(output), masks(output)
    assert list(active) == [f"layers.{i}.{name}" for i in range(3) for name in sorted(PRUNED)]
    for layer, mask in active.items():
        weight = after[f"{layer}.weight"]
        # By their bits: no negative zeros.
        assert not weight.view(torch.int32)[~as_weights(mask, size)].any()
        if method != "sparsegpt":
            kept = as_weights(mask, size)
            assert torch.equal(weight[kept], before[f"{layer}.weight"][kept])
        if pattern == "2:4":
            assert (mask.reshape(-1, 4).sum(1) == 2).all()
        elif distribution == "uniform":
            assert int(mask.sum()) == mask.numel() // 2
    assert sum(int(mask.sum()) for mask in active.values()) == sum(mask.numel() for mask in active.values()) // 2
    for name in set(before) - {f"{layer}.weight" for layer in active}:
        assert torch.equal(before[name], after[name])
    ModelFolder(output).check_files()
    assert open_trained(output).model(torch.randint(256, (1, 9))).isfinite().all()
    assert not list(tmp_path.glob(".*"))


def test_a_run_that_starts_from_it_keeps_its_masks(trained, tmp_path) -> None:
    output = tmp_path / "pruned"
    prune(settings(trained, output, distribution="alpha", method="magnitude", keep_dense=("layers.1.mlp.*",)), ALONE)
    assert not any(layer.startswith("layers.1.mlp") for layer in masks(output))
    overrides = [f"train.init_from={output}", "train.resume=never", "kernels.tune=never"]
    config = load_config([output / "config.yaml"], overrides)
    assert config.sparsity.algorithm == "static" and config.attention.phases == {}
    model = build_model(config, trained_model.VOCABULARY)
    controller = Controller(config, model.sparse_layers())
    controller.start_topologies()
    assert initial_warnings(config, trained_model.VOCABULARY, controller) == []
    controller.load_state(ModelFolder(output).topology())
    assert not controller.begin_step(config.sparsity.update_interval).changes_topology
    for layer, mask in masks(output).items():
        assert torch.equal(controller.whole_mask(layer), mask)


def test_a_block_may_stay_dense(trained, tmp_path) -> None:
    """Its windows go through it as it is; the others keep what was asked for."""
    prune(settings(trained, tmp_path / "pruned", keep_dense=("layers.0.*", "layers.2.mlp.down")), ALONE)
    active = masks(tmp_path / "pruned")
    assert not [name for name in active if name.startswith("layers.0") or name == "layers.2.mlp.down"]
    assert len(active) == 7 and all(int(mask.sum()) * 2 == mask.numel() for mask in active.values())


def test_the_attention_pattern_stays(trained, tmp_path) -> None:
    """Static masks are the phase `ultra_sparse`, for which sparse attention is the default."""
    found = {}
    for phase in ("dense", "ultra_sparse"):
        config = trained_model.model_config()
        attention = config.attention.model_copy(update={"phases": {phase: "strided"}, "stride": 8})
        config = config.model_copy(update={"attention": attention})
        source = trained_model.write_folder(tmp_path / phase, config, weights(trained / "model"))
        prune(settings(trained, tmp_path / f"{phase}-pruned", model=source), ALONE)
        found[phase] = open_trained(tmp_path / f"{phase}-pruned").pattern
        assert open_trained(source).pattern == found[phase]
    assert found == {"dense": "strided", "ultra_sparse": "full"}


def collected(folder: Path, windows: torch.Tensor) -> tuple[dict, dict]:
    """Weights, and X X^T, by layer."""
    model = our_model(folder)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if name.startswith("layers.") and hasattr(layer, "in_features")
    }
    with torch.no_grad(), collecting(layers, InputGram) as found:
        for window in windows:
            model.hidden_states(window.unsqueeze(0))
    ranks = CommunicationGroup()
    return {name: layer.weight.detach() for name, layer in layers.items()}, {
        n: g.total(ranks) for n, g in found.items()
    }


def test_outputs_of_every_layer_change_least_by_sparsegpt(trained) -> None:
    """Each layer by itself, on the inputs that the trained model gives it."""
    windows = make_plan(settings(trained, trained / "none", samples=64, window=48)).windows
    dense, grams = collected(trained / "model", windows)
    assert len(dense) == 12
    for pattern, density in (("unstructured", 0.5), ("unstructured", 0.25), ("2:4", 0.5), ("8x8", 0.5)):
        rule = parse_pattern(pattern)
        for name, weight in dense.items():
            gram, units = grams[name], rule.units_of(torch.ones(weight.shape, dtype=torch.bool))
            count = int(density * units.numel())
            made, _ = sparsegpt(weight, gram, rule, units, count)
            kept = [
                wanda(weight, gram.diagonal().sqrt().float(), rule, units, count),
                magnitude(weight, rule, units, count),
            ]
            errors = [output_error(weight, weight * rule.weights_of(mask), gram) for mask in kept]
            by_sparsegpt = output_error(weight, made, gram)
            assert by_sparsegpt < min(errors), (name, pattern, density, by_sparsegpt, errors)


def test_blocks_read_what_pruned_blocks_give(trained, tmp_path) -> None:
    """The first block by the dense model's inputs; the second by those that the pruned first block gives."""
    chosen = settings(trained, tmp_path / "pruned")
    windows = make_plan(chosen).windows
    prune(chosen, ALONE)
    after = weights(tmp_path / "pruned")
    mixed = weights(trained / "model")
    for block in range(3):
        trained_model.write_folder(tmp_path / f"until-{block}", trained_model.model_config(), mixed)
        dense, grams = collected(tmp_path / f"until-{block}", windows)
        for name in (name for name in dense if name.startswith(f"layers.{block}.")):
            units = torch.ones(dense[name].shape, dtype=torch.bool)
            made, _ = sparsegpt(dense[name], grams[name], Pattern(), units, units.numel() // 2)
            assert torch.equal(after[f"{name}.weight"], made)
            mixed[f"{name}.weight"] = after[f"{name}.weight"]


@pytest.mark.parametrize(
    "model",
    [
        {},
        {
            "position_embedding": "learned",
            "tie_embeddings": True,
            "activation": "gelu",
            "bias": True,
            "normalization": "layernorm",
        },
    ],
)
def test_a_model_in_blocks_computes_what_the_model_does(tmp_path, model) -> None:
    config = trained_model.model_config(**model)
    made = build_model(config, trained_model.VOCABULARY)
    table = {
        name: p.detach()[:257] if name in ("embedding.tokens.weight", "head.weight") else p.detach()
        for name, p in made.named_parameters()
    }
    folder = trained_model.write_folder(tmp_path / "model", config, table)
    in_blocks, tokens = ModelInBlocks(FolderSource(folder), torch.device("cpu")), torch.randint(257, (1, 40))
    x = in_blocks.embed(tokens)
    for number in range(in_blocks.num_blocks):
        with in_blocks.block(number) as block:
            x = block(x)
            assert sum(not p.is_meta for p in in_blocks.model.layers.parameters()) == len(list(block.parameters()))
    whole = our_model(folder)
    with torch.no_grad():
        torch.testing.assert_close(whole.final_norm(x), whole.hidden_states(tokens), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_pruned_models_are_pruned_further(trained, tmp_path, method) -> None:
    prune(settings(trained, tmp_path / "half", method=method, distribution="alpha"), ALONE)
    further = settings(trained, tmp_path / "quarter", method=method, model=tmp_path / "half", density=0.25)
    prune(further, ALONE)
    half, quarter = masks(tmp_path / "half"), masks(tmp_path / "quarter")
    for layer, mask in quarter.items():
        assert not (mask & ~half[layer]).any() and int(mask.sum()) == mask.numel() // 4
    record = ModelFolder(tmp_path / "quarter").facts["prunings"]
    assert [entry["density"] for entry in record] == [0.5, 0.25]
    with pytest.raises(ConfigError, match="--density: 0.7 is above the density that the model has already, 0.5000"):
        prune(dataclasses.replace(further, density=0.7, output=tmp_path / "more"), ALONE)
    with pytest.raises(ConfigError, match="--density: 0.5 is above what layer .* has left"):
        prune(dataclasses.replace(further, density=0.5, output=tmp_path / "more"), ALONE)
    with pytest.raises(ConfigError, match="--pattern: 8x8 cannot extend the mask of layer"):
        prune(dataclasses.replace(further, pattern=parse_pattern("8x8"), output=tmp_path / "more"), ALONE)
    assert not (tmp_path / "more").exists()


def test_zeros_without_a_topology_stay_where_that_is_asked_for(trained, tmp_path) -> None:
    prune(settings(trained, tmp_path / "half"), ALONE)
    source = FolderSource(tmp_path / "half")
    source.topology = dict
    dense = trained_model.model_config()
    source.config = dense
    write_source(source, tmp_path / "zeros")
    assert not ModelFolder(tmp_path / "zeros").has_topology
    chosen = settings(trained, tmp_path / "quarter", model=tmp_path / "zeros", density=0.25, keep_zeros=True)
    prune(chosen, ALONE)
    half, quarter = masks(tmp_path / "half"), masks(tmp_path / "quarter")
    assert all(not (mask & ~half[layer]).any() for layer, mask in quarter.items())
    with pytest.raises(ConfigError, match="--density: 0.7 is above the density that the model has already, 0.5000"):
        prune(dataclasses.replace(chosen, density=0.7, output=tmp_path / "more"), ALONE)


def test_a_bfloat16_model_stays_one(trained, tmp_path) -> None:
    write_source(FolderSource(trained / "model"), tmp_path / "half-precision", dtype=torch.bfloat16)
    prune(settings(trained, tmp_path / "pruned", model=tmp_path / "half-precision"), ALONE)
    for layer, mask in masks(tmp_path / "pruned").items():
        weight = ModelFolder(tmp_path / "pruned").tensor(f"{layer}.weight")
        assert weight.dtype == torch.bfloat16 and not weight.view(torch.int16)[~mask].any()
        assert int(mask.sum()) == mask.numel() // 2


def test_token_files_and_texts_give_the_same(trained, tmp_path) -> None:
    with IndexedDatasetWriter(tmp_path / "tokens", np.uint16) as writer:
        writer.add_document(list(trained_model.text().encode()))
    by_text = make_plan(settings(trained, tmp_path / "x"))
    by_tokens = make_plan(settings(trained, tmp_path / "x", calibration=str(tmp_path / "tokens")))
    assert torch.equal(by_text.windows, by_tokens.windows) and by_text.windows.shape == (12, 31)
    assert by_text.fingerprint == by_tokens.fingerprint
    assert not torch.equal(by_text.windows, make_plan(settings(trained, tmp_path / "x", seed=1)).windows)


WRONG = [
    ({"density": 1.0}, "--density: 1; must be above 0 and below 1"),
    ({"density": 0.0}, "--density: 0; must be above 0 and below 1"),
    ({"density": math.nan}, "--density: nan; must be above 0 and below 1"),
    ({"density": None}, "--density: missing; must be above 0 and below 1"),
    ({"pattern": "2:4", "density": 0.4}, "--density: 0.4 contradicts --pattern 2:4; must be left out, or 0.5"),
    ({"pattern": "2:5"}, "--pattern: 2:5: 5 does not divide the 64 inputs of layer layers.0.attention.qkv; must be"),
    ({"pattern": "5x5"}, "--pattern: 5x5: block_size: 5 does not divide the widths of layer layers.0.attention.qkv"),
    ({"pattern": "2:4", "distribution": "alpha"}, "--distribution: alpha contradicts --pattern 2:4"),
    ({"calibration": None}, "--calibration: missing; --method sparsegpt needs a text or a token file"),
    ({"calibration": "nowhere.txt"}, "--calibration: nowhere.txt: no such file"),
    ({"samples": 10**6}, r"--calibration: .*text.txt has [\d,]+ tokens, room for \d+ windows of 31; must have at"),
    ({"window": 49}, "--window: 49; must be at most 48, the seq_length of the model"),
    ({"window": 1}, "--window: 1; must be at least 2"),
    ({"samples": 0}, "--samples: 0; must be at least 1"),
    ({"method": "magnitude", "calibration": "x"}, "--calibration: x; must be left out: --method magnitude"),
    ({"method": "wanda", "damping": 0.1}, "--damping: 0.1; must be left out: --method wanda does not use it"),
    ({"damping": 0.0}, "--damping: 0.0; must be above 0 and at most 1"),
    ({"sds_penalty": 0.2}, "--sds-penalty: 0.2; must be left out: it is for --sds"),
    ({"sds": True, "sds_penalty": 0.0}, "--sds-penalty: 0.0; must be above 0 and at most 100"),
    ({"method": "magnitude", "sds": True, "calibration": None}, "--calibration: missing; --sds needs a text"),
    ({"spread": 0.2}, "--spread: 0.2; must be left out: it is for --distribution alpha"),
    ({"spread": 1.0, "distribution": "alpha"}, "--spread: 1.0; must be above 0 and below 1"),
    ({"method": "best"}, "--method: best; must be one of magnitude, wanda, sparsegpt"),
    ({"keep_dense": ("layers.7.*",)}, "--keep-dense: no layer falls to 'layers.7.*'"),
    ({"keep_dense": ("layers.*",)}, "--keep-dense: every layer stays as it is"),
    ({"model": Path("nowhere")}, "--model: nowhere: no model folder there"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(next(iter(w[0].items()))) for w in WRONG])
def test_mistakes_are_refused_and_nothing_is_written(trained, tmp_path, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        prune(settings(trained, tmp_path / "pruned", **changes), ALONE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["4:2", "4:4", "0:4", "2:4:8", "16x8", "1x1", "blocks", ""])
def test_what_is_no_pattern_is_refused(text) -> None:
    with pytest.raises(ConfigError, match="--pattern: .*; must be unstructured, n:m such as 2:4"):
        parse_pattern(text)


def test_masks_that_contradict_the_weights_are_refused(trained, tmp_path) -> None:
    prune(settings(trained, tmp_path / "half", method="magnitude"), ALONE)
    topology = ModelFolder(tmp_path / "half").topology()
    layer, mask = next(iter(masks(tmp_path / "half").items()))
    changed = mask.clone()
    changed.view(-1)[mask.view(-1).nonzero()[:3]] = False
    topology[f"active/{layer}"] = pack_bits(changed)
    config = ModelFolder(tmp_path / "half").config
    trained_model.write_folder(tmp_path / "odd", config, weights(tmp_path / "half"), topology)
    for method in ("magnitude", "sparsegpt"):
        with pytest.raises(CheckpointError, match=f"layer {layer} has 3 weights outside of its mask that are not 0"):
            prune(settings(trained, tmp_path / "out", method=method, model=tmp_path / "odd", density=0.3), ALONE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "odd"]


def test_an_output_that_is_there_is_left_alone(trained, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(ConfigError, match="--output: .*out is there already; must be a folder that is new or empty"):
        prune(settings(trained, tmp_path / "out"), ALONE)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_numbers_that_are_not_finite_are_named(trained, tmp_path) -> None:
    odd = weights(trained / "model")
    odd["layers.1.mlp_norm.weight"][5] = math.inf
    source = trained_model.write_folder(tmp_path / "odd", trained_model.model_config(), odd)
    with pytest.raises(
        CheckpointError, match="layer layers.1.mlp.gate_up: its inputs on the calibration tokens are not"
    ):
        prune(settings(trained, tmp_path / "out", model=source), ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


def test_an_output_that_appears_meanwhile_costs_no_work(trained, tmp_path, monkeypatch) -> None:
    original = Pruner.run

    def disturbed(self):
        original(self)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("keep")

    monkeypatch.setattr(Pruner, "run", disturbed)
    with pytest.raises(ValueError, match="holds something already"):
        prune(settings(trained, tmp_path / "out"), ALONE)
    assert (tmp_path / ".out.pruning" / "state.json").is_file()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_every_method_can_be_asked_for() -> None:
    assert tuple(METHODS) == METHOD_NAMES


class Killed(BaseException):
    """What ends a process in the middle."""


@pytest.mark.parametrize(
    ("kind", "place"),
    [(Pruner, "_prune_layer"), (CalibratedWalk, "run_on"), (Pruner, "_advance_to"), (CalibratedWalk, "embed")],
)
def test_a_killed_pruning_goes_on_and_gives_the_same(trained, tmp_path, monkeypatch, kind, place) -> None:
    prune(settings(trained, tmp_path / "whole", distribution="alpha"), ALONE)
    chosen, calls, original = settings(trained, tmp_path / "out", distribution="alpha"), [], getattr(kind, place)

    def killed_at_times(self, *arguments):
        calls.append(place)
        if len(calls) in (2, 9):
            raise Killed
        result = original(self, *arguments)
        if len(calls) in (1, 5):
            raise Killed
        return result

    monkeypatch.setattr(kind, place, killed_at_times)
    for _ in range(30):
        try:
            prune(chosen, ALONE)
        except Killed:
            assert not chosen.output.exists()
            continue
        break
    assert chosen.output.is_dir() and len(calls) >= 3
    assert trained_files(tmp_path / "out") == trained_files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def trained_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_other_settings_do_not_go_on(trained, tmp_path, monkeypatch) -> None:
    original = Pruner._prune_block

    def killed(self, number, *arguments):
        if number == 1:
            raise Killed
        original(self, number, *arguments)

    monkeypatch.setattr(Pruner, "_prune_block", killed)
    with pytest.raises(Killed):
        prune(settings(trained, tmp_path / "out"), ALONE)
    state = json.loads((tmp_path / ".out.pruning" / "state.json").read_text())
    assert state["blocks_done"] == 1 and {p.name for p in (tmp_path / ".out.pruning").glob("inputs*")} == {
        "inputs-1.bin"
    }
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="holds an unfinished pruning with another density: 0.5, here 0.4; must be"):
        prune(settings(trained, tmp_path / "out", density=0.4), ALONE)
    # The same text in windows of another length.
    windows = pruning_plan.folder_windows

    def longer(*words, **drawn) -> torch.Tensor:
        found = windows(*words, **drawn)
        return found.view(-1, 2 * found.shape[1])

    monkeypatch.setattr(pruning_plan, "folder_windows", longer)
    with pytest.raises(ConfigError, match="holds an unfinished pruning with another windows"):
        prune(settings(trained, tmp_path / "out"), ALONE)
    monkeypatch.undo()
    prune(settings(trained, tmp_path / "out", density=0.4, restart=True), ALONE)
    prune(settings(trained, tmp_path / "again", density=0.4), ALONE)
    assert trained_files(tmp_path / "out") == trained_files(tmp_path / "again")


def prune_on_ranks(trained: Path, output: Path, method: str) -> None:
    torch.set_num_threads(1)
    prune(settings(trained, output, method=method, distribution="alpha"), LaunchEnvironment.from_variables(os.environ))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_two_ranks_give_what_one_gives(trained, tmp_path, method) -> None:
    prune(settings(trained, tmp_path / "one", method=method, distribution="alpha"), ALONE)
    run_distributed(prune_on_ranks, 2, trained, tmp_path / "two", method, with_mesh=False)
    assert trained_files(tmp_path / "one") == trained_files(tmp_path / "two")


def test_the_tool_prunes_and_says_so(trained, tmp_path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "prune.py"), "--device", "cpu", "--model", str(trained / "model")]
    words = ["--pattern", "2:4", "--calibration", str(trained / "text.txt"), "--samples", "8", "--window", "32"]
    done = processes.run([*command, *words, "--output", str(tmp_path / "out")])
    assert done.returncode == 0, done.stderr
    assert "block 3 of 3: 4 layers pruned, relative output error" in done.stdout
    assert "active units: " in done.stdout and "(0.5000)" in done.stdout
    again = processes.run([*command, *words, "--output", str(tmp_path / "out")])
    assert again.returncode == 2 and again.stderr.strip().endswith("must be a folder that is new or empty")


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_sds_around_a_method_lowers_errors_at_equal_counts(trained, tmp_path, method) -> None:
    given = settings(trained, tmp_path / "twice", density=0.3, sds=True)
    given = dataclasses.replace(given, method=method)
    plan = make_plan(given)
    prune(given, ALONE)
    once = dataclasses.replace(given, output=tmp_path / "once", sds=False)
    if method == "magnitude":
        once = dataclasses.replace(once, calibration=None, samples=None, window=None)
    prune(once, ALONE)
    model, samples = ModelInBlocks(plan.source, torch.device("cpu")), range(len(plan.windows))
    errors = {"once": [], "twice": []}
    with model.block(0) as block:
        layers = model.linear_layers(0)
        with collecting(layers, InputGram) as found:
            for sample in samples:
                block(model.embed(plan.windows[sample].unsqueeze(0)))
        for name, layer in layers.items():
            gram = found[name].total(CommunicationGroup())
            for output, values in errors.items():
                pruned = ModelFolder(tmp_path / output).tensor(f"{name}.weight").float()
                values.append(output_error(layer.weight, pruned, gram))
    assert all(twice < once for once, twice in zip(errors["once"], errors["twice"], strict=True)), errors
    counts = [{name: int(mask.sum()) for name, mask in masks(tmp_path / output).items()} for output in errors]
    assert counts[0] == counts[1]
    assert ModelFolder(tmp_path / "twice").facts["prunings"][-1]["sds_penalty"] == 1.0

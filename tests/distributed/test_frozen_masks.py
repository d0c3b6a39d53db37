"""Masks of a model folder, other than the schedule would draw them: the same after every step of a static run, in every
layout; weights and moments 0 outside; the norm that clips is that of the masked gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_runs import Layout, build, check_state, divided, make_batches, run_config, train_step
from harness import run_distributed

from megasparse.checkpoint.model_folder import ModelFolder, ModelFolderWriter
from megasparse.models.build import build_model
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.topology import pack_bits
from megasparse.training.initial_weights import load_initial_weights

MODEL = ["model.hidden_size=64", "model.vocab_size=97", "sparsity.algorithm=static", "sparsity.density=0.5"]
PATTERNS = {"weights": 1, "two of four": 1, "blocks": 16}
STEPS = 9
"""Topology updates would come after steps 3 and 6 (``engine_runs``)."""
TWO_RANKS = {
    "weights": [Layout(data=2, zero=1), Layout(data=2, zero=3)],
    "two of four": [Layout(data=2, zero=2, accumulation=2)],
    "blocks": [Layout(tensor=2, zero=1), Layout(data=2, zero=3)],
}


def settings(pattern: str, *more: str) -> list[str]:
    return [*MODEL, f"sparsity.block_size={PATTERNS[pattern]}", f"train.steps={STEPS}", *more]


def masks_of(controller: Controller, pattern: str) -> dict[str, torch.Tensor]:
    """Bool [num_units] for each layer: half of all weights, but other shares in each layer and row."""
    generator, masks = torch.Generator().manual_seed(4), {}
    for number, (name, topology) in enumerate(controller.topologies.items()):
        scores = torch.rand(topology.num_units, generator=generator)
        if pattern == "two of four":
            groups = scores.view(-1, 4)
            masks[name] = (groups >= groups.topk(2).values[:, 1:]).reshape(-1)
        else:
            # Layers of the two blocks have the same sizes, in the same order.
            share = 0.3 if number < len(controller.topologies) // 2 else 0.7
            masks[name] = scores <= scores.kthvalue(round(share * topology.num_units)).values
    return masks


def write_sparse(folder: Path, pattern: str) -> None:
    config = run_config(settings(pattern))
    model = build_model(config, 97)
    controller = Controller(config, model.sparse_layers())
    masks = masks_of(controller, pattern)
    bits = {f"{kind}/{name}": pack_bits(mask) for kind in ("active", "ever") for name, mask in masks.items()}
    controller.load_state(bits)
    weights = dict(model.named_parameters())
    with ModelFolderWriter(folder, config, {name: torch.float32 for name in weights}) as writer:
        for name in writer.names:
            weight = 2 * weights[name].detach()[: writer.specs[name].shape[0]]
            layer = name.removesuffix(".weight")
            if layer in masks:
                weight = weight * controller.topologies[layer].weights_slice(0, weight.numel()).view_as(weight)
            writer.write(name, weight)
        writer.topology(bits)


def train(mesh, pattern: str, folder: Path, layout: Layout, *more: str) -> dict[str, Any]:
    config = run_config(settings(pattern, f"train.init_from={folder / pattern}", *more), layout)
    own = divided(mesh, layout.tensor)
    engine, controller = build(own, config)
    load_initial_weights(config, engine.rules, engine)
    expected, losses, norms = ModelFolder(folder / pattern).topology(), [], []
    for step, batch in enumerate(make_batches(config)):
        result = train_step(own, engine, controller, step, batch)
        check_state(engine, controller)
        assert not result["changed"], f"step {step} changes the topology"
        found = controller.state()
        assert all(torch.equal(found[name], bits) for name, bits in expected.items()), f"masks after step {step}"
        losses.append(float(result["loss"]))
        norms.append(float(result["norm"]))
    return {"losses": losses, "norms": norms, "multipliers": [engine.rules[0].multipliers("sparse.0").lr]}


def one_rank(mesh, folder: Path) -> dict[str, Any]:
    found = {pattern: train(mesh, pattern, folder, Layout(zero=0)) for pattern in PATTERNS}
    found["200 steps"] = train(mesh, "weights", folder, Layout(zero=1), "train.steps=200", "optimizer.lr=0.001")
    return found


def two_ranks(mesh, folder: Path) -> dict[str, Any]:
    return {
        f"{pattern} {layout}": train(mesh, pattern, folder, layout)
        for pattern, layouts in TWO_RANKS.items()
        for layout in layouts
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    for pattern in PATTERNS:
        write_sparse(folder / pattern, pattern)
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, Any]:
    return run_distributed(one_rank, 1, folder)[0]


def test_masks_stay_for_as_long_as_the_run_does(alone) -> None:
    losses = alone["200 steps"]["losses"]
    assert len(losses) == 200 and losses[-1] < losses[0] - 0.3


def test_every_layout_gives_the_curve_of_one_process(alone, folder) -> None:
    first, second = run_distributed(two_ranks, 2, folder)
    assert first == second
    for name, found in first.items():
        reference = alone[name.rpartition(" ")[0]]
        # As between layouts in test_mst_equivalence.
        assert found["losses"] == pytest.approx(reference["losses"], rel=5e-6), name
        assert found["norms"] == pytest.approx(reference["norms"], rel=5e-5), name
        assert found["multipliers"] == reference["multipliers"], name


def test_the_learning_rate_is_that_of_all_layers_of_a_group_together(alone) -> None:
    """Densities of 0.3 and 0.7 share a group; its density is a half."""
    assert alone["weights"]["multipliers"][0] == pytest.approx(0.5**-0.5, rel=1e-3)


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_the_norm_is_that_of_masked_gradients(alone, folder, pattern) -> None:
    """Against the dense model with the folder's weights, whose gradients are masked by hand."""
    source = ModelFolder(folder / pattern)
    config = run_config([*settings(pattern), "sparsity.algorithm=dense"])
    model = build_model(config, 97)
    masked = Controller(run_config(settings(pattern)), build_model(run_config(settings(pattern)), 97).sparse_layers())
    masked.load_state(source.topology())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter[: source.shape(name)[0]] = source.tensor(name)
    batch = make_batches(config)[0]
    loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    square = unmasked = 0.0
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.double()
        unmasked += float(gradient.square().sum())
        layer = name.removesuffix(".weight")
        if layer in masked.topologies:
            gradient = gradient * masked.topologies[layer].weights_slice(0, gradient.numel()).view_as(gradient)
        square += float(gradient.square().sum())
    assert alone[pattern]["norms"][0] == pytest.approx(square**0.5, rel=1e-5)
    assert unmasked > 1.1 * square

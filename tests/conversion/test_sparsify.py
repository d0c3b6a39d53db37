"""Dense states made sparse and sparse ones dense: the topology a run would choose, exact zeros, moments kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_states import STEP, TinyState, content, dense_config, write_model, write_run
from tool_calls import call

from megasparse.checkpoint.model_folder import ModelFolder
from megasparse.checkpoint.reader import Checkpoint
from megasparse.checkpoint.weights import find_checkpoint
from megasparse.config.loader import load_config
from megasparse.conversion.sparsify import densify, sparsify
from megasparse.models.build import build_model
from megasparse.parallel import CommunicationGroup
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.state import StateFragment
from megasparse.sparsity.topology import unpack_bits
from megasparse.training.initial_checks import initial_warnings


@dataclass
class WholeAccess:
    """State of the model's sparse matrices on one rank."""

    pieces: dict

    shard = tensor_parallel = whole = CommunicationGroup()

    def fragments(self):
        return self.pieces

    def gradients_changed(self, names) -> None:
        pass


def masks(saved, config) -> dict[str, torch.Tensor]:
    """Active weights by layer, bool in the shape of the weight."""
    block_size, found = config.sparsity.block_size, {}
    for key, bits in saved.topology().items():
        kind, _, layer = key.partition("/")
        rows, columns = saved.shapes[f"{layer}.weight"]
        grid = unpack_bits(bits, rows * columns // block_size**2).view(rows // block_size, columns // block_size)
        if kind == "active":
            found[layer] = grid.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
    return found


def settings(block_size: int, floor: bool = False, distribution: str = "erdos_renyi", **more) -> dict:
    return {
        "algorithm": "static",
        "density": 0.3,
        "block_size": block_size,
        "distribution": distribution,
        "row_floor": floor,
        **more,
    }


@pytest.mark.parametrize(("block_size", "floor"), [(1, False), (8, False), (8, True)])
def test_random_is_the_topology_that_a_run_of_the_seed_starts_with(block_size, floor) -> None:
    config = dense_config(**settings(block_size, floor))
    model = build_model(config, 96)
    controller = Controller(config, model.sparse_layers())
    controller.start_topologies()
    made = sparsify(TinyState(dense_config()), config, "random", 0).topology()
    assert set(made) == set(controller.state())
    assert all(torch.equal(bits, made[key]) for key, bits in controller.state().items())


@pytest.mark.parametrize(("block_size", "floor"), [(1, False), (8, False), (8, True)])
def test_magnitude_is_what_a_topology_step_of_a_run_keeps(block_size, floor) -> None:
    """A run that prunes gradually, dense until a step at which its density falls, decides on the same weights."""
    dense = TinyState(dense_config())
    points = [[0.0, 1.0], [0.2, 0.3]]
    config = dense_config(**settings(block_size, floor, drop_fraction=0.0, points=points, update_interval=STEP))
    controller = Controller(config, build_model(config, 96).sparse_layers())
    controller.start_topologies()
    controller.begin_step(STEP)
    pieces = {}
    for layer in controller.layers:
        weight = dense.tensor(f"{layer}.weight", "fp32").clone().view(-1)
        pieces[layer] = StateFragment(0, weight, torch.zeros_like(weight))
    controller.update_topology(WholeAccess(pieces))
    made = sparsify(dense, config, "magnitude", STEP)
    for key, bits in controller.state().items():
        if key.startswith("active/"):
            assert torch.equal(bits, made.topology()[key]), key
    for layer, piece in pieces.items():
        assert torch.equal(piece.master, made.tensor(f"{layer}.weight", "fp32").view(-1))


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_inactive_units_are_exactly_zero_and_active_ones_untouched(method) -> None:
    dense, config = TinyState(dense_config()), dense_config(**settings(8, regrowth_warmup_steps=2))
    dense.tensors["layers.0.mlp.up.weight"]["fp32"].neg_()
    made = sparsify(dense, config, method, STEP)
    active = masks(made, config)
    assert len(active) == 8
    total = sum(mask.numel() for mask in active.values())
    assert sum(int(mask.sum()) for mask in active.values()) / total == pytest.approx(0.3, abs=0.02)
    for layer, mask in active.items():
        name = f"{layer}.weight"
        assert made.kinds(name) == ["fp32", "exp_avg", "exp_avg_sq", "weight_steps"]
        for kind in dense.kinds(name):
            tensor = made.tensor(name, kind)
            assert torch.equal(tensor[mask], dense.tensor(name, kind)[mask])
            # By their bits: no negative zeros.
            assert not tensor.view(torch.int32)[~mask].any()
        assert made.tensor(name, "weight_steps").unique().tolist() == [0, STEP]
    for name in set(dense.shapes) - {f"{layer}.weight" for layer in active}:
        assert made.kinds(name) == dense.kinds(name) and made.tensor(name, "fp32") is dense.tensor(name, "fp32")


def test_dense_again_keeps_zeros_and_moments() -> None:
    config = dense_config(**settings(8, regrowth_warmup_steps=2))
    made = sparsify(TinyState(dense_config()), config, "magnitude", STEP)
    again, dense = densify(made, config)
    assert dense.sparsity.algorithm == "dense" and again.topology() == {} and again.step == STEP
    for name in made.shapes:
        assert again.kinds(name) == ["fp32", "exp_avg", "exp_avg_sq"]
        assert all(torch.equal(again.tensor(name, kind), made.tensor(name, kind)) for kind in again.kinds(name))


@pytest.fixture
def folders(tmp_path) -> Path:
    """A dense run, `run`, and its model, `model`."""
    config = dense_config()
    saved = TinyState(config)
    write_run(tmp_path / "run", saved, config)
    write_model(tmp_path / "model", saved, config)
    return tmp_path


def test_the_tool_makes_a_run_that_keeps_its_state_and_takes_it_back(folders) -> None:
    words = ["--density", "0.25", "--block-size", "8", "--keep-dense", "layers.0.*"]
    status, printed = call("sparsify", "--run", folders / "run", *words, "--output", folders / "sparse")
    assert status == 0 and "layers.1.mlp.up" in printed and "layers.0" not in printed, printed
    config = load_config([folders / "sparse" / "config.yaml"])
    assert (config.sparsity.algorithm, config.sparsity.density, config.run.name) == ("static", 0.25, "sparse")
    before = Checkpoint(find_checkpoint(folders / "run")[0])
    made = Checkpoint(find_checkpoint(folders / "sparse")[0])
    assert made.facts == before.facts and made.step == STEP
    expected = sparsify(before, config, "magnitude", STEP)
    for name in made.shapes:
        for kind in made.kinds(name):
            assert torch.equal(made.tensor(name, kind), expected.tensor(name, kind)), name
    status, printed = call("sparsify", "--densify", "--run", folders / "sparse", "--output", folders / "again")
    assert status == 0, printed
    again = Checkpoint(find_checkpoint(folders / "again")[0])
    assert again.topology() == {} and load_config([folders / "again" / "config.yaml"]).sparsity.algorithm == "dense"
    assert all(torch.equal(again.tensor(name, "fp32"), made.tensor(name, "fp32")) for name in made.shapes)


def test_the_tool_makes_a_model_folder_that_the_loader_takes(folders) -> None:
    words = ["--method", "random", "--density", "0.2", "--block-size", "1", "--distribution", "erdos_renyi"]
    status, printed = call("sparsify", "--model", folders / "model", *words, "--output", folders / "sparse")
    assert status == 0 and f"train.init_from={folders / 'sparse'}" in printed, printed
    model = ModelFolder(folders / "sparse")
    model.check_files()
    controller = Controller(model.config, build_model(model.config, 96).sparse_layers())
    controller.load_state(model.topology())
    assert controller.density() == pytest.approx(0.2, abs=0.01)
    densities = controller.active_densities()
    assert densities["layers.0.attention.output"] > densities["layers.0.mlp.up"]


EARLY = ["sparsity.restoration_start=0.1", "sparsity.update_interval=5"]


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_a_run_may_start_from_it_though_units_are_whole(folders, method) -> None:
    """Of 4 blocks in the smallest layer the nearest to a fifth is one: the density is not quite what was asked for."""
    words = ["--density", "0.2", "--block-size", "16", "--method", method]
    assert call("sparsify", "--model", folders / "model", *words, "--output", folders / "sparse")[0] == 0
    config = load_config([folders / "sparse" / "config.yaml"], [f"train.init_from={folders / 'sparse'}"])
    controller = Controller(config, build_model(config, 96).sparse_layers())
    assert initial_warnings(config, 96, controller) == []
    controller.load_state(ModelFolder(folders / "sparse").topology())
    assert abs(controller.density() - 0.2) > 0.01 * 0.2


BAD = [
    (["--density", "1.5"], "sparsity.density: 1.5 is not allowed"),
    (["--density", "0"], "sparsity.density: 0.0 is not allowed"),
    (["--density", "0.2", "--block-size", "5"], "sparsity.block_size: 5 does not divide the widths of layer layers.0"),
    (["--density", "0.2", "--block-size", "8", "--keep-dense", "layers.9.*"], "no layer falls to 'layers.9.*'"),
    (["--density", "0.2", "--block-size", "8", "--keep-dense", "*"], "every layer stays dense"),
    (["--density", "0.2", "--algorithm", "lottery"], 'sparsity.algorithm: "lottery" is not allowed'),
    (["--density", "0.2", "--block-size", "8", "--algorithm", "dense"], "sparsity.algorithm: dense has no topology"),
    (
        ["--density", "0.2", "--block-size", "8", "sparsity.lr_density_power=auto"],
        "sparsity.lr_density_power: auto would not know",
    ),
    (["--density", "0.2", "--block-size", "8", "train.steps=9"], "train.steps: 24 -> 9: only section sparsity can"),
    (["--density", "0.02", "--block-size", "8", "--row-floor"], "sparsity.row_floor: layer"),
    (["--density", "0.2", "--block-size", "8", "--algorithm=spdf", *EARLY], "is dense at step 6"),
    (["--density", "0.2", "--block-size", "8", "sparsity.low_rank=4"], "the state is of another model than its config"),
    (["--density", "0.2", "--step", "5"], "has no checkpoint of step 5; must be 6"),
    ([], "--density: missing; must be above 0, at most 1"),
    (["--densify", "--density", "0.2"], "--densify: takes no setting of the topology"),
    (["--densify"], "the state is dense already"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "reason"), BAD)
def test_what_cannot_be_is_refused_and_nothing_is_left(folders, words, reason) -> None:
    before = content(folders)
    status, printed = call("sparsify", "--run", folders / "run", *words, "--output", folders / "made")
    assert status == 2 and reason in printed and "Traceback" not in printed, printed
    assert content(folders) == before and not (folders / "made").exists()


def test_an_output_that_is_there_and_a_sparse_input_are_refused(folders) -> None:
    words = ["--density", "0.2", "--block-size", "8"]
    before = content(folders)
    status, printed = call("sparsify", "--run", folders / "run", *words, "--output", folders / "model")
    assert status == 2 and "holds something already" in printed and content(folders) == before
    call("sparsify", "--run", folders / "run", *words, "--output", folders / "sparse")
    status, printed = call("sparsify", "--run", folders / "sparse", *words, "--output", folders / "twice")
    assert status == 2 and "the state is sparse already" in printed and not (folders / "twice").exists()


def test_a_state_of_another_model_is_refused() -> None:
    saved, config = TinyState(dense_config()), dense_config(**settings(8))
    deeper = config.model_copy(update={"model": replace_layers(config.model, 3)})
    with pytest.raises(ValueError, match="the state is of another model than its configuration"):
        sparsify(saved, deeper, "magnitude", 0)


def replace_layers(model, number: int):
    return model.model_copy(update={"num_layers": number})


def test_a_head_whose_rows_are_padded_has_no_place_in_a_model_folder() -> None:
    saved = TinyState(dense_config())
    saved.shapes["embedding.tokens.weight"] = (90, 32)
    with pytest.raises(ValueError, match="sparsity.head: true needs a vocabulary without padding"):
        sparsify(saved, dense_config(**settings(1, head=True)), "random", 0)
    whole = TinyState(dense_config())
    made = sparsify(whole, dense_config(**settings(8, head=True)), "random", 0)
    assert "active/head" in made.topology() and int(made.tensor("embedding.tokens.weight", "fp32").eq(0).sum()) > 1000

"""Layer dropping, 2:4 activations and second-order pruning beside mixed sparsity: the same run in every ZeRO stage and
division, and bit for bit over stops."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from engine_runs import Layout, collected_state, divided, make_batches, run_config
from harness import run_distributed
from trainer_runs import run_trainers, write_documents

from megasparse.methods.callback import Step
from megasparse.parallel import Mesh
from megasparse.training.build_engine import RunStorage, build_engine

SETTINGS = [
    "model.hidden_size=32", "model.num_layers=3", "model.activation=relu2", "sparsity.block_size=8", "train.steps=10",
    "sparsity.algorithm=rigl", "sparsity.density=0.4",
]  # fmt: skip
DROPPING = ["layer_dropping.theta=0.4", "layer_dropping.gamma=1"]
ACTIVATIONS = ["activation_sparsity.pattern=2:4", "activation_sparsity.warmup_steps=2"]
SECOND_ORDER = [
    "sparsity.algorithm=obert", "sparsity.density=0.3", "sparsity.warmup_end=0.8", "sparsity.block_size=1",
    "second_order.gradients=2", "second_order.fisher_block=8",
]  # fmt: skip
"""With topology updates in steps 3, 6 and 9."""
PACKED = "sparsity.storage=packed"
Case = tuple[Layout, list[str]]


def train(mesh: Mesh, layout: Layout, words: list[str]) -> dict:
    """A run by hand: loss and norm of each step, what the methods say, topologies and state at the end."""
    config, own = run_config([*SETTINGS, *words], layout), divided(mesh, layout.tensor)
    storage = RunStorage.of(config, config.model.vocab_size, own.tensor_parallel)
    capacities = None if storage is None else storage.plan.capacities(storage.plan.at(0))
    methods, engine = build_engine(config, config.model.vocab_size, own, capacities=capacities)
    assert (storage is None) == (not engine.packed_layers)
    size, curve, said = config.train.micro_batch_size, [], []
    for index, batch in enumerate(make_batches(config)):
        step, loss_sum = Step(index, line_due=True), torch.zeros((), dtype=torch.float64)
        for method in methods:
            method.begin_step(step)
        for micro in range(engine.accumulation_steps):
            start = (micro * own.data_parallel.size + own.data_parallel.rank) * size
            part = batch[start : start + size]
            loss = engine.forward(part[:, :-1], part[:, 1:])
            engine.backward(loss)
            loss_sum += loss.detach().double() / engine.accumulation_steps
        norm, step.losses = engine.gradient_norm(), {"loss": float(loss_sum)}
        for method in methods:
            method.after_backward(step)
        engine.step(config.optimizer.lr, skip_update=step.skip_update)
        for method in methods:
            method.after_step(step)
        curve += [float(own.data_parallel.sum_(loss_sum) / own.data_parallel.size), norm]
        names = ("kept_branches", "feature_drop_rate", "token_drop_rate")
        said.append([step.metrics.get(name, -1.0) for name in names])
    return {"curve": curve, "said": said, "masks": methods[0].state(), **collected_state(own, engine)}


def train_all(mesh: Mesh, cases: list[Case]) -> list[dict]:
    return [train(mesh, layout, words) for layout, words in cases]


def check_alike(words: list[str], layouts: list[Layout], more: list[Case]) -> dict:
    """Every layout has the same curve, topologies and weights as one rank at stage 0, whose run is returned."""
    alone = run_distributed(train_all, 1, [(Layout(1, 1, 0, 1), words)])[0][0]
    cases = [*((layout, words) for layout in layouts), *more]
    for other, case in zip(run_distributed(train_all, 2, cases)[0], cases, strict=True):
        assert other["curve"] == pytest.approx(alone["curve"], rel=2e-5), case
        for one, another in zip(alone["said"], other["said"], strict=True):
            assert another == pytest.approx(one, rel=1e-4), case
        for name, bits in alone["masks"].items():
            assert torch.equal(bits, other["masks"][name]), (case, name)
        # Packed ones have other shapes, and the curve shows them.
        for kind in () if PACKED in case[1] else ("weights", "exp_avg"):
            for name, tensor in alone[kind].items():
                torch.testing.assert_close(
                    other[kind][name], tensor, rtol=1e-3, atol=2e-5, msg=f"{case}: {kind} {name}"
                )
    return alone


def test_both_methods_are_the_same_in_every_layout() -> None:
    layouts = [Layout(2, 1, 2, 2), Layout(2, 1, 3, 1), Layout(1, 2, 0, 1)]
    alone = check_alike([*DROPPING, *ACTIVATIONS], layouts, [])
    kept, features, tokens = zip(*alone["said"], strict=True)
    assert min(kept) < 0.6 and max(kept) == 1.0
    assert features[:2] == tokens[:2] == (-1.0, -1.0)
    # Half of the random activations is not 0 yet, so that four of them often have more than two.
    assert all(0.01 < rate < 0.5 for rates in (features[2:], tokens[2:]) for rate in rates if rate != -1.0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("words", [DROPPING, ACTIVATIONS])
def test_each_method_is_the_same_in_further_layouts(words: list[str]) -> None:
    shared_tokens = (Layout(1, 2, 1, 1), [*words, "parallel.sequence_parallel=true"])
    recomputed = (Layout(2, 1, 1, 1), [*words, "train.activation_recomputation=true"])
    check_alike(
        words,
        [Layout(2, 1, 1, 1), Layout(2, 1, 1, 2), Layout(2, 1, 3, 2), Layout(1, 2, 0, 2)],
        [shared_tokens, recomputed],
    )


@pytest.mark.exhaustive
def test_packed_storage_changes_nothing() -> None:
    words = [*DROPPING, *ACTIVATIONS]
    check_alike(words, [], [(Layout(2, 1, 1, 1), [*words, PACKED])])


def test_interrupted_runs_go_on_bit_for_bit(tmp_path: Path) -> None:
    data = f"data.train=[{{path: {write_documents(tmp_path / 'corpus', (20, 60), 20_000)}}}]"
    words = [*SETTINGS, *DROPPING, *ACTIVATIONS, data, "train.log_interval=1", "train.valid_interval=4"]
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    cases = [("straight", words, Layout(1, 1, 0, 1), []), ("stopped", words, Layout(1, 1, 0, 1), [1, 6])]
    found = run_distributed(run_trainers, 1, cases, tmp_path)[0]
    assert [line["loss"] for line in found["stopped"]] == [line["loss"] for line in found["straight"]]
    assert repr(found["stopped"][-1]) == repr(found["straight"][-1])
    lines = found["straight"]
    assert any("token_drop_rate" in line for line in lines[2:]) and not any(
        "token_drop_rate" in line for line in lines[:2]
    )
    assert min(line["kept_branches"] for line in lines) < 1.0 and lines[-1]["flops_executed"] < lines[-1]["flops_dense"]


def test_second_order_pruning_is_the_same_in_every_layout() -> None:
    check_alike(SECOND_ORDER, [Layout(2, 1, 1, 2), Layout(2, 1, 3, 1)], [])


@pytest.mark.exhaustive
@pytest.mark.parametrize("block_size", [1, 4])
def test_second_order_pruning_is_the_same_in_further_layouts(block_size: int) -> None:
    words = [*SECOND_ORDER, f"sparsity.block_size={block_size}"]
    check_alike(words, [Layout(2, 1, zero, 1) for zero in (0, 1, 2, 3)], [])


def test_second_order_pruning_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Stopped where gradients have been summed for the next topology update, and where one has just been made."""
    data = f"data.train=[{{path: {write_documents(tmp_path / 'corpus', (20, 60), 20_000)}}}]"
    words = [*SETTINGS, *SECOND_ORDER, data, "train.log_interval=1", "train.valid_interval=4"]
    layout, magnitude = Layout(2, 1, 1, 1), ["sparsity.algorithm=gradual"]
    cases = [("straight", words, layout, []), ("stopped", words, layout, [6, 7])]
    cases.append(("magnitude", [*words, *magnitude], layout, []))
    for name, *_ in cases:
        (tmp_path / name).mkdir()
    found = run_distributed(run_trainers, 2, cases, tmp_path)[0]
    assert found["straight"][-1]["density"] == found["magnitude"][-1]["density"] < 0.32
    assert found["straight"][-1]["loss"] != found["magnitude"][-1]["loss"]
    assert repr(found["stopped"][-1]) == repr(found["straight"][-1])
    assert [line["loss"] for line in found["stopped"]] == [line["loss"] for line in found["straight"]]


ADMIN = ["model.normalization_position=post", "model.residual_weight=admin", "model.init_std=0.2"]


def test_admin_is_the_same_in_every_layout() -> None:
    alone = check_alike(ADMIN, [Layout(2, 1, 1, 2), Layout(2, 1, 3, 1), Layout(1, 2, 0, 1)], [])
    omegas = [weight.mean() for name, weight in alone["weights"].items() if name.endswith("_sum.weight")]
    assert len(omegas) == 6 and omegas[0] == pytest.approx(1.0, abs=0.1) and omegas[-1] > 1.2


def test_admin_goes_on_bit_for_bit(tmp_path: Path) -> None:
    data = f"data.train=[{{path: {write_documents(tmp_path / 'corpus', (20, 60), 20_000)}}}]"
    words = [*SETTINGS, *ADMIN, data, "train.log_interval=1", "train.valid_interval=4"]
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    cases = [("straight", words, Layout(1, 1, 0, 1), []), ("stopped", words, Layout(1, 1, 0, 1), [1, 6])]
    found = run_distributed(run_trainers, 1, cases, tmp_path)[0]
    assert repr(found["stopped"][-1]) == repr(found["straight"][-1])
    assert [line["loss"] for line in found["stopped"]] == [line["loss"] for line in found["straight"]]


TENSOR_TRAIN = ["sparsity.algorithm=dense", "tensor_train.rank=4"]


def test_tensor_trains_are_the_same_in_every_layout() -> None:
    alone = check_alike(TENSOR_TRAIN, [Layout(2, 1, 1, 2), Layout(2, 1, 3, 1), Layout(1, 2, 0, 1)], [])
    assert alone["weights"]["layers.0.mlp.up.core_0"].shape == (16, 8 * 4)
    assert alone["curve"][-2] < alone["curve"][0]


@pytest.mark.exhaustive
def test_tensor_trains_are_the_same_in_further_layouts() -> None:
    words = [*TENSOR_TRAIN, "model.activation=swiglu", "tensor_train.cores=3", "tensor_train.rank=2"]
    shared_tokens = (Layout(1, 2, 1, 1), [*words, "parallel.sequence_parallel=true"])
    recomputed = (Layout(2, 1, 1, 1), [*words, "train.activation_recomputation=true"])
    check_alike(words, [Layout(2, 1, 2, 2), Layout(2, 1, 3, 2), Layout(1, 2, 0, 2)], [shared_tokens, recomputed])


TYING = ["sparsity.algorithm=dense", "layer_tying.mode=dynamic", "layer_tying.interval=1"]
"""Of three layers, ten actions; in their seed are ties and untied layers."""


def test_tied_layers_are_the_same_in_every_layout() -> None:
    """At ZeRO stages 1 and 3 they are compared with shared modules in test_layer_tying."""
    check_alike(TYING, [Layout(2, 1, 2, 2), Layout(1, 2, 0, 1)], [])


@pytest.mark.exhaustive
def test_tied_layers_are_the_same_in_further_layouts() -> None:
    words = [*TYING, "tensor_train.rank=4"]
    shared_tokens = (Layout(1, 2, 1, 1), [*words, "parallel.sequence_parallel=true"])
    recomputed = (Layout(2, 1, 1, 1), [*words, "train.activation_recomputation=true"])
    check_alike(words, [Layout(2, 1, 1, 1), Layout(2, 1, 3, 2), Layout(1, 2, 0, 2)], [shared_tokens, recomputed])


def test_tied_tensor_trains_go_on_bit_for_bit(tmp_path: Path) -> None:
    data = f"data.train=[{{path: {write_documents(tmp_path / 'corpus', (20, 60), 20_000)}}}]"
    words = [*SETTINGS, *TYING, *TENSOR_TRAIN, data, "train.log_interval=1", "layer_tying.epsilon_decay=0.6"]
    layout = Layout(2, 1, 1, 1)
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    cases = [("straight", words, layout, []), ("stopped", words, layout, [1, 6])]
    found = run_distributed(run_trainers, 2, cases, tmp_path)[0]
    assert repr(found["stopped"][-1]) == repr(found["straight"][-1])
    assert [line["loss"] for line in found["stopped"]] == [line["loss"] for line in found["straight"]]
    counts = [line["tied_layers"] for line in found["straight"]]
    assert counts[0] == 0 and len(set(counts)) > 1 and any(late < early for early, late in pairwise(counts))
    assert all("tying_reward" in line for line in found["straight"][1:])

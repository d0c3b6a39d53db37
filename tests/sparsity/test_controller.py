"""The controller on layers and state without any engine: targets, invariants, multipliers, its own state."""

from __future__ import annotations

import math

import pytest
import torch
from fake_layers import BASE, FakeLayer, FakeState
from shards import cuts, on_shards
from topology_digest import digest

from megasparse.config.loader import ConfigError, load_config
from megasparse.sparsity.checks import check_invariant
from megasparse.sparsity.controller import Controller

WIDTHS = {"layers.0.mlp.up": (64, 32), "layers.0.mlp.down": (32, 64), "layers.1.mlp.up": (64, 32)}


def make(*overrides: str, widths=WIDTHS) -> tuple[Controller, dict[str, FakeLayer]]:
    config = load_config([], [*BASE, *overrides])
    layers = {name: FakeLayer(*size, config.sparsity.block_size, i) for i, (name, size) in enumerate(widths.items())}
    controller = Controller(config, layers)
    controller.start_topologies()
    return controller, layers


@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_a_whole_run_meets_every_target_and_ends_full(block_size) -> None:
    controller, layers = make(f"sparsity.block_size={block_size}", "sparsity.drop_fraction=0.5")
    state, densities, flips = FakeState(layers), [], 0
    for step in range(40):
        decision = controller.begin_step(step)
        state.new_gradients(step)
        assert all(layer.collect_dense_gradient == (n in decision.dense_gradient_layers) for n, layer in layers.items())
        if decision.changes_topology:
            assert step % 4 == 0 and step > 0
            before = {name: layer.mask.clone() for name, layer in layers.items()}
            report = controller.update_topology(state)
            grown = sum(int((layers[n].mask & ~mask).sum()) for n, mask in before.items()) * block_size**2
            dropped = sum(int((~layers[n].mask & mask).sum()) for n, mask in before.items()) * block_size**2
            assert (report.grown, report.dropped) == (grown, dropped)
            assert report.density == controller.density()
            flips += grown and dropped
        if step and step % 4 == 0:
            target = controller.schedule.density(step / 40)
            for layer in layers.values():
                units = layer.mask.numel()
                assert int(layer.mask.sum()) == max(1, math.floor(target * units + 0.5))
        state.optimizer_step(controller.topologies)
        check_invariant(list(controller.topologies.values()), state)
        densities.append(controller.density())
    assert densities[0] == densities[-1] == 1.0
    assert min(densities) == pytest.approx(0.1, abs=0.02 if block_size > 1 else 1e-3)
    assert flips, "units never moved at constant density"
    assert all(layer.mask.all() for layer in layers.values())
    assert report.ever_active == 1.0


def test_grown_weights_start_at_zero_and_inactive_gradients_are_zero() -> None:
    controller, layers = make("sparsity.algorithm=rigl")
    state = FakeState(layers)
    for step in range(1, 9):
        decision = controller.begin_step(step)
        state.new_gradients(step)
        if decision.changes_topology:
            before = {n: t.weights_slice(0, t.numel).clone() for n, t in controller.topologies.items()}
            old = {n: s.clone() for n, s in state.state.items()}
            controller.update_topology(state)
            for name, topology in controller.topologies.items():
                active = topology.weights_slice(0, topology.numel)
                master, gradient, first, second = state.state[name]
                stayed = (master != 0) & active
                assert (stayed <= before[name]).all()
                assert torch.equal(master[stayed], old[name][0][stayed])
                assert not first[~stayed].any() and not second[~stayed].any()
                assert not gradient[~active].any()
                assert torch.equal(gradient[active], old[name][1][active])
                assert (active & ~before[name]).any()


def plain_update(controller: Controller, state: FakeState) -> int:
    """One topology update, compared with `regrown` by its definition; how many values it erased."""
    old = {name: tensors.clone() for name, tensors in state.state.items()}
    before = {
        name: topology.weights_slice(0, topology.numel).clone() for name, topology in controller.topologies.items()
    }
    controller.update_topology(state)
    erased = 0
    for name, fragment in state.fragments().items():
        part = slice(fragment.start, fragment.start + fragment.numel)
        stayed = (before[name] & controller.topologies[name].weights_slice(0, before[name].numel()))[part]
        for tensor, was in zip((fragment.master, *fragment.moments.values()), old[name][[0, 2, 3]], strict=True):
            kept = torch.where(stayed, was[part], 0)
            if controller.config.sparsity.regrown == "keep":
                assert torch.equal(tensor, kept)
            erased += int((tensor != kept).sum())
    return erased


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_what_is_dropped_and_grown_again_keeps_its_values_where_asked(block_size, num_shards) -> None:
    """While the density rises most of it is: restoration then erases nothing."""

    def erased(rank: int, ranks, regrown: str) -> int:
        controller, layers = make(
            f"sparsity.block_size={block_size}", f"sparsity.regrown={regrown}",
            "sparsity.points=[[0, 0.3], [0.1, 0.3], [0.9, 1], [1, 1]]", "sparsity.update_interval=2",
        )  # fmt: skip
        pieces = {name: cuts(64 * 32, [1000])[rank] for name in layers}
        state = FakeState(layers, *((pieces, ranks) if num_shards == 2 else ()))
        total = 0
        for step in range(40):
            decision = controller.begin_step(step)
            state.new_gradients(step)
            total += plain_update(controller, state) if decision.changes_topology else 0
            state.optimizer_step(controller.topologies)
        assert controller.density() == 1.0
        return total

    assert sum(on_shards(num_shards, lambda rank, ranks: erased(rank, ranks, "keep"))) == 0
    assert sum(on_shards(num_shards, lambda rank, ranks: erased(rank, ranks, "reset"))) > 0


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("num_shards", [2, 3])
def test_the_topology_does_not_depend_on_the_layout(block_size, num_shards) -> None:
    points = {"layers.0.mlp.up": [700, 701], "layers.0.mlp.down": [0, 1999], "layers.1.mlp.up": [2048, 2048]}
    pieces = {name: cuts(64 * 32, own[: num_shards - 1]) for name, own in points.items()}

    def run(rank, ranks=None) -> tuple[list[str], dict[str, torch.Tensor]]:
        controller, layers = make(f"sparsity.block_size={block_size}")
        torch.manual_seed(3)
        state = FakeState(layers, {name: p[rank] for name, p in pieces.items()} if ranks else None, ranks)
        digests = []
        for step in range(40):
            decision = controller.begin_step(step)
            state.new_gradients(step)
            if decision.changes_topology:
                controller.update_topology(state)
                digests.append(digest(controller.topologies))
            state.optimizer_step(controller.topologies)
        return digests, {name: f.master.clone() for name, f in state.fragments().items()}

    # Threads share torch's generator: moments differ, and nothing here depends on moments.
    alone, weights = run(0)
    results = on_shards(num_shards, run)
    assert all(digests == alone for digests, _ in results) and len(set(alone)) > 5
    for name, whole in weights.items():
        joined = torch.cat([master[name] for _, master in results if name in master])
        assert torch.equal(joined, whole)


def test_learning_rate_multipliers() -> None:
    controller, layers = make("sparsity.lr_density_power=0.5", "sparsity.lr_density_cap=3.0", "sparsity.block_size=1")
    assert [controller.lr_multiplier(name) for name in layers] == [1.0] * 3
    for density, expected in [(0.25, 2.0), (0.5, 2**0.5), (0.1, 3.0), (1.0, 1.0)]:
        name = next(iter(layers))
        controller.expect_active(name, round(density * 2048))
        assert controller.lr_multiplier(name) == pytest.approx(expected, rel=1e-3)
    off, layers = make("sparsity.lr_density_power=0", "sparsity.algorithm=set")
    assert off.density() == pytest.approx(0.1, abs=0.01)
    assert [off.lr_multiplier(name) for name in layers] == [1.0] * 3


def test_density_classes_tell_layers_apart() -> None:
    controller, _ = make()
    assert list(controller.density_classes().values()) == [list(WIDTHS)]
    controller, _ = make("sparsity.groups=[{pattern: 'layers.1.*', density: 0.5}]")
    assert list(controller.density_classes().values()) == [list(WIDTHS)[:2], list(WIDTHS)[2:]]


def test_sparse_starts_are_random_exact_and_zeroed() -> None:
    controller, layers = make("sparsity.algorithm=set", "sparsity.density=0.25")
    for name, layer in layers.items():
        assert int(layer.mask.sum()) == layer.mask.numel() // 4 == controller.num_active[name]
        inactive = ~controller.topologies[name].weights_slice(0, layer.weight.numel())
        assert not layer.weight.detach().reshape(-1)[inactive].any()
        assert layer.weight.detach().reshape(-1)[~inactive].all()
        assert layer.changes > 0
    assert not torch.equal(layers["layers.0.mlp.up"].mask, layers["layers.1.mlp.up"].mask)


@pytest.mark.parametrize(("algorithm", "expected"), [("static", []), ("spdf", [32])])
def test_fixed_topologies_change_only_to_become_dense(algorithm, expected) -> None:
    controller, layers = make(f"sparsity.algorithm={algorithm}", "sparsity.restoration_start=0.8")
    state, changes = FakeState(layers), []
    for step in range(40):
        if controller.begin_step(step).changes_topology:
            controller.update_topology(state)
            changes.append(step)
    assert changes == expected
    assert controller.density() == pytest.approx(1.0 if expected else 0.1, abs=0.01)


def test_state_goes_round() -> None:
    controller, layers = make()
    state = FakeState(layers)
    for step in range(13):
        if controller.begin_step(step).changes_topology:
            state.new_gradients(step)
            controller.update_topology(state)
    saved = controller.state()
    other, others = make()
    other.load_state(saved)
    assert digest(other.topologies) == digest(controller.topologies)
    assert other.num_active == controller.num_active
    assert all(torch.equal(bits, other.state()[name]) for name, bits in saved.items())


def test_a_stored_mask_costs_one_bit_per_unit() -> None:
    controller, _ = make()
    for name, topology in controller.topologies.items():
        bits = controller.state()[f"active/{name}"]
        assert bits.dtype == torch.uint8 and bits.numel() == -(-topology.num_units // 8)


def test_wrong_state_is_refused_with_the_layer_named() -> None:
    controller, _ = make()
    state = controller.state()
    with pytest.raises(ValueError, match=r"active/layers\.0\.mlp\.up"):
        controller.load_state({k: v for k, v in state.items() if k != "active/layers.0.mlp.up"})
    with pytest.raises(ValueError, match=r"active/layers\.9"):
        controller.load_state({**state, "active/layers.9": torch.zeros(1, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=r"layer layers\.1\.mlp\.up: 3 bytes of mask bits do not hold 128 units"):
        controller.load_state({**state, "active/layers.1.mlp.up": torch.zeros(3, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=r"layer layers\.1\.mlp\.up: 3 bytes"):
        controller.load_state({**state, "ever/layers.1.mlp.up": torch.zeros(3, dtype=torch.uint8)})


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["sparsity.update_interval=9", "sparsity.restoration_end=0.95"], ["update_interval: 9", "such as 39"]),
        (["sparsity.restoration_end=1.0"], ["update_interval: 4", "none, unless the restoration ends"]),
        (
            ["optimizer.decay_start=dense", "sparsity.algorithm=gradual"],
            ["optimizer.decay_start: dense", "gradual", "never becomes dense", "must be schedule"],
        ),
        (["sparsity.update_interval=40"], ["update_interval: 40 leaves no topology update", "below 40"]),
        (
            ["sparsity.row_floor=true", "sparsity.density=0.05"],
            ["sparsity.row_floor: layer layers.0.mlp.up has 16 rows", "6 active blocks", "at least 0.125"],
        ),
    ],
)
def test_schedules_that_cannot_be_met_are_refused(overrides, parts) -> None:
    with pytest.raises(ConfigError) as caught:
        make(*overrides)
    for part in parts:
        assert part in str(caught.value)


def test_the_interval_that_is_offered_works() -> None:
    controller, layers = make("sparsity.update_interval=39", "sparsity.restoration_end=0.95")
    assert controller.density() == 1.0


def test_broken_invariants_name_layer_and_tensor() -> None:
    controller, layers = make("sparsity.algorithm=set")
    state = FakeState(layers)
    topologies = list(controller.topologies.values())
    for row, label in ((0, "weight"), (2, "exp_avg"), (3, "exp_avg_sq")):
        for name, topology in controller.topologies.items():
            state.state[name][:, ~topology.weights_slice(0, topology.numel)] = 0
        check_invariant(topologies, state)
        inactive = (~topologies[1].weights_slice(0, topologies[1].numel)).nonzero()[0, 0]
        state.state[topologies[1].name][row, inactive] = 1e-30
        with pytest.raises(
            RuntimeError, match=rf"1 inactive entries of {label} of layer {topologies[1].name} are not 0"
        ):
            check_invariant(topologies, state)

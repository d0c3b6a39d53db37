"""The ledger against counts taken from the model, and against torch's own counter."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from harness import run_distributed
from plain_flops import count_flops

from megasparse.config.loader import load_config, save_config
from megasparse.config.schema import RunConfig
from megasparse.cost.attention_kernels import (
    agree_on_dense_fallback,
    resolve_dense_fallback,
    with_dense_fallback,
)
from megasparse.cost.layer_kernels import LayerKernels
from megasparse.cost.ledger import FlopCounter, Ledger, StepWork
from megasparse.kernels.hybrid_attention import PATTERNS, break_even, executed_entries, pattern_mask
from megasparse.methods.registry import build_methods
from megasparse.models.build import build_model
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup, Mesh
from megasparse.sparsity.controller import Controller, StepDecision
from megasparse.training.plan import make_plan, walk_schedule

SETTINGS = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.seq_length=24",
    "model.vocab_size=64",
    "train.steps=40",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.precision=fp32",
    "sparsity.block_size=8",
    "sparsity.update_interval=3",
    "sparsity.warmup_end=0.3",
    "attention.stride=4",
]


def parts(*overrides: str):
    config = load_config([], [*SETTINGS, *overrides])
    model = build_model(config, 64)
    return config, model, Controller(config, model.sparse_layers())


def work_of(decision: StepDecision, densities: dict[str, float]) -> StepWork:
    return StepWork(densities, decision.patterns, decision.dense_gradient_layers)


def counter_of(config: RunConfig, model: GPT) -> FlopCounter:
    return FlopCounter(config, model, LayerKernels(config, model, "cpu"))


@pytest.mark.parametrize("overrides", [(), ("sparsity.head=true",), ("sparsity.low_rank=4",), ("model.bias=false",)])
def test_a_step_counts_what_the_model_counts(overrides: tuple[str, ...]) -> None:
    config, model, controller = parts(*overrides)
    counter = counter_of(config, model)
    decision = controller.begin_step(20)
    densities = {name: 0.25 + 0.5 * number / len(controller.layers) for number, name in enumerate(controller.layers)}
    counted = counter.step(work_of(decision, densities))
    wanted = partial(count_flops, model, 4, 24, patterns=decision.patterns)
    assert counted.dense == count_flops(model, 4, 24).total
    assert counted.algorithmic == pytest.approx(wanted(densities=densities).total, rel=1e-6)
    executed = wanted(  # of the dense layers: no kernel takes blocks of 8
        attention_entries=partial(executed_entries, "auto"),
    )
    assert counted.executed == pytest.approx(executed.total, rel=1e-6)


def test_a_topology_step_pays_for_its_dense_weight_gradient() -> None:
    config, model, controller = parts("sparsity.block_size=1")
    for name, topology in controller.topologies.items():
        controller.expect_active(name, topology.num_units // 10)
    densities = controller.active_densities()
    counter = counter_of(config, model)
    usual, changing = controller.begin_step(19), controller.begin_step(21)
    assert changing.dense_gradient_layers == set(controller.layers) and not usual.dense_gradient_layers
    extra = counter.step(work_of(changing, densities)).algorithmic - counter.step(work_of(usual, densities)).algorithmic
    dense = count_flops(model, 4, 24).weight_gradient
    sparse = count_flops(model, 4, 24, densities=densities).weight_gradient
    assert extra == pytest.approx(dense - sparse, rel=1e-9)


def test_layers_computed_for_a_share_of_the_tokens_cost_that_share() -> None:
    config, model, controller = parts("sparsity.low_rank=4")
    counter, densities = counter_of(config, model), dict.fromkeys(controller.layers, 0.5)
    whole = counter.step(StepWork(densities))
    names = [name for name, _ in model.named_modules() if name.startswith("layers.1.")]
    half = counter.step(StepWork(densities, computed=dict.fromkeys(names, 0.5)))
    none = counter.step(StepWork(densities, computed=dict.fromkeys(names, 0.0)))
    assert whole.dense == half.dense == none.dense
    for kind in ("algorithmic", "executed"):
        first, middle, last = (getattr(count, kind) for count in (whole, half, none))
        assert first - middle == pytest.approx(middle - last) and first > last > 0
    # Two blocks of equal cost, and the head.
    head = 3 * 2 * 4 * 24 * model.head.in_features * model.head.out_features
    assert whole.algorithmic - none.algorithmic == pytest.approx((whole.algorithmic - head) / 2)


def test_the_kernels_that_run_are_counted() -> None:
    config, model, controller = parts()
    counter, work = counter_of(config, model), StepWork(dict.fromkeys(controller.layers, 0.25))
    dense = counter.step(work, dict.fromkeys(controller.layers, "dense"))
    saving = counter.step(work, dict.fromkeys(controller.layers, "cpu"))
    products = sum(2 * 4 * 24 * layer.in_features * layer.out_features for layer in controller.layers.values())
    assert dense.algorithmic == saving.algorithmic
    assert dense.executed - saving.executed == pytest.approx(3 * 0.75 * products)


def test_recomputation_is_executed_and_not_algorithmic() -> None:
    config, model, controller = parts("train.activation_recomputation=true")
    plain_config, plain_model, _ = parts()
    decision, densities = controller.begin_step(1), controller.active_densities()
    again, once = (
        counter_of(c, m).step(work_of(decision, densities)) for c, m in ((config, model), (plain_config, plain_model))
    )
    assert again.algorithmic == once.algorithmic
    head = 2 * 4 * 24 * model.head.in_features * model.head.out_features
    forward = count_flops(model, 4, 24)
    assert again.executed - once.executed == pytest.approx(forward.forward + forward.attention_forward - head)


@pytest.mark.parametrize("offsets", ["none", "spread", "[3,1]"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_attention_is_counted_as_a_count_of_the_mask_gives_it(pattern: str, offsets: str) -> None:
    config, model, controller = parts(
        f"attention.phases={{ultra_sparse: {pattern}}}", f"attention.stride_offsets={offsets}"
    )
    decision, densities = controller.begin_step(20), controller.active_densities()
    assert decision.patterns == [(pattern,) * 2] * 2
    counted = counter_of(config, model).step(work_of(decision, densities))
    shifts = {"none": (0, 0), "spread": (0, 2), "[3,1]": (3, 1)}[offsets]
    active = sum(int(pattern_mask(pattern, 24, 4, offset=offset).sum()) for offset in shifts)
    without = count_flops(model, 4, 24, patterns=decision.patterns, densities=densities, attention_entries=nothing)
    # Two products forward and four backward, for 4 samples, 2 layers and a head dimension of 16.
    assert counted.algorithmic - without.total == 6 * 2 * 4 * 2 * 16 * active
    entries = sum(executed_entries("auto", pattern, 24, 4, offset=offset) for offset in shifts)
    # No kernel takes blocks of 8.
    dense = partial(count_flops, attention_entries=nothing)
    assert counted.executed == pytest.approx(dense(model, 4, 24).total + 6 * 2 * 4 * 2 * 16 * entries, rel=1e-9)


def nothing(*shape, offset: int) -> int:
    return 0


def test_a_widened_pattern_is_counted_and_told(monkeypatch) -> None:
    """As if dense attention had been measured to be faster than `strided` below 100 tokens."""
    monkeypatch.setattr(break_even, "dense_limit", lambda kernel, pattern, *shape: 100 * (pattern == "strided"))
    words = ["attention.phases={ultra_sparse: strided, restoration: local}"]
    exact, model, controller = parts(*words)
    asked = load_config([], [*SETTINGS, *words, "attention.dense_fallback=true"])
    allowed = resolve_dense_fallback(asked, "cpu")
    decisions = [Controller(config, model.sparse_layers()).begin_step(20) for config in (exact, allowed)]
    assert [decision.patterns[0][0] for decision in decisions] == ["strided", "full"]
    densities = controller.active_densities()
    counts = [counter_of(exact, model).step(work_of(decision, densities)) for decision in decisions]
    full = count_flops(model, 4, 24, densities=densities)
    assert counts[1].algorithmic == pytest.approx(full.total) and counts[0].algorithmic < counts[1].algorithmic
    plans = [make_plan(config, 1, "cpu") for config in (exact, asked, allowed)]
    assert plans[1] == plans[2] and plans[0]["flops"]["algorithmic"] < plans[1]["flops"]["algorithmic"]
    told = [[words for words in plan["warnings"] if "dense_fallback" in words] for plan in plans[:2]]
    assert told == [[], ["attention.dense_fallback: full attention runs in place of strided"]]
    assert "strided (as full)" in plans[1]["kernels"]["hybrid_attention"]
    assert "local (as full)" not in plans[1]["kernels"]["hybrid_attention"]
    assert "as full" not in plans[0]["kernels"]["hybrid_attention"]


def test_what_is_widened_is_settled_once(monkeypatch, tmp_path) -> None:
    """Later measurements change nothing for a run that goes on, or for the model that it has trained."""
    words = ["attention.phases={ultra_sparse: strided, restoration: local}", "attention.dense_fallback=true"]
    asked = load_config([], [*SETTINGS, *words])
    monkeypatch.setattr(break_even, "dense_limit", lambda kernel, pattern, *shape: 25 * (pattern == "strided"))
    settled = resolve_dense_fallback(asked, "cpu")
    assert settled.attention.dense_fallback == ["strided"]
    save_config(settled, tmp_path / "config.yaml")
    assert load_config([tmp_path / "config.yaml"]) == settled
    monkeypatch.setattr(break_even, "dense_limit", lambda kernel, pattern, *shape: 0)
    assert resolve_dense_fallback(asked, "cpu").attention.dense_fallback == []
    assert resolve_dense_fallback(asked, "cpu", tmp_path / "config.yaml") == settled
    (tmp_path / "config.yaml").write_text("{")
    assert resolve_dense_fallback(asked, "cpu", tmp_path / "config.yaml").attention.dense_fallback == []
    monkeypatch.setattr(break_even, "dense_limit", lambda kernel, pattern, *shape: 24)
    assert resolve_dense_fallback(asked, "cpu").attention.dense_fallback == [], "at 24 tokens it is no slower"
    forced = load_config([], [*SETTINGS, "attention.dense_fallback=[sparse]", "kernels.hybrid_attention=tiled"])
    assert resolve_dense_fallback(forced, "cpu") is forced


def test_ranks_agree_on_what_is_widened() -> None:
    """Rank 0's patterns hold, whatever the table of another rank says."""
    lists = run_distributed(agreed_fallback, 2)
    assert lists == [["fixed", "strided"]] * 2


def agreed_fallback(mesh: Mesh) -> list[str]:
    mine = [["strided", "fixed"], ["local"]][mesh.rank]
    config = with_dense_fallback(load_config([], SETTINGS), mine)
    return sorted(agree_on_dense_fallback(config, mesh).attention.dense_fallback)


def test_the_walk_over_the_schedule_equals_counting_every_step() -> None:
    config, model, _ = parts("attention.windows=[{start: 0.31, end: 0.66, pattern: local}]")
    methods = build_methods(config, model, CommunicationGroup())
    walked, mean_density = walk_schedule(config, model, methods, LayerKernels(config, model, "cpu"))
    _, _, fresh = parts("attention.windows=[{start: 0.31, end: 0.66, pattern: local}]")
    counter, total, densities = counter_of(config, model), 0.0, []
    for step in range(config.train.steps):
        decision = fresh.begin_step(step)
        total += counter.step(work_of(decision, fresh.active_densities())).algorithmic
        for name, (count,) in decision.counts.items():
            fresh.expect_active(name, count.target)
        densities.append(fresh.density())
    assert walked.algorithmic == pytest.approx(total, rel=1e-12)
    assert mean_density == pytest.approx(sum(densities) / len(densities), rel=1e-12)


def test_the_plan_says_what_it_is_asked() -> None:
    config = load_config([], [*SETTINGS, "train.global_batch_size=64", "deepspeed.zero_stage=1"])
    one, eight = make_plan(config, 1), make_plan(config, 8)
    assert one["parallel"]["accumulation_steps"] == 32 and eight["parallel"]["accumulation_steps"] == 4
    assert eight["memory"]["optimizer"] * 8 == pytest.approx(one["memory"]["optimizer"], rel=1e-3)
    assert one["flops"] == eight["flops"] and one["flops"]["ratio"] < 1
    phases = one["schedule"]["phases"]
    assert [phase["name"] for phase in phases] == ["warm_up", "ultra_sparse", "restoration", "dense"]
    assert phases[0]["start_step"] == 0 and phases[-1]["end_step"] == 40
    assert all(first["end_step"] == second["start_step"] for first, second in zip(phases, phases[1:], strict=False))
    parameters = build_model(config, 64)
    assert one["parameters"]["total"] == sum(p.numel() for p in parameters.parameters())


def test_the_plan_says_what_tokens_see_of_other_documents() -> None:
    masked = [*SETTINGS, "data.document_masking=true"]
    reset = [*masked, "data.reset_positions=true"]
    cases = [SETTINGS, masked, reset, [*reset, "model.position_embedding=rope"]]
    words = [make_plan(load_config([], overrides), 1)["documents"] for overrides in cases]
    assert words[0].startswith("not masked") and words[1] == "masked: tokens attend within their document"
    assert words[2] == f"{words[1]}; positions begin anew with each" and words[3] == words[1]


def test_the_ledger_survives_a_restart() -> None:
    ledger = Ledger()
    with ledger.seconds.step(), ledger.seconds.part("forward"):
        torch.ones(10).sum()
    ledger.flops.dense = 5.0
    again = Ledger.from_state(ledger.state())
    assert again == ledger and sum(again.by_part().values()) == pytest.approx(again.seconds.total)

"""Which kernels a run uses: choices layer by layer, errors and warnings before it starts, what plan and ledger say."""

from __future__ import annotations

import pytest
import torch

from megasparse.config.loader import ConfigError, load_config
from megasparse.cost.layer_kernels import LayerKernels, describe_changes, layer_kind, prepare_kernels
from megasparse.cost.ledger import FlopCounter, StepWork
from megasparse.kernels.block_sparse import cpu
from megasparse.kernels.common.tables import BreakEvenTable
from megasparse.models.build import build_model
from megasparse.parallel import CommunicationGroup
from megasparse.sparsity.controller import Controller
from megasparse.training.plan import make_plan, plan_run

SETTINGS = [
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.seq_length=32",
    "model.vocab_size=64",
    "train.steps=40",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.precision=fp32",
    "sparsity.block_size=16",
    "sparsity.density=0.2",
    "sparsity.update_interval=3",
    "attention.stride=4",
    "kernels.break_even=0.5",
]
KINDS = ["attention.qkv", "attention.output", "mlp.up", "mlp.down"]


def parts(*overrides: str, ranks: int = 1, device: str = "cpu"):
    config = load_config([], [*SETTINGS, f"parallel.tensor_parallel_size={ranks}", *overrides])
    model = build_model(config, 64, CommunicationGroup(0, ranks))
    return config, model, LayerKernels(config, model, device, planned=True)


@pytest.fixture(autouse=True)
def _no_build(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "build_failure", lambda source: pytest.fail("a plan compiles nothing"))


def test_choices_follow_density_unit_and_what_a_layer_sees(monkeypatch) -> None:
    groups = "sparsity.groups=[{pattern: 'layers.1.mlp.up', block_size: 1}]"
    _, _, kernels = parts(groups, "kernels.break_even=null", "parallel.sequence_parallel=true", ranks=2)
    seen = []

    def measured(backend, device, dtype, block_size, tokens, widths):
        seen.append((backend, device, dtype, block_size, tokens, widths))
        return 0.6

    monkeypatch.setattr("megasparse.kernels.block_sparse.dispatch.measured", measured)
    densities = dict.fromkeys(kernels.shapes, 0.55)
    chosen = {name: kernels.choice(name, density) for name, density in densities.items()}
    assert {name for name, kernel in chosen.items() if kernel == "dense"} == {"layers.1.mlp.up"}
    # A rank's share of the widths, all tokens of a micro-batch.
    wide = {(64, 96), (32, 64), (64, 128), (128, 64)}
    assert set(seen) == {("cpu", "cpu", torch.float32, 16, 64, widths) for widths in wide}
    assert {kernels.choice(name, 0.61) for name in kernels.shapes} == {"dense"}
    assert kernels.choice("layers.0.mlp.up", 1.0) == "dense"


@pytest.mark.parametrize(
    ("overrides", "device", "words"),
    [
        (
            ("kernels.block_sparse=cpu", "sparsity.block_size=1"),
            "cpu",
            "'cpu' cannot run: sparsity.block_size 1.*here it must be auto",
        ),
        (("kernels.block_sparse=cpu", "sparsity.block_size=8"), "cpu", "sparsity.block_size 8"),
        (("kernels.block_sparse=cpu", "train.precision=fp16"), "cpu", "dtype torch.float16"),
        (("kernels.block_sparse=cpu",), "cuda", "on cpu, not on cuda"),
        (
            ("kernels.block_sparse=cpu", "sparsity.groups=[{pattern: '*mlp.up', block_size: 8}]"),
            "cpu",
            "sparsity.block_size 8",
        ),
        (("kernels.block_sparse=triton",), "cpu", "'triton' (is unknown|cannot run).*must be"),
    ],
)
def test_a_forced_kernel_that_cannot_run_stops_the_plan(overrides, device, words) -> None:
    config = load_config([], [*SETTINGS, "deepspeed.zero_stage=1", *overrides])
    with pytest.raises(ConfigError, match=f"kernels.block_sparse: .*{words}"):
        make_plan(config, 1, device)


def test_values_of_the_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="kernels.block_sparse.*'auto', 'dense', 'reference', 'cpu' or 'triton'"):
        load_config([], ["kernels.block_sparse=fast"])
    with pytest.raises(ConfigError, match="kernels.break_even"):
        load_config([], ["kernels.break_even=1.5"])


def test_a_missing_compiler_is_an_error_where_the_kernel_was_asked_for_by_name(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = load_config([], [*SETTINGS, "kernels.block_sparse=cpu"])
    with pytest.raises(ConfigError, match="kernels.block_sparse: 'cpu' cannot run: no C.. compiler.*no-such-compiler"):
        make_plan(config, 1, "cpu")


def test_a_missing_compiler_is_one_warning_otherwise(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    plan = make_plan(load_config([], SETTINGS), 1, "cpu")
    (warning,) = [words for words in plan["warnings"] if "kernels.block_sparse" in words]
    assert "no C++ compiler found: no-such-compiler" in warning and all(kind in warning for kind in KINDS)
    assert {row["kernel"] for row in plan["kernels"]["block_sparse"]} == {"dense"}
    assert plan["flops"]["executed"] > plan["flops"]["algorithmic"]


def test_only_blocks_without_a_kernel_are_warned_about(monkeypatch) -> None:
    def words(*overrides: str) -> list[str]:
        return parts(*overrides)[2].warnings()

    assert (
        not words()
        and not words("sparsity.block_size=1")
        and not words("sparsity.block_size=8", "kernels.block_sparse=dense")
    )
    (warning,) = words("sparsity.block_size=8")
    assert "sparsity.block_size 8" in warning
    (warning,) = words("sparsity.groups=[{pattern: 'layers.0.mlp.up', block_size: 8}]")
    assert "in mlp.up:" in warning
    monkeypatch.setattr(BreakEvenTable, "problem", lambda table: "x.json: no table")
    assert words() == ["x.json: no table"] and not words("kernels.block_sparse=cpu")


def test_the_plan_has_a_row_per_kind_of_layer() -> None:
    config = load_config([], [*SETTINGS, "sparsity.groups=[{pattern: 'layers.1.mlp.up', block_size: 1}]"])
    rows = make_plan(config, 1, "cpu")["kernels"]["block_sparse"]
    assert [(row["layer"], row["count"], row["block_size"], row["kernel"]) for row in rows] == [
        ("attention.qkv", 2, 16, "cpu"),
        ("attention.output", 2, 16, "cpu"),
        ("mlp.up", 1, 16, "cpu"),
        ("mlp.down", 2, 16, "cpu"),
        ("mlp.up", 1, 1, "dense"),
    ]
    first, single = rows[0], rows[-1]
    assert (first["in"], first["out"], first["tokens"], first["break_even"]) == (64, 192, 64, 0.5)
    assert single["break_even"] is None and 0.15 < first["density"] < 0.25


def test_plans_are_made_for_the_device_that_trains(monkeypatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert make_plan(load_config([], SETTINGS), 1)["kernels"]["device"] == "cuda"
    plan = make_plan(load_config([], SETTINGS), 1, "cpu")
    assert plan["kernels"]["device"] == "cpu"


def test_the_shipped_table_decides_where_nothing_is_forced(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(BreakEvenTable, "own", lambda table: tmp_path / "none.json")
    _, _, kernels = parts("kernels.break_even=null")
    limit = kernels.break_even("layers.0.mlp.up")
    assert limit is not None and 0.0 <= limit <= 1.0
    wanted = "cpu" if limit >= 0.01 else "dense"
    assert kernels.choice("layers.0.mlp.up", 0.01) == wanted


def test_the_ledger_counts_what_the_chosen_kernels_execute() -> None:
    config, model, kernels = parts()
    controller = Controller(config, model.sparse_layers())
    counter = FlopCounter(config, model, kernels)
    decision = controller.begin_step(20)
    names = list(kernels.shapes)

    def executed(density: float, step_decision=decision) -> float:
        work = StepWork(dict.fromkeys(names, density), step_decision.patterns, step_decision.dense_gradient_layers)
        return counter.step(work).executed

    products = sum(2 * 8 * 32 * shape.widths[0] * shape.widths[1] for shape in kernels.shapes.values())
    dense = executed(1.0)
    assert executed(0.75) == dense, "above the break-even density dense products run"
    assert dense - executed(0.25) == pytest.approx(3 * 0.75 * products)
    # On a topology update the dense weight gradient is computed in full, the other two products are sparse.
    for name, topology in controller.topologies.items():
        controller.expect_active(name, topology.num_units // 10)
    changing = controller.begin_step(21)
    assert changing.dense_gradient_layers == set(names)
    assert dense - executed(0.25, changing) == pytest.approx(2 * 0.75 * products)


def test_kernels_are_built_before_a_run_and_only_where_it_uses_them(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(cpu, "build_failure", lambda source: asked.append(1) or "cc: exit status 1")
    config = load_config([], SETTINGS)
    plan = make_plan(config, 1, "cpu")
    assert not asked
    assert not prepare_kernels(config, plan) and asked
    again = plan_run(config, 64, 1, "cpu", planned_kernels=False)
    assert [row["kernel"] for row in again["kernels"]["block_sparse"]] == ["dense"] * 4
    assert any("cc: exit status 1" in words for words in again["warnings"])
    with pytest.raises(ConfigError, match="kernels.block_sparse: 'cpu' cannot run: cc: exit status 1"):
        prepare_kernels(load_config([], [*SETTINGS, "kernels.block_sparse=cpu"]), plan)
    asked.clear()
    for never in ("sparsity.block_size=1", "kernels.block_sparse=dense", "kernels.break_even=0"):
        config = load_config([], [*SETTINGS, never])
        assert prepare_kernels(config, make_plan(config, 1, "cpu"))
    assert not asked


def test_changes_are_told_in_one_line_per_pair() -> None:
    before = {"layers.0.mlp.up": "dense", "layers.1.mlp.up": "dense", "layers.0.mlp.down": "dense", "head": "cpu"}
    after = {**dict.fromkeys(before, "cpu"), "head": "dense"}
    assert describe_changes(before, after) == [
        "3 layers dense -> cpu (mlp.up, mlp.down)",
        "1 layer cpu -> dense (head)",
    ]
    assert describe_changes(after, after) == []
    assert layer_kind("head") == "head"

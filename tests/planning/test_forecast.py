"""The forecast: agrees with the plan of the run, grows and shrinks as it must, and refuses what cannot be planned."""

from __future__ import annotations

import math
import time
from functools import cache
from pathlib import Path

import pytest

from megasparse.config.loader import ConfigError, load_config
from megasparse.planning.assumptions import ASSUMPTIONS, Assumptions, parse_assumptions
from megasparse.planning.cluster import make_cluster
from megasparse.planning.forecast import forecast
from megasparse.planning.layout import Layout
from megasparse.planning.step_time import PARTS
from megasparse.training.plan import make_plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = [
    "model.num_layers=4",
    "model.hidden_size=256",
    "model.num_attention_heads=8",
    "model.vocab_size=1000",
    "sparsity.block_size=32",
    "train.steps=4000",
    "train.global_batch_size=64",
    "train.micro_batch_size=4",
]


@cache
def small(*words: str, chip: str = "h100", count: int = 8, assume: tuple[str, ...] = (), **cluster):
    return forecast(load_config([], [*SMALL, *words]), make_cluster(chip, count, **cluster), parse_assumptions(assume))


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("sparsity.block_size=1", "sparsity.distribution=erdos_renyi"),
        ("sparsity.head=true",),
        # Samples know nothing of how far densities lag behind; over a whole run, up and down, this cancels.
        ("stacking.num_layers=1", "stacking.until=0.35", "sparsity.update_interval=10"),
    ],
)
def test_flops_agree_with_the_plan_of_the_run(words) -> None:
    result = small(*words)
    chosen = result["layout"]["words"].split()
    plan = make_plan(load_config([], [*SMALL, *words, *chosen]), 8, "cuda")
    assert result["flops"]["dense"] == pytest.approx(plan["flops"]["dense"], rel=1e-9)
    # Where the schedule is steep, at the break-even of 0.15, kernels change between two densities of the forecast.
    for kind, tolerance in (("algorithmic", 0.01), ("executed", 0.02)):
        assert result["flops"][kind] == pytest.approx(plan["flops"][kind], rel=tolerance), kind
    assert result["memory"]["total"] == plan["memory"]["total"]
    sent = result["sent"]
    assert sent["gradient_reduce"] + sent["weight_gather"] == pytest.approx(plan["communication"]["data_parallel"])
    assert sent["tensor_parallel"] == plan["communication"]["tensor_parallel"]


def test_totals_are_the_sums_of_their_parts() -> None:
    result = small()
    phases = result["phases"]
    assert [phase["name"] for phase in phases] == ["warm_up", "ultra_sparse", "restoration", "dense"]
    assert sum(phase["end_step"] - phase["start_step"] for phase in phases) == 4000
    assert result["time"]["seconds"] == pytest.approx(sum(phase["seconds"] for phase in phases))
    for phase in phases:
        assert set(phase["step_seconds_by_part"]) == set(PARTS)
        assert phase["step_seconds"] == pytest.approx(sum(phase["step_seconds_by_part"].values()))
        steps = phase["end_step"] - phase["start_step"]
        extra = phase["topology_step_extra_seconds"] / 100
        assert phase["seconds"] == pytest.approx(steps * (phase["step_seconds"] + extra))
    energy = result["time"]["seconds"] / 3600 * 8 * 700 * 1.2 / 1e6
    assert result["energy"]["megawatt_hours"] == pytest.approx(energy)


def test_packed_storage_sends_less_the_lower_the_density_is() -> None:
    words = ("kernels.block_sparse=triton", "deepspeed.zero_stage=2", "train.micro_batch_size=8")
    dense, packed = (small(*words, f"sparsity.storage={storage}", count=4) for storage in ("dense", "packed"))
    assert packed["time"]["dense_seconds"] == pytest.approx(dense["time"]["dense_seconds"])
    assert packed["memory"]["total"] == dense["memory"]["total"], "it is dense at both ends"
    plan = make_plan(load_config([], [*SMALL, *words, "sparsity.storage=packed"]), 4, "cuda")
    # Seconds fall less than bytes: so small a model waits for latencies.
    shares = {}
    for before, now in zip(dense["phases"], packed["phases"], strict=True):
        sent = [phase["sent"]["gradient_reduce"] for phase in (before, now)]
        parts = [phase["step_seconds_by_part"] for phase in (before, now)]
        shares[now["name"]] = sent[1] / sent[0], parts[1]["data_parallel"] / parts[0]["data_parallel"]
        assert parts[1]["sparse_products"] == pytest.approx(parts[0]["sparse_products"])
    assert shares["dense"] == (1.0, 1.0)
    assert shares["ultra_sparse"][0] < 0.3 and shares["ultra_sparse"][1] < 0.6 < shares["restoration"][0] < 1.0
    planned = [row for row in plan["bytes"]["phases"] if row["phase"] == "ultra_sparse"][-1]["sent"]
    phase = packed["phases"][1]
    assert phase["sent"]["gradient_reduce"] == pytest.approx(planned["reduced"])
    assert phase["sent"]["weight_gather"] == pytest.approx(planned["gathered"])
    assert phase["sent"]["topology_step"] == pytest.approx(100 * planned["topology"])


def test_micro_batches_of_phases_take_memory_and_save_reductions() -> None:
    words = ("deepspeed.zero_stage=2", "train.micro_batch_size=2")
    alike, larger = small(*words, count=4), small(*words, "train.micro_batch_size_by_phase={ultra_sparse: 16}", count=4)
    assert larger["memory"]["total"] > alike["memory"]["total"]
    ratios = [
        now["sent"]["gradient_reduce"] / before["sent"]["gradient_reduce"]
        for before, now in zip(alike["phases"], larger["phases"], strict=True)
    ]
    assert ratios == [1.0, 0.125, 1.0, 1.0]
    plan = make_plan(load_config([], [*SMALL, *words, "train.micro_batch_size_by_phase={ultra_sparse: 16}"]), 4, "cuda")
    assert plan["memory"]["total"] == larger["memory"]["total"]


def test_automatic_storage_says_what_it_takes() -> None:
    result = small("sparsity.storage=auto", "sparsity.block_size=1")
    assert result["notes"][0].startswith("sparsity.storage auto takes dense: sparsity.block_size: 1, single weights")


def test_a_run_that_grows_is_the_sum_of_its_stages() -> None:
    shallow, deep, grown = small("model.num_layers=1"), small(), small("stacking.num_layers=1", "stacking.until=0.1")
    assert [(phase["num_layers"], phase["start_step"]) for phase in grown["phases"]] == [
        (1, 0), (4, 400), (4, 2800), (4, 3400),
    ]  # fmt: skip
    first, rest = shallow["phases"][0], [phase["seconds"] for phase in deep["phases"][1:]]
    assert first["end_step"] == 400, "the density falls in the first stage"
    assert grown["phases"][0]["seconds"] == pytest.approx(first["seconds"], rel=1e-3)
    assert grown["time"]["seconds"] == pytest.approx(first["seconds"] + sum(rest), rel=1e-3)
    dense = 0.1 * shallow["time"]["dense_seconds"] + 0.9 * deep["time"]["dense_seconds"]
    assert grown["time"]["dense_seconds"] == pytest.approx(dense)


def test_products_cost_what_the_roofline_says() -> None:
    """One dense layer stack, by hand: 3 products of 2 FLOPs a weight and token."""
    result = small("sparsity.algorithm=dense")
    weights = 4 * (256 * 768 + 256 * 256 + 2 * 256 * 1024) + 1024 * 256
    flops = 6 * weights * 64 * 1024
    seconds = result["phases"][0]["step_seconds_by_part"]["dense_products"]
    assert seconds == pytest.approx(flops / 8 / (989.4e12 * 0.65), rel=1e-6)


def test_sparse_products_cost_density_over_efficiency() -> None:
    """Ultra-sparse against dense, both with kernels at every density, where cache and memory are no limit."""
    config, free = load_config([], [*SMALL, "kernels.block_sparse=triton"]), {"cache_over_memory": 1e9}
    for efficiency in (0.5, 0.8):
        assumed = Assumptions({**free, "memory_efficiency": 1e9, "kernel_efficiency": efficiency})
        phases = {p["name"]: p for p in forecast(config, make_cluster("h100", 8), assumed)["phases"]}
        sparse, dense = (phases[name]["step_seconds_by_part"]["sparse_products"] for name in ("ultra_sparse", "dense"))
        assert sparse / dense == pytest.approx(phases["ultra_sparse"]["density"] / efficiency, rel=0.02)


@pytest.mark.parametrize("name", sorted(set(ASSUMPTIONS) - {"pue", "memory_reserve", "overlap_stage_3"}))
def test_every_assumption_about_time_matters_and_low_is_slow(name) -> None:
    # So small a model waits for the host, unless that takes no time.
    free = [f"{host}=0" for host in ("launch_us", "sparse_layer_us") if host != name]
    words = ["parallel.tensor_parallel_size=2", "deepspeed.zero_stage=1", "kernels.block_sparse=triton"]
    words += ["train.compile=blocks"] if name == "compiled_elementwise" else []

    def seconds(case: str) -> float:
        value = getattr(ASSUMPTIONS[name], case)
        return small(*words, count=16, assume=(*free, f"{name}={value}"))["time"]["seconds"]

    assert seconds("low") > seconds("high")


def test_more_ranks_a_faster_network_and_a_better_chip_are_faster() -> None:
    words = ("train.global_batch_size=512", "train.micro_batch_size=8", "model.hidden_size=1024")
    seconds = [small(*words, count=count)["time"]["seconds"] for count in (8, 32)]
    assert seconds == sorted(seconds, reverse=True)
    slow, fast = (small(*words, count=32, network=rate)["time"]["seconds"] for rate in ("10Gb", "400Gb"))
    assert slow > 1.5 * fast
    old, new = (small(*words, chip=chip)["time"]["seconds"] for chip in ("a100-80gb", "b200"))
    assert old > new


def test_layouts_are_ranked_and_fit() -> None:
    result = small()
    rows = result["layouts"]
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    assert all(row["memory"] <= result["memory"]["usable"] for row in rows)
    # A row is the forecast of its own layout.
    best = small(*rows[0]["words"].split())
    assert best["layout"]["is_given"] and best["time"]["seconds"] == pytest.approx(rows[0]["seconds"])


def test_a_layout_that_does_not_fit_is_replaced_and_said_so() -> None:
    words = ["train.activation_recomputation=false", "train.micro_batch_size=64", "train.global_batch_size=4096"]
    config = load_config([CONFIGS / "llama-1b.yaml"], words)
    result = forecast(config, make_cluster("a100-40gb", 64), parse_assumptions([]))
    assert not result["layout"]["is_given"]
    assert any("does not fit" in note for note in result["notes"])
    assert result["memory"]["total"] <= result["memory"]["usable"]


def test_everything_on_a_gpu_is_marked_as_extrapolated() -> None:
    assert any(note.startswith("extrapolated") for note in small()["notes"])
    assert any("kernel_efficiency" in note for note in small()["notes"])
    cases = [(row["assumptions"], row["case"]) for row in small()["cases"]]
    assert cases == [(what, case) for what in ("kernel_efficiency", "all") for case in ("low", "expected", "high")]


def test_seventy_billion_parameters_on_16384_gpus_take_seconds() -> None:
    words = [
        *("model.num_layers=80", "model.hidden_size=8192", "model.num_attention_heads=64"),
        *("model.ffn_hidden_size=28672", "parallel.tensor_parallel_size=8", "parallel.sequence_parallel=true"),
        *("train.steps=200000", "train.global_batch_size=2048", "train.micro_batch_size=1"),
    ]
    started = time.monotonic()
    result = forecast(
        load_config([CONFIGS / "llama-1b.yaml"], words), make_cluster("h100", 16384), parse_assumptions([])
    )
    assert result["model"]["parameters"] > 6.5e10 and result["cluster"]["nodes"] == 2048
    # Some three seconds on an idle core; a busy machine takes longer.
    assert time.monotonic() - started < 300
    assert all(math.isfinite(row["seconds"]) for row in result["layouts"])


class TestBadInput:
    def test_unknown_chip(self) -> None:
        with pytest.raises(ConfigError, match=r"--chip: 'h900' is unknown; must be one of here, v100, .*mi300x"):
            make_cluster("h900", 8)

    def test_count_that_tensor_parallelism_does_not_divide(self) -> None:
        with pytest.raises(ConfigError, match="--count: 12 is no multiple of parallel.tensor_parallel_size 8"):
            small("parallel.tensor_parallel_size=8", count=12, gpus_per_node=12)

    def test_count_that_fills_no_whole_nodes(self) -> None:
        with pytest.raises(ConfigError, match="--count: 12 fills no whole nodes of 8.*such as 8 and 16"):
            make_cluster("h100", 12)

    def test_batch_that_no_layout_divides(self) -> None:
        with pytest.raises(
            ConfigError, match=r"--count: no layout divides train.global_batch_size 63 .*nearby that fit: .*\d"
        ):
            small("train.global_batch_size=63", "train.micro_batch_size=1", count=128)

    def test_model_that_fits_nowhere_names_the_smallest_count_that_does(self) -> None:
        words = ("model.num_layers=32", "model.hidden_size=4096")
        with pytest.raises(
            ConfigError, match=r"fits in none of the \d+ layouts.*smallest count that fits is \d+"
        ) as error:
            small(*words, chip="a100-40gb", count=1)
        count = int(str(error.value).rsplit(" ", 1)[1])
        assert count > 1 and small(*words, chip="a100-40gb", count=count)["layouts"]
        if count > 2:
            with pytest.raises(ConfigError, match="fits in none"):
                small(*words, chip="a100-40gb", count=count // 2)

    def test_model_that_fits_on_no_number(self) -> None:
        with pytest.raises(ConfigError, match="no count fits"):
            small(
                "model.hidden_size=65536",
                "model.num_attention_heads=512",
                "model.num_layers=60",
                "train.global_batch_size=8",
            )

    def test_precision_that_the_chip_lacks(self) -> None:
        with pytest.raises(ConfigError, match="train.precision: bf16 is not supported by NVIDIA V100.*fp16, fp32"):
            small(chip="v100")

    def test_blocks_that_do_not_fit_the_ranks(self) -> None:
        with pytest.raises(ConfigError, match="sparsity.block_size: 256 does not divide"):
            small("sparsity.block_size=256", "parallel.tensor_parallel_size=2")

    @pytest.mark.parametrize("word", ["speed=1", "pue", "dense_efficiency=0", "dense_efficiency=1.5", "overlap=x"])
    def test_assumptions(self, word) -> None:
        with pytest.raises(ConfigError, match="--assume: .*must be"):
            parse_assumptions([word])


def test_layout_words_are_settings() -> None:
    layout = Layout(2, 3, 8, True)
    assert Layout.of(load_config([], layout.words().split())) == layout
    config = load_config([], ["train.precision=bf16"])
    assert Layout.of(layout.applied_to(config)) == layout


def test_the_time_of_rebuilding_is_said_to_be_left_out() -> None:
    note = "extrapolated: sparsity.storage: the time of building the engine anew is left out"
    assert note in small("sparsity.storage=packed")["notes"] and note not in small()["notes"]

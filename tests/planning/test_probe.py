"""This machine's rates: measured in little time, positive, and used by the forecast. How right they are, a benchmark
says (benchmarks/plan_against_run.py); a busy machine would make such a test fail for no reason."""

from __future__ import annotations

import math

import pytest
import torch

from megasparse.config.loader import ConfigError, load_config
from megasparse.planning.assumptions import parse_assumptions
from megasparse.planning.cluster import make_cluster
from megasparse.planning.forecast import forecast
from megasparse.planning.probe import here_chip, measure

WORDS = [
    *("model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4", "model.vocab_size=300"),
    *("model.seq_length=64", "sparsity.block_size=16", "attention.stride=16", "train.precision=fp32"),
    *("train.steps=2000", "train.global_batch_size=8", "train.micro_batch_size=2"),
]


@pytest.fixture(scope="module")
def found():
    return measure(load_config([], WORDS), ranks=2)


def test_all_rates_are_measured(found) -> None:
    rates = found.measured
    assert set(rates.dense_by_widths) == {(64, 192), (64, 64), (64, 256), (256, 64), (64, 320)}
    assert set(rates.attention_by_pattern) == {"full", "sparse"}
    numbers = [*rates.dense_by_widths.values(), *rates.attention_by_pattern.values()]
    numbers += [rates.elementwise, rates.streaming, rates.launch_seconds, found.link_bandwidth, rates.link_latency]
    assert all(math.isfinite(rate) and rate > 0 for rate in numbers)
    for curve in rates.curves.values():
        assert len(curve) >= 2 and all(value > 0 for value in curve.values())


def test_the_forecast_uses_them(found) -> None:
    cluster = make_cluster(here_chip(found), 2)
    config = load_config([], WORDS)

    def result(*assume: str):
        return forecast(config, cluster, parse_assumptions(assume), make_rates=found.rates, measured=found.facts())

    usual = result()
    assert usual["energy"] is None and usual["measured"]["ranks"] == 2
    assert not any("data sheets" in note for note in usual["notes"]) and any(
        "extrapolated" in n for n in usual["notes"]
    )
    dense = {phase["name"]: phase for phase in usual["phases"]}["dense"]
    # A rank has 4 samples of 64 tokens; 2 layers, 3 products of 2 FLOPs each.
    widths = ((64, 192), (64, 64), (64, 256), (256, 64))
    expected = sum(4 * 64 * 2 * 3 * 2 * a * b / found.measured.dense_by_widths[a, b] for a, b in widths)
    assert dense["step_seconds_by_part"]["sparse_products"] == pytest.approx(expected)
    # What the user assumes replaces what was measured.
    assert result("launch_us=100000")["time"]["seconds"] > 10 * usual["time"]["seconds"]


def test_the_number_of_threads_is_restored(found) -> None:
    before = torch.get_num_threads()
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        measure(load_config([], [*WORDS, "train.precision=fp16"]), ranks=1)
    assert torch.get_num_threads() == before


def test_too_many_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="--count: 100000 is out of range with --chip here; must be 1 to"):
        measure(load_config([], WORDS), ranks=100000)

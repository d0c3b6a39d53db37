"""Parts of a topology update: which layers go together, how state is cleared, where masks are true."""

from __future__ import annotations

import pytest
import torch

from megasparse.sparsity import update
from megasparse.sparsity.chunks import CHUNK, chunks, positions
from megasparse.sparsity.evolution import StepCounts
from megasparse.sparsity.topology import Topology


def evolving(number: int, units: int) -> update.EvolvingLayer:
    topology = Topology(str(number), torch.zeros(1, units, dtype=torch.bool), 1)
    return update.EvolvingLayer(topology, (StepCounts(0, 0, 0, 0),), number, "magnitude", 0.0, False)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("num_layers", [0, 1, 7, 16])
def test_portions_hold_every_layer_once_and_not_too_much(monkeypatch, num_layers, num_ranks) -> None:
    monkeypatch.setattr(update, "UNITS_AT_ONCE", 10)
    layers = [evolving(number, 4 + number % 3) for number in range(num_layers)]
    portions = list(update._portions(layers, num_ranks))
    assert sorted(layer.stream for portion in portions for layer in portion) == list(range(num_layers))
    limit = 10 * min(num_ranks, update.MOST_SHARES_AT_ONCE)
    assert all(sum(layer.topology.num_units for layer in portion) <= limit for portion in portions)


def test_a_layer_that_is_too_large_goes_alone(monkeypatch) -> None:
    monkeypatch.setattr(update, "UNITS_AT_ONCE", 10)
    portions = list(update._portions([evolving(0, 3), evolving(1, 50), evolving(2, 3)], 1))
    assert [[layer.stream for layer in portion] for portion in portions] == [[0], [1], [2]]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_rank_has_work_in_every_portion(monkeypatch, num_ranks) -> None:
    """At ZeRO stage 1 rank r holds the r-th run of layers."""
    monkeypatch.setattr(update, "UNITS_AT_ONCE", 10)
    portions = list(update._portions([evolving(number, 5) for number in range(16)], num_ranks))
    assert len(portions) > 1
    for portion in portions:
        assert {layer.stream * num_ranks // 16 for layer in portion} == set(range(num_ranks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32])
def test_clearing_is_exact_for_all_values(dtype) -> None:
    values = torch.tensor([1.0, -2.0, 0.0, 3.0] * (CHUNK // 2)).to(dtype)
    if dtype.is_floating_point:
        values[:6] = torch.tensor([float("inf"), float("nan"), -float("inf"), float("inf"), -0.0, -0.0])
    kept = torch.rand(values.numel(), generator=torch.Generator().manual_seed(0)) < 0.5
    kept[:6] = torch.tensor([False, False, False, True, False, True])
    expected = values.masked_fill(~kept, 0)
    update._clear(values, kept)
    # Bit by bit: not a number equals nothing, and -0.0 equals 0.
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("numel", [0, 1, CHUNK, 2 * CHUNK + 3])
def test_chunks_cover_everything_in_step(numel) -> None:
    numbers, twice = torch.arange(numel), 2 * torch.arange(numel)
    pieces = list(chunks(numbers, twice))
    assert torch.equal(torch.cat([first for first, _ in pieces]), numbers)
    assert all(torch.equal(2 * first, second) for first, second in pieces)
    mask = numbers % 3 == 1
    assert torch.equal(positions(mask), mask.nonzero().squeeze(1)) and positions(mask).dtype == torch.int64

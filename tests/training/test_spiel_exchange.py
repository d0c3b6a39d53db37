"""Which entries SpIEL exchanges, and what new ones begin with."""

from __future__ import annotations

import pytest
import torch

from megasparse.kernels.optimizer import sm3_
from megasparse.layers.delta import DeltaLinear, freeze
from megasparse.methods.spiel import exchange, top
from megasparse.methods.spiel_variants import Candidates, moment_scores, seeded

BETAS = (0.9, 0.999)


def layer_with(count: int) -> DeltaLinear:
    layer = DeltaLinear("layer", 30, 20, unit=1, bias=False)
    torch.nn.init.normal_(layer.weight)
    freeze(layer)
    layer.choose(torch.randperm(600)[:count].sort().values)
    return layer


@pytest.mark.parametrize("count", [0, 8, 40])
def test_the_least_moved_go_and_the_largest_gradients_come(count: int) -> None:
    layer = layer_with(40)
    assert layer.numbers is not None
    kinds = ("value", "exp_avg", "exp_avg_sq", "weight_steps")
    held = {kind: torch.rand(40) + 0.1 for kind in kinds}
    # Half of the candidates are trained already.
    others = [n for n in torch.randperm(600).tolist() if n not in layer.numbers.tolist()][:20]
    places = torch.cat([layer.numbers[torch.randperm(40)[:20]], torch.tensor(others)]).sort().values
    born = seeded(Candidates(places, torch.randn(40), torch.rand(40), torch.ones(())), 5, BETAS)
    numbers, values, come = exchange(layer, held, born, count)
    # By hand, on sets.
    old = dict(zip(layer.numbers.tolist(), range(40), strict=True))
    by_size = sorted(old, key=lambda n: float(held["value"][old[n]]))
    dropped, kept = set(by_size[:count]), set(by_size[count:])
    scores = dict(zip(places.tolist(), born["score"].tolist(), strict=True))
    grown = set(sorted((n for n in scores if n not in kept), key=scores.get, reverse=True)[:count])
    assert numbers.tolist() == sorted(kept | grown) and len(numbers) == 40
    assert come == len(grown - dropped)
    at = dict(zip(places.tolist(), range(40), strict=True))
    for position, number in enumerate(numbers.tolist()):
        for kind in kinds:
            # An entry that was dropped and grown is left alone.
            expected = held[kind][old[number]] if number in old else born[kind][at[number]]
            assert values[kind][position] == expected, kind


def test_seeded_moments_are_those_of_adam_that_saw_the_gradients() -> None:
    """Exact where gradients are the same in all steps, as only their means are kept."""
    gradient = torch.randn(7)
    weight = torch.nn.Parameter(torch.zeros(7))
    adam = torch.optim.Adam([weight], betas=BETAS)
    for _ in range(5):
        weight.grad = gradient.clone()
        adam.step()
    found = seeded(Candidates(torch.arange(7), 10 * gradient, 10 * gradient.square(), torch.tensor(10.0)), 5, BETAS)
    torch.testing.assert_close(found["exp_avg"], adam.state[weight]["exp_avg"])
    torch.testing.assert_close(found["exp_avg_sq"], adam.state[weight]["exp_avg_sq"])
    assert found["weight_steps"].tolist() == [5.0] * 7 and not found["value"].any()


def test_planted_entries_are_found_better_than_at_random() -> None:
    torch.manual_seed(0)
    layer, x = layer_with(30), torch.randn(256, 30)
    target = layer.weight.clone()
    planted = torch.randperm(600)[:30]
    target.view(-1)[planted] += 1.0
    gradient = ((x @ (layer.weight - target).t()).t() @ x).reshape(-1)
    found = top(gradient.abs(), 30)
    assert len(set(found.tolist()) & set(planted.tolist())) > 25


def test_scores_rank_inactive_entries_by_the_product_of_their_accumulators() -> None:
    rows, columns, active = torch.rand(6) * 1e-30, torch.rand(4) * 1e-12, torch.randperm(24)[:7]
    scores = moment_scores(rows, columns, active)
    free = [n for n in range(24) if n not in active.tolist()]
    by_hand = sorted(free, key=lambda n: float(rows[n // 4].double() * columns[n % 4].double()))
    assert sorted(free, key=lambda n: float(scores[n])) == by_hand
    assert (scores[active] < 0).all() and (scores[free] > 0).all()


def tuned_by_moments(layer: DeltaLinear, target: torch.Tensor, drops: tuple[int, ...]) -> torch.Tensor:
    """The matrix after 160 steps of SM3 towards a target, with as many entries exchanged as `drops` says."""
    assert layer.numbers is not None
    rows, columns, values = torch.zeros(20), torch.zeros(30), torch.zeros(layer.numbers.numel())
    for step in range(160):
        layer.merge(values)
        if step % 20 == 5 and drops:
            scores = moment_scores(rows, columns, layer.numbers)
            places = top(scores, len(values))
            born = {"place": places, "score": scores[places], "value": torch.zeros(len(values))}
            count = drops[min(step // 20, len(drops) - 1)]
            numbers, held, _ = exchange(layer, {"value": values}, born, count)
            layer.choose(numbers)
            values = held["value"]
            continue
        x = torch.randn(64, 30)
        gradient = ((x @ (layer.weight - target).t()).t() @ x).view(-1)[layer.numbers] / 64
        sm3_(values, gradient, (rows, columns), (layer.numbers // 30, layer.numbers % 30), 0.1, 1e-8)
    layer.merge(values)
    return layer.weight.clone()


def test_moments_find_planted_rows_and_columns_better_than_entries_that_stay_random() -> None:
    """Where what is to be learned lies in few rows and columns, which is all that accumulators can tell."""
    layer = layer_with(60)
    first, before = layer.numbers, layer.weight.clone()
    block = torch.zeros(20, 30, dtype=torch.bool)
    block[torch.randperm(20)[:6].view(-1, 1), torch.randperm(30)[:8]] = True
    target = before + block
    kept = tuned_by_moments(layer, target, ())
    layer.choose(first)
    assert torch.equal(layer.weight, before)
    found = tuned_by_moments(layer, target, (60, 12, 10, 8, 6, 4, 2, 0))
    errors = [float((weight - target).square().sum()) for weight in (before, kept, found)]
    assert errors[0] == pytest.approx(48) and errors[2] < 0.7 * errors[1], errors

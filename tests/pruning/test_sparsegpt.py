"""SparseGPT against the paper's formulas in float64; exact counts; inputs that are always 0; earlier masks."""

from __future__ import annotations

import plain_sparsegpt
import pytest
import torch

from megasparse.pruning.criteria import magnitude, wanda
from megasparse.pruning.patterns import Pattern, parse_pattern
from megasparse.pruning.sparsegpt import inverse_factor, sparsegpt
from megasparse.pruning.statistics import output_error


def correlated(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Inputs of strongly different sizes that go together, as a model's do. [tokens, width]."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, max(2, width // 3), generator=generator)
    mixed = hidden @ torch.randn(hidden.shape[1], width, generator=generator)
    sizes = torch.rand(width, generator=generator) * 3 + 0.1
    return (mixed + 0.3 * torch.randn(tokens, width, generator=generator)) * sizes


def gram_of(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.double().T @ inputs.double()


def all_available(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    return pattern.units_of(torch.ones(weight.shape, dtype=torch.bool))


def count_of(density: float, units: torch.Tensor) -> int:
    return int(density * units.numel() + 0.5)


CASES = [
    ("unstructured", 0.37, 5, plain_sparsegpt.lowest_of_columns(5, 80)),
    ("unstructured", 0.5, 128, plain_sparsegpt.lowest_of_columns(128, 108)),
    ("2:4", 0.5, 128, plain_sparsegpt.lowest_of_groups(2, 4)),
    ("2:4", 0.5, 4, plain_sparsegpt.lowest_of_groups(2, 4)),
    ("3:12", 0.25, 5, plain_sparsegpt.lowest_of_groups(3, 12)),
    ("3x3", 0.4, 6, plain_sparsegpt.lowest_blocks(3, 6, 10)),
    ("3x3", 0.6, 128, plain_sparsegpt.lowest_blocks(3, 128, 14)),
]


@pytest.mark.parametrize("with_silent", [False, True])
@pytest.mark.parametrize(("pattern", "density", "columns", "choose"), CASES, ids=lambda value: str(value)[:14])
def test_it_is_what_the_paper_says(pattern, density, columns, choose, with_silent) -> None:
    rule = parse_pattern(pattern)
    torch.manual_seed(len(pattern) + columns)
    weight, inputs = torch.randn(9, 24), correlated(101, 24, columns)
    if with_silent:
        inputs[:, [3, 17]] = 0.0
    units = all_available(weight, rule)
    made, kept = sparsegpt(weight, gram_of(inputs), rule, units, count_of(density, units), columns=columns)
    expected, mask = plain_sparsegpt.prune(weight, inputs, choose)
    assert torch.equal(rule.weights_of(kept), mask)
    # The factor is rounded to float32, and 24 columns add up what that changes.
    torch.testing.assert_close(made.double(), expected, rtol=2e-4, atol=2e-5)
    assert not made.view(torch.int32)[~mask].any()


def test_counts_are_exact_at_odd_sizes() -> None:
    for rows, width, density in ((7, 333, 0.31), (1, 129, 0.5), (5, 128, 0.013), (3, 40, 0.999)):
        weight, inputs = torch.randn(rows, width), correlated(97, width)
        units = all_available(weight, Pattern())
        count = count_of(density, units)
        made, kept = sparsegpt(weight, gram_of(inputs), Pattern(), units, count)
        assert int(kept.sum()) == count == int(made.count_nonzero())
    weight, inputs = torch.randn(6, 160), correlated(97, 160)
    for text in ("2:4", "16:32", "1:5", "60:160"):
        rule = parse_pattern(text)
        made, kept = sparsegpt(weight, gram_of(inputs), rule, all_available(weight, rule), 0)
        assert torch.equal(kept, made != 0)
        assert (kept.view(-1, rule.group).sum(1) == rule.kept).all()


def test_inputs_that_are_always_zero_go_first_and_change_nothing() -> None:
    weight, inputs = torch.randn(8, 30), correlated(64, 30)
    inputs[:, [0, 11, 29]] = 0.0
    units = all_available(weight, Pattern())
    made, kept = sparsegpt(weight, gram_of(inputs), Pattern(), units, 8 * 27, columns=30)
    assert not kept[:, [0, 11, 29]].any() and kept.sum() == 8 * 27
    others = [j for j in range(30) if j not in (0, 11, 29)]
    assert torch.equal(made[:, others], weight[:, others])
    # Where there is room they stay as they are.
    made, kept = sparsegpt(weight, gram_of(inputs), Pattern(), units, 8 * 28, columns=30)
    assert torch.equal(made[kept], weight[kept])
    # No token at all.
    made, kept = sparsegpt(weight, torch.zeros(30, 30, dtype=torch.float64), Pattern(), units, 120)
    assert int(kept.sum()) == 120 and torch.equal(made[kept], weight[kept])


@pytest.mark.parametrize("damping", [1e-6, 0.01, 1.0])
def test_the_factor_is_that_of_the_damped_inverse(damping) -> None:
    gram = gram_of(correlated(20, 33))  # singular: fewer tokens than inputs
    factor, silent = inverse_factor(gram, damping)
    damped = gram + damping * gram.diagonal().mean() * torch.eye(33)
    product = factor.double().T @ factor.double() @ damped
    # float32 of the factor, times the condition of the damped matrix.
    tolerance = 1e-6 * float(torch.linalg.cond(damped))
    torch.testing.assert_close(product, torch.eye(33, dtype=torch.float64), rtol=0, atol=tolerance)
    assert torch.equal(factor, factor.triu()) and not silent.any()


def test_scale_of_the_inputs_plays_no_part() -> None:
    weight, inputs = torch.randn(6, 40), correlated(90, 40)
    units = all_available(weight, Pattern())
    made, kept = sparsegpt(weight, gram_of(inputs), Pattern(), units, 100)
    for scale in (1e-12, 1e12):
        again, again_kept = sparsegpt(weight, scale * gram_of(inputs), Pattern(), units, 100)
        assert torch.equal(kept, again_kept)
        torch.testing.assert_close(again, made, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x4"])
@pytest.mark.parametrize("seed", range(4))
def test_outputs_change_less_than_with_wanda_and_magnitude(pattern, seed) -> None:
    rule = parse_pattern(pattern)
    torch.manual_seed(seed)
    weight, inputs = torch.randn(48, 64), correlated(500, 64, seed)
    gram, units = gram_of(inputs), all_available(weight, rule)
    for density in (0.5,) if rule.group else (0.7, 0.5, 0.3):
        count = count_of(density, units)
        by_size = rule.weights_of(magnitude(weight, rule, units, count)) * weight
        by_inputs = rule.weights_of(wanda(weight, gram.diagonal().sqrt().float(), rule, units, count)) * weight
        made, _ = sparsegpt(weight, gram, rule, units, count)
        errors = [output_error(weight, pruned, gram) for pruned in (made, by_inputs, by_size)]
        assert errors[0] < errors[1] < errors[2], (density, errors)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("unstructured", "unstructured"),
        ("unstructured", "2:4"),
        ("2:4", "unstructured"),
        ("4x4", "4x4"),
        ("4x4", "2x2"),
        ("4x4", "1:4"),
    ],
)
def test_an_earlier_mask_is_only_extended(method, first, then) -> None:
    weight, inputs = torch.randn(16, 32), correlated(200, 32)
    gram, norms = gram_of(inputs), gram_of(inputs).diagonal().sqrt().float()

    def pruned(weight, rule, units, count):
        if method == "sparsegpt":
            return sparsegpt(weight, gram, rule, units, count)
        choose = {"magnitude": lambda *a: magnitude(weight, *a), "wanda": lambda *a: wanda(weight, norms, *a)}[method]
        kept = choose(rule, units, count)
        return weight * rule.weights_of(kept), kept

    before, after = parse_pattern(first), parse_pattern(then)
    units = all_available(weight, before)
    made, kept = pruned(weight, before, units, count_of(0.5, units))
    active = before.weights_of(kept)
    units = after.units_of(active)
    count = count_of(0.2, units)
    again, kept = pruned(made, after, units, count)
    assert not (after.weights_of(kept) & ~active).any() and not again[~after.weights_of(kept)].any()
    if not after.group:
        assert int(kept.sum()) == count
    else:
        most = active.view(-1, after.group).sum(1).clamp(max=after.kept)
        assert torch.equal(kept.view(-1, after.group).sum(1), most)

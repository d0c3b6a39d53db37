"""Means, spreads and intervals against plain computations and the printed tables."""

from __future__ import annotations

import math
import random

import pytest

from megasparse.studies.statistics import paired, spread, student_quantile

# Two-sided 95 % points of Student's t as printed tables have them.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_tables(freedom) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(TABLE[freedom], abs=5e-4)
    assert student_quantile(0.5, freedom) == pytest.approx(0.0, abs=1e-9)


def test_other_probabilities() -> None:
    assert student_quantile(0.95, 4) == pytest.approx(2.1318, abs=5e-5)
    assert student_quantile(0.995, 7) == pytest.approx(3.4995, abs=5e-5)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_paired_differences_are_a_plain_computation(n) -> None:
    draw = random.Random(n)
    ours, theirs = ([draw.gauss(3.0, 0.1) for _ in range(n)] for _ in range(2))
    found = paired(ours, theirs)
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = sum(differences) / n
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1))
    assert found.n == n and found.below == sum(d < 0 for d in differences)
    assert found.mean == pytest.approx(mean, abs=1e-12)
    assert found.half_width == pytest.approx(TABLE[n - 1] * deviation / math.sqrt(n), rel=5e-4)
    assert spread(differences) == pytest.approx(deviation, rel=1e-12)


def test_what_seeds_do_to_both_arms_cancels() -> None:
    base = [3.0, 3.5, 4.0]
    found = paired([value - 0.02 for value in base], base)
    assert found.mean == pytest.approx(-0.02) and found.half_width == pytest.approx(0.0, abs=1e-12)


def test_one_seed_has_no_interval() -> None:
    assert paired([3.0], [3.1]).half_width is None and spread([3.0]) is None

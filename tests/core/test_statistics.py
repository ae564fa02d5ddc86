"""Intervals against printed tables, textbook examples and simulation."""

import math
import random

import pytest

from circuitmill.core.statistics import (
    Estimate,
    mean_estimate,
    paired_difference,
    t_quantile,
    t_two_sided,
    welch_difference,
)


@pytest.mark.parametrize(
    ("freedom", "confidence", "expected"),
    # Abramowitz and Stegun, table 26.10
    [
        (1, 0.95, 12.706),
        (2, 0.95, 4.303),
        (2, 0.99, 9.925),
        (3, 0.9, 2.353),
        (5, 0.95, 2.571),
        (10, 0.99, 3.169),
        (30, 0.95, 2.042),
        (120, 0.95, 1.980),
        (1_000_000, 0.95, 1.960),
    ],
)
def test_quantiles_are_those_of_the_tables(freedom: int, confidence: float, expected: float) -> None:
    assert t_quantile(freedom, confidence) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("freedom", [0.7, 1, 2, 2.5, 7, 400])
@pytest.mark.parametrize("t", [0.01, 0.6, 1.7, 4.0, 30.0])
def test_tails_are_those_of_the_density(freedom: float, t: float) -> None:
    """The density integrated from 0 to t by Simpson's rule."""
    front = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    steps = 4000
    heights = [(1 + (t * i / steps) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps + 1)]
    weights = [1 if i in (0, steps) else 4 if i % 2 else 2 for i in range(steps + 1)]
    inside = 2 * front * sum(w * h for w, h in zip(weights, heights, strict=True)) * t / steps / 3
    assert t_two_sided(t, freedom) == pytest.approx(1 - inside, abs=1e-9)


def test_paired_example() -> None:
    """Student's own data (1908): hours of sleep gained by ten patients under two drugs, mean difference 1.58."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = paired_difference(second, first)
    assert (found.mean, found.low, found.high) == pytest.approx((1.58, 0.70011, 2.45989), abs=1e-5)
    assert found.n == 10
    # without the pairs the same data leave the difference open
    apart = welch_difference(second, first)
    assert (apart.mean, apart.low, apart.high) == pytest.approx((1.58, -0.20548, 3.36548), abs=1e-5)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = random.Random(0)
    hits = 0
    for _ in range(1000):
        left = [rng.gauss(1.0, 1.0) for _ in range(3)]
        right = [rng.gauss(0.0, 3.0) for _ in range(8)]
        found = welch_difference(left, right)
        hits += found.low < 1.0 < found.high
    assert 920 <= hits <= 980


def test_one_measurement_has_no_interval_and_equal_ones_an_empty_one() -> None:
    assert mean_estimate([2]) == Estimate(2.0, None, None, 1)
    assert welch_difference([2, 3], [1]) == Estimate(1.5, None, None, 1)
    assert welch_difference([2, 2], [1, 1]) == Estimate(1.0, 1.0, 1.0, 2)
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1], [1, 2])

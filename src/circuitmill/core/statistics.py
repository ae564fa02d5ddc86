"""Means and differences of a few repeated measurements, with Student's t confidence intervals.

Three seeds are three numbers, so the normal quantile would give intervals less than half as wide as they are. Plain
Python: no library with this distribution is among the dependencies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Real = int | float
CONFIDENCE = 0.95
_TINY = 1e-300
_FRACTIONS = 500
"""Most terms of a continued fraction; thousands of degrees of freedom need fewer than a hundred."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval, which one measurement alone does not have."""

    mean: float
    low: float | None
    high: float | None
    n: int
    """Measurements, or pairs of them, behind the mean; of the smaller group if there are two."""


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), the regularised incomplete beta function, for x below (a + 1) / (a + b + 2).

    The continued fraction of DLMF 8.17.22, summed by the method of Lentz.
    """
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    c, d = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, _FRACTIONS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 / (1.0 + term * d or _TINY)
            c = 1.0 + term / c or _TINY
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction / a


def t_two_sided(t: Real, freedom: Real) -> float:
    """Probability that Student's t with some degrees of freedom is further from zero than t.

    >>> round(t_two_sided(2.0, 10), 6), t_two_sided(0.0, 3)
    (0.073388, 1.0)
    """
    if t == 0:
        return 1.0
    # P(|T| > t) = I_x(freedom / 2, 1/2) with x = freedom / (freedom + t^2), DLMF 8.17 and its symmetry
    x, rest = freedom / (freedom + t * t), t * t / (freedom + t * t)
    if x < (freedom / 2 + 1) / (freedom / 2 + 2.5):
        return _incomplete_beta(freedom / 2, 0.5, x)
    return 1.0 - _incomplete_beta(0.5, freedom / 2, rest)


def t_quantile(freedom: Real, confidence: float = CONFIDENCE) -> float:
    """How far from zero Student's t is at most, with this probability.

    Args:
        freedom: Degrees of freedom, above 0; need not be whole.
        confidence: Probability between -t and t, 0 to 1.

    >>> [round(t_quantile(freedom), 4) for freedom in (1, 2, 2.5, 30)]
    [12.7062, 4.3027, 3.5747, 2.0423]
    """
    low, high = 0.0, 1.0
    while t_two_sided(high, freedom) > 1 - confidence:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, freedom) > 1 - confidence else (low, middle)
    return (low + high) / 2


def _variance(values: Sequence[Real]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def mean_estimate(values: Sequence[Real], confidence: float = CONFIDENCE) -> Estimate:
    """Mean of independent measurements: mean +- t s / sqrt(n) with n - 1 degrees of freedom.

    >>> mean_estimate([1.0]), mean_estimate([2.0, 2.0])
    (Estimate(mean=1.0, low=None, high=None, n=1), Estimate(mean=2.0, low=2.0, high=2.0, n=2))
    """
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Estimate(mean, None, None, n)
    half = t_quantile(n - 1, confidence) * math.sqrt(_variance(values) / n)
    return Estimate(mean, mean - half, mean + half, n)


def paired_difference(values: Sequence[Real], baseline: Sequence[Real], confidence: float = CONFIDENCE) -> Estimate:
    """Mean of values - baseline, measured in pairs: what both of a pair share (a seed) cancels."""
    differences = [value - base for value, base in zip(values, baseline, strict=True)]
    return mean_estimate(differences, confidence)


def welch_difference(values: Sequence[Real], baseline: Sequence[Real], confidence: float = CONFIDENCE) -> Estimate:
    """Difference of the means of two independent groups of unequal variance.

    Degrees of freedom after Welch (1947) and Satterthwaite (1946).
    """
    mean = math.fsum(values) / len(values) - math.fsum(baseline) / len(baseline)
    n = min(len(values), len(baseline))
    if n < 2:
        return Estimate(mean, None, None, n)
    parts = [_variance(group) / len(group) for group in (values, baseline)]
    total = math.fsum(parts)
    if total == 0:
        return Estimate(mean, mean, mean, n)
    squares = [part**2 / (len(group) - 1) for part, group in zip(parts, (values, baseline), strict=True)]
    half = t_quantile(total**2 / math.fsum(squares), confidence) * math.sqrt(total)
    return Estimate(mean, mean - half, mean + half, n)

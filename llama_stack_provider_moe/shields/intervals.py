"""Intervals of rates and of AUC from counts alone. Pure functions, without torch or scipy.

Every interval is a 95% interval unless `confidence` says otherwise.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

_HALVINGS = 60  # of an interval of length 1: the error is below 1e-18


class Interval(NamedTuple):
    """Both ends of an interval."""

    low: float
    high: float


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """The exact binomial interval of a rate (Clopper and Pearson 1934, Biometrika 26:404).

    Its low end is the rate p with P(X >= successes | p) = (1 - confidence) / 2, its high end that with
    P(X <= successes | p) = (1 - confidence) / 2. Examples: 0 of 113 -> 0 to 0.0321; 8 of 10 -> 0.444 to 0.975.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} of {n} is not a rate")
    tail = (1 - confidence) / 2
    low, high = 0.0, 1.0
    if successes > 0:
        low = _root(lambda p: at_least(successes, n, p) - tail)
    if successes < n:
        high = _root(lambda p: tail - at_most(successes, n, p))
    return Interval(low, high)


def at_most(count: int, n: int, p: float) -> float:
    """P(X <= count) of a binomial X with n trials of probability p."""
    return math.fsum(_mass(k, n, p) for k in range(count + 1))


def at_least(count: int, n: int, p: float) -> float:
    """P(X >= count) of a binomial X with n trials of probability p."""
    if count <= n // 2:
        return 1.0 - at_most(count - 1, n, p)
    return math.fsum(_mass(k, n, p) for k in range(count, n + 1))


def auc_interval(auc: float, positives: int, negatives: int, z: float = 1.959963984540054) -> Interval:
    """The interval of an AUC that has a width at 1 (Newcombe 2006, Statistics in Medicine 25:559, method 5).

    Its ends are the values a with |auc - a| = z * sqrt(V(a)), where V is Hanley and McNeil's variance of 1982 with the
    mean of the two counts for each: V(a) = a (1 - a) (1 + (N - 1) ((1 - a) / (2 - a) + a / (1 + a))) / (m n), with
    N = (m + n) / 2.

    Raises:
        ValueError: a set is empty, or `auc` is no share.
    """
    if not 0 <= auc <= 1 or positives < 1 or negatives < 1:
        raise ValueError(f"AUC {auc} of {positives} and {negatives} rows")
    mean = (positives + negatives) / 2

    def spread(a: float) -> float:
        pairs = (1 - a) / (2 - a) + a / (1 + a)
        return z * math.sqrt(max(0.0, a * (1 - a)) * (1 + (mean - 1) * pairs) / (positives * negatives))

    low = 0.0 if auc == 0 else _root(lambda a: a + spread(a) - auc, 0.0, auc)
    high = 1.0 if auc == 1 else _root(lambda a: a - spread(a) - auc, auc, 1.0)
    return Interval(low, high)


def _mass(k: int, n: int, p: float) -> float:
    if p <= 0 or p >= 1:
        return float(k == (0 if p <= 0 else n))
    choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(choose + k * math.log(p) + (n - k) * math.log1p(-p))


def _root(rising: Callable[[float], float], low: float = 0.0, high: float = 1.0) -> float:
    """Where a function that is negative at `low` and not at `high` becomes 0, by halving."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2

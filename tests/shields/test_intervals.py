"""Intervals from counts: by their definitions, and by figures of their papers."""

import math

import pytest

from llama_stack_provider_moe.shields.intervals import at_least, at_most, auc_interval, clopper_pearson


def binomial(count: int, n: int, p: float) -> float:
    """P(X <= count), summed with exact binomial coefficients."""
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(count + 1))


@pytest.mark.parametrize(("count", "n"), [(0, 113), (1, 320), (3, 320), (8, 10), (112, 113), (50, 100)])
def test_each_end_leaves_its_tail(count: int, n: int) -> None:
    low, high = clopper_pearson(count, n)
    assert binomial(count, n, high) == pytest.approx(0.025, rel=1e-6)
    if count:
        assert 1 - binomial(count - 1, n, low) == pytest.approx(0.025, rel=1e-6)
    assert low <= count / n <= high


def test_ends_that_are_known_in_closed_form() -> None:
    none, every = clopper_pearson(0, 113), clopper_pearson(113, 113)
    assert (none.low, every.high) == (0.0, 1.0)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 113))
    assert every.low == pytest.approx(0.025 ** (1 / 113))
    low, high = clopper_pearson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4439, 0.9748)
    assert clopper_pearson(0, 100, confidence=0.9)[1] == pytest.approx(1 - 0.05**0.01)


def test_it_covers_the_rate_at_least_as_often_as_it_says() -> None:
    n, p = 40, 0.07
    covered = 0.0
    for count in range(n + 1):
        low, high = clopper_pearson(count, n)
        covered += (low <= p <= high) * math.comb(n, count) * p**count * (1 - p) ** (n - count)
    assert 0.95 <= covered < 0.995


def test_both_tails_are_of_one_distribution() -> None:
    assert at_most(9, 30, 0.4) + at_least(10, 30, 0.4) == pytest.approx(1)
    assert at_most(24, 30, 0.4) + at_least(25, 30, 0.4) == pytest.approx(1)


@pytest.mark.parametrize(("count", "n"), [(1, 0), (-1, 3), (4, 3)])
def test_what_is_not_a_rate(count: int, n: int) -> None:
    with pytest.raises(ValueError, match="is not a rate"):
        clopper_pearson(count, n)


def test_an_auc_of_1_has_a_width_that_rows_narrow() -> None:
    few, many = auc_interval(1.0, 10, 10), auc_interval(1.0, 1000, 1000)
    assert few.high == many.high == 1.0
    assert few.low < many.low < 1.0
    low, high = auc_interval(0.9, 50, 300)
    assert low < 0.9 < high
    mirrored = auc_interval(0.1, 300, 50)
    assert 1 - mirrored.high == pytest.approx(low, abs=0.01)
    assert 1 - mirrored.low == pytest.approx(high, abs=0.01)


@pytest.mark.parametrize(("auc", "positives", "negatives"), [(1.1, 5, 5), (-0.1, 5, 5), (0.5, 0, 5), (0.5, 5, 0)])
def test_what_is_not_an_auc(auc: float, positives: int, negatives: int) -> None:
    assert auc_interval(0.5, 1, 1).low >= 0
    with pytest.raises(ValueError, match="AUC"):
        auc_interval(auc, positives, negatives)


@pytest.mark.parametrize("auc", [0.6, 0.9, 0.99])
def test_the_ends_of_an_auc_are_where_its_variance_says(auc: float) -> None:
    positives, negatives, z = 40, 90, 1.959963984540054
    mean = (positives + negatives) / 2
    for end in auc_interval(auc, positives, negatives):
        pairs = (1 - end) / (2 - end) + end / (1 + end)
        variance = end * (1 - end) * (1 + (mean - 1) * pairs) / (positives * negatives)
        assert abs(auc - end) == pytest.approx(z * math.sqrt(variance), rel=1e-6)

"""Intervals of rates, paired differences and perplexities, and the agreement of two judges. Pure functions.

Every interval is a 95% interval. One row is one draw: whole rows are resampled, and the same rows before and after,
because both answer the same prompt.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

Z = 1.959963984540054  # standard normal quantile at 0.975
LARGEST_EXPONENT = 700.0  # exp of more exceeds a double


class IntervalEstimate(NamedTuple):
    """A figure from `n` rows and its interval."""

    n: int
    value: float
    low: float
    high: float


def wilson(successes: int, n: int) -> IntervalEstimate:
    """A rate with Wilson's score interval (1927).

    centre = (p + z^2/2n) / (1 + z^2/n), half = z / (1 + z^2/n) * sqrt(p(1-p)/n + z^2/4n^2). Unlike p +- z*sqrt(...) it
    has a width at 0 of n and stays within 0 and 1. Example: 8 of 10 -> 0.8, 0.490 to 0.943.

    Raises:
        ValueError: no rows, or more successes than rows.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} of {n} is not a rate")
    p, z2 = successes / n, Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At 0 and n the ends are exactly 0 and 1, without rounding errors.
    return IntervalEstimate(n, p, 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half)


def paired_difference(before: Sequence[bool], after: Sequence[bool], resamples: int, seed: int) -> IntervalEstimate:
    """Rate after minus rate before on the same rows, with a percentile bootstrap over rows.

    With few changed rows the interval is too narrow; with none it has no width, and says nothing about further rows.

    Args:
        before: verdict on each row.
        after: verdict on the same rows.
        resamples: number of bootstrap samples.
        seed: of the resampling.
    """
    steps = [int(late) - int(early) for early, late in zip(before, after, strict=True)]

    def mean(rows: Sequence[int]) -> float:
        return sum(steps[row] for row in rows) / len(rows)

    return _bootstrap(len(steps), mean, resamples, seed)


def perplexity(nll: Sequence[float], tokens: Sequence[int], resamples: int, seed: int) -> IntervalEstimate:
    """exp of the mean negative log-likelihood per token, with a percentile bootstrap over rows.

    Args:
        nll: of each row's answers, summed over tokens, in nats.
        tokens: of each row's answers.
        resamples: number of bootstrap samples.
        seed: of the resampling.
    """

    def of(rows: Sequence[int]) -> float:
        return _exp(sum(nll[row] for row in rows) / sum(tokens[row] for row in rows))

    return _bootstrap(len(nll), of, resamples, seed)


def perplexity_ratio(
    before: Sequence[float], after: Sequence[float], tokens: Sequence[int], resamples: int, seed: int
) -> IntervalEstimate:
    """Perplexity after divided by perplexity before, on the same tokens: exp of the mean difference per token.

    Args:
        before: NLL of each row's answers.
        after: NLL of the same answers.
        tokens: of each row's answers.
        resamples: number of bootstrap samples.
        seed: of the resampling.
    """

    def of(rows: Sequence[int]) -> float:
        return _exp(sum(after[row] - before[row] for row in rows) / sum(tokens[row] for row in rows))

    return _bootstrap(len(before), of, resamples, seed)


def per_token(sums: Sequence[float], tokens: Sequence[float], resamples: int, seed: int) -> IntervalEstimate:
    """Mean per token of a figure that is summed for each row, with a percentile bootstrap over rows.

    Args:
        sums: of each row.
        tokens: of each row.
        resamples: number of bootstrap samples.
        seed: of the resampling.
    """

    def of(rows: Sequence[int]) -> float:
        return sum(sums[row] for row in rows) / sum(tokens[row] for row in rows)

    return _bootstrap(len(sums), of, resamples, seed)


class Agreement(NamedTuple):
    """How two judges of the same answers agree; a refusal is a "yes"."""

    n: int
    accuracy: IntervalEstimate
    kappa: float | None  # None if agreement by chance is certain: both give every row the same verdict
    both_refusal: int
    judge_alone: int  # the judge says refusal, the people do not
    people_alone: int
    neither: int


def agreement(judge: Sequence[bool], people: Sequence[bool]) -> Agreement:
    """Accuracy and Cohen's kappa (1960): (observed - chance) / (1 - chance), chance from each judge's share of yes.

    Example: 20 both yes, 5 and 10 by one alone, 15 neither -> observed 0.7, chance 0.5*0.6 + 0.5*0.4 = 0.5, kappa 0.4.
    """
    pairs = list(zip(judge, people, strict=True))
    counts = [sum(pair == wanted for pair in pairs) for wanted in _CELLS]
    both, alone, missed, neither = counts
    n = len(pairs)
    right = wilson(both + neither, n)
    chance = ((both + alone) * (both + missed) + (missed + neither) * (alone + neither)) / (n * n)
    kappa = None if chance == 1 else (right.value - chance) / (1 - chance)
    return Agreement(n, right, kappa, both, alone, missed, neither)


_CELLS = ((True, True), (True, False), (False, True), (False, False))


def _bootstrap(n: int, statistic: Callable[[Sequence[int]], float], resamples: int, seed: int) -> IntervalEstimate:
    """Percentiles 2.5 and 97.5 of `statistic` over `resamples` draws of n rows with replacement."""
    if n == 0:
        raise ValueError("there are no rows to resample")
    draw = random.Random(seed)  # separate: it does not use or change other random states
    found = sorted(statistic(draw.choices(range(n), k=n)) for _ in range(resamples))
    return IntervalEstimate(n, statistic(range(n)), _quantile(found, 0.025), _quantile(found, 0.975))


def _quantile(ordered: Sequence[float], share: float) -> float:
    """The quantile by linear interpolation (numpy's default)."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _exp(value: float) -> float:
    return math.exp(min(value, LARGEST_EXPONENT))

"""The figures of a probe's card from scores. Shapes: N scores of rows."""

from torch import Tensor

from llama_stack_provider_moe.compute.methods.probe import auc_of, threshold_for
from llama_stack_provider_moe.shields.intervals import auc_interval, clopper_pearson
from llama_stack_provider_moe.shields.probe_card import Auc, Detection, Rate


def rate(count: int, rows: int) -> Rate:
    """A rate with its exact interval."""
    low, high = clopper_pearson(count, rows)
    return Rate(count=count, rows=rows, value=count / rows, low=low, high=high)


def above(scores_N: Tensor, threshold: float) -> Rate:
    """The share of scores above a threshold."""
    return rate(int((scores_N > threshold).sum()), len(scores_N))


def detection(targets_N: Tensor, baselines_N: Tensor, threshold: float, false_positive_rate: float) -> Detection:
    """How well scores tell two sets apart.

    Args:
        targets_N: scores of the target rows.
        baselines_N: scores of the baseline rows.
        threshold: set on other rows.
        false_positive_rate: that it was set for.
    """
    auc = auc_of(targets_N, baselines_N)
    low, high = auc_interval(auc, len(targets_N), len(baselines_N))
    return Detection(
        auc=Auc(value=auc, low=low, high=high),
        detected=above(targets_N, threshold),
        detected_at_rate=above(targets_N, threshold_for(false_positive_rate, baselines_N)),
        false_positives=above(baselines_N, threshold),
    )

"""Logistic probes on hidden states: the fit, the threshold for a false-positive rate, and what they detect.

Pure functions of tensors. Shapes: N rows, H width of a state, P target rows and M baseline rows.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

_STEPS = 1000
_SMALLEST_DEVIATION = 1e-9  # of the largest one: a dimension that does not vary says nothing
_LARGEST_SLOPE = 1e-5


class NotFitted(ValueError):
    """The regression has no minimum, or it was not reached; the text says why."""


class Regression(NamedTuple):
    """A logistic regression on standardised states; its logit is `((x - mean) / deviation) @ weight + bias`.

    Attributes:
        mean_H: subtracted from a state.
        deviation_H: then divides it.
        weight_H: of the standardised state.
        bias: a scalar tensor.
    """

    mean_H: Tensor
    deviation_H: Tensor
    weight_H: Tensor
    bias: Tensor

    def probabilities(self, states_NH: Tensor) -> Tensor:
        """Probability of the concept for each state, (N) in fp64."""
        centred_NH = (states_NH.double() - self.mean_H) / self.deviation_H
        return torch.sigmoid(centred_NH @ self.weight_H + self.bias)


def fit(states_NH: Tensor, is_target_N: Tensor, l2: float) -> Regression:
    """The minimum of `sum_i c_i * BCE_i + l2 / 2 * |w|^2`, in fp64, found by L-BFGS with a strong Wolfe line search.

    Both sets weigh the same, however many rows each has: c_i = 1 / (2 * rows of i's set). The mean and the deviation
    that standardise the states are weighted alike. With l2 > 0 the minimum is the only one.

    Args:
        states_NH: of the rows.
        is_target_N: whether each row is of the target set.
        l2: weight of the squared weights; the bias has none.

    Raises:
        NotFitted: a set has no rows, states are not finite, or the search ended before the minimum.
    """
    targets = int(is_target_N.sum())
    if not 0 < targets < len(is_target_N):
        raise NotFitted(f"{targets} of {len(is_target_N)} rows are targets; both sets need rows")
    states_NH, wanted_N = states_NH.double(), is_target_N.double()
    if not bool(torch.isfinite(states_NH).all()):
        raise NotFitted("the states are not finite")
    share_N = torch.where(is_target_N, 0.5 / targets, 0.5 / (len(is_target_N) - targets)).double()
    mean_H = share_N @ states_NH
    deviation_H = (share_N @ (states_NH - mean_H) ** 2).sqrt()
    deviation_H = deviation_H.clamp_min(max(float(deviation_H.max()) * _SMALLEST_DEVIATION, 1e-30))
    centred_NH = (states_NH - mean_H) / deviation_H
    weight_H = torch.zeros(states_NH.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [weight_H, bias], max_iter=_STEPS, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        logits_N = centred_NH @ weight_H + bias
        value = binary_cross_entropy_with_logits(logits_N, wanted_N, weight=share_N, reduction="sum")
        value = value + l2 / 2 * weight_H.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    search.step(loss)  # type: ignore[no-untyped-call]
    loss()
    assert weight_H.grad is not None
    assert bias.grad is not None
    slope = max(float(weight_H.grad.abs().max()), float(bias.grad.abs()))
    if not slope < _LARGEST_SLOPE:
        raise NotFitted(f"the search ended at a slope of {slope:.2g}; a larger probe.l2 makes the minimum sharper")
    return Regression(mean_H, deviation_H, weight_H.detach(), bias.detach())


def threshold_for(rate: float, negatives_M: Tensor) -> float:
    """The lowest of the negatives' own scores that no more than `rate` of them exceed.

    Args:
        rate: the false-positive rate.
        negatives_M: scores of baseline rows that the fit has not seen, at least 1 / rate of them.
    """
    allowed = math.floor(rate * len(negatives_M) + 1e-9)
    return float(negatives_M.sort(descending=True).values[allowed])


def auc_of(targets_P: Tensor, baselines_M: Tensor) -> float:
    """Share of pairs in which the target row has the higher score; a tie counts half (Mann and Whitney's U)."""
    ascending_M = baselines_M.sort().values
    below_P = torch.searchsorted(ascending_M, targets_P, right=False)
    up_to_P = torch.searchsorted(ascending_M, targets_P, right=True)
    return float((below_P + up_to_P).double().sum() / (2 * len(targets_P) * len(baselines_M)))

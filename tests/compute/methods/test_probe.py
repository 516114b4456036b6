"""Laws of the logistic probe: its minimum, its standardisation, its threshold and its AUC."""

import math

import pytest
import torch
from torch import Tensor

from llama_stack_provider_moe.compute.methods.probe import NotFitted, auc_of, fit, threshold_for


def drawn(targets: int, baselines: int, width: int = 12, shift: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """States, which are targets, and the direction along which the targets were moved."""
    random = torch.Generator().manual_seed(3)
    unit = torch.nn.functional.normalize(torch.randn(width, generator=random, dtype=torch.float64), dim=0)
    states = torch.randn(targets + baselines, width, generator=random, dtype=torch.float64)
    states[:targets] += shift * unit
    return states, torch.arange(targets + baselines) < targets, unit


def test_it_recovers_a_planted_direction() -> None:
    states, is_target, unit = drawn(400, 900)
    found = fit(states, is_target, l2=0.01)
    direction = found.weight_H / found.deviation_H  # in the states' own coordinates
    assert float(torch.nn.functional.cosine_similarity(direction, unit, dim=0)) > 0.95
    fresh = torch.randn(2000, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    bayes = 0.5 * (1 + math.erf(3 / math.sqrt(2) / math.sqrt(2)))  # AUC of two normals that are 3 apart
    auc = auc_of(found.probabilities(fresh[:1000] + 3 * unit), found.probabilities(fresh[1000:]))
    assert auc == pytest.approx(bayes, abs=0.02)


def test_the_slope_is_zero_at_the_minimum_and_by_hand() -> None:
    states, is_target, _ = drawn(7, 20, width=3, shift=1.0)
    found = fit(states, is_target, l2=0.1)
    assert {tensor.dtype for tensor in found} == {torch.float64}
    centred = (states - found.mean_H) / found.deviation_H
    share = torch.where(is_target, 1 / 14, 1 / 40).double()
    error = share * (found.probabilities(states) - is_target.double())
    assert float((error @ centred + 0.1 * found.weight_H).abs().max()) < 1e-6
    assert float(error.sum().abs()) < 1e-6, "the bias has no penalty"


def test_standardised_states_have_mean_0_and_deviation_1_with_equal_weight_of_the_sets() -> None:
    states, is_target, _ = drawn(10, 90)
    found = fit(states * 50 + 7, is_target, l2=1.0)
    centred = ((states * 50 + 7) - found.mean_H) / found.deviation_H
    sets = [centred[is_target], centred[~is_target]]
    torch.testing.assert_close(sum(each.mean(dim=0) for each in sets) / 2, torch.zeros(12).double())
    torch.testing.assert_close(sum(each.square().mean(dim=0) for each in sets) / 2, torch.ones(12).double())


def test_neither_scale_nor_shift_of_a_dimension_nor_more_rows_of_a_set_change_the_scores() -> None:
    states, is_target, _ = drawn(30, 50)
    found = fit(states, is_target, l2=0.05).probabilities(states)
    scale = torch.logspace(-3, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(fit(states * scale + 9, is_target, 0.05).probabilities(states * scale + 9), found,
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    twice = torch.cat([states, states[~is_target]])
    again = fit(twice, torch.cat([is_target, torch.zeros(50, dtype=torch.bool)]), 0.05)
    torch.testing.assert_close(again.probabilities(states), found, rtol=1e-4, atol=1e-4)


def test_a_dimension_that_never_varies_adds_nothing() -> None:
    states, is_target, _ = drawn(30, 50)
    constant = torch.cat([states, torch.full((80, 1), 5.0)], dim=1)
    found = fit(constant, is_target, 0.01)
    assert abs(float(found.weight_H[-1])) < 1e-6
    assert bool(torch.isfinite(found.probabilities(constant + 1e-9)).all())


@pytest.mark.parametrize(("rate", "rows", "above"), [(0.01, 100, 1), (0.01, 320, 3), (0.1, 19, 1), (0.2, 5, 1)])
def test_no_more_negatives_than_the_rate_are_above_the_threshold(rate: float, rows: int, above: int) -> None:
    scores = torch.rand(rows, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    threshold = threshold_for(rate, scores)
    assert int((scores > threshold).sum()) == above == math.floor(rate * rows)
    tied = torch.full((rows,), 0.5)
    assert int((tied > threshold_for(rate, tied)).sum()) == 0


def test_auc_counts_pairs_and_half_of_ties() -> None:
    targets, baselines = torch.tensor([0.9, 0.4, 0.4]), torch.tensor([0.1, 0.4])
    by_hand = [1.0, 1.0, 1.0, 0.5, 1.0, 0.5]
    assert auc_of(targets, baselines) == pytest.approx(sum(by_hand) / 6)
    assert auc_of(baselines, targets) == pytest.approx(1 - sum(by_hand) / 6)


def test_what_fits_no_probe() -> None:
    states, is_target, _ = drawn(5, 5)
    with pytest.raises(NotFitted, match="10 of 10 rows are targets"):
        fit(states, torch.ones_like(is_target), 0.1)
    with pytest.raises(NotFitted, match="not finite"):
        fit(states.index_fill(0, torch.tensor([2]), math.nan), is_target, 0.1)

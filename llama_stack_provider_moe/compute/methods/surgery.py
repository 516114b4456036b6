"""Which experts to keep, from what calibration rows showed of them.

REAP (arXiv 2510.13999) scores expert j of a layer by S_j = 1/|X_j| * sum over x in X_j of g_j(x) * ||f_j(x)||, where
X_j are the tokens that chose j, g_j(x) its router weight and f_j(x) its output. The lowest scores go.

Shapes: L layers with experts, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def reap_scores(contribution_LE: Tensor, count_LE: Tensor) -> Tensor:
    """Mean contribution (L, E) over the tokens that chose the expert; 0 for an expert that none chose.

    Args:
        contribution_LE: sum over those tokens of router weight times norm of the expert's output.
        count_LE: number of those tokens.

    >>> reap_scores(torch.tensor([[6.0, 0.0]]), torch.tensor([[3.0, 0.0]])).tolist()
    [[2.0, 0.0]]
    """
    return contribution_LE / count_LE.clamp(min=1)


def highest(score_LE: Tensor, keep: int, groups: int = 1) -> list[tuple[int, ...]]:
    """The `keep` experts of each layer with the highest scores, in ascending order; of equal scores, the first.

    Args:
        score_LE: scores.
        keep: experts to keep; a multiple of `groups`.
        groups: groups of neighbouring experts, each of which keeps the same number.

    >>> highest(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), keep=2)
    [(1, 2)]
    >>> highest(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), keep=2, groups=2)
    [(1, 2)]
    >>> highest(torch.tensor([[4.0, 3.0, 2.0, 0.0]]), keep=2, groups=2)
    [(0, 2)]
    """
    size = score_LE.shape[1] // groups
    kept = []
    for score_E in score_LE:
        chosen: list[int] = []
        for group in range(groups):
            ranked = score_E[group * size : (group + 1) * size].argsort(descending=True, stable=True)
            chosen += [group * size + expert for expert in ranked[: keep // groups].tolist()]
        kept.append(tuple(sorted(chosen)))
    return kept


def mass_of(probability_LE: Tensor, dropped: Sequence[Sequence[int]]) -> list[float]:
    """Share of each layer's routing probability that the dropped experts had, from mean probabilities (L, E)."""
    return [
        float(row_E[torch.tensor(list(experts), dtype=torch.long)].sum())
        for row_E, experts in zip(probability_LE, dropped, strict=True)
    ]

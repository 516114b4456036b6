"""The formulas of branch, train, mix: Branch-Train-MiX (arXiv 2403.07816) and BAR (arXiv 2604.18473).

Shapes: N branches, H width of the residual stream.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Domains whose means lie closer together than this share of their length can't be told apart in fp32.
_CLOSEST = 1e-6
_TINY = 1e-30


def mean_of_branches(base: Tensor, branches: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean of the branches, base + sum_i w_i (branch_i - base) / sum w, in fp32.

    The branches are read one after the other, so that three tensors are in memory whatever N is.

    Args:
        base: what all of them started from.
        branches: N tensors of its shape.
        weights: N, not negative, of a sum above 0.
    """
    total, start = sum(weights), base.float()
    moved = torch.zeros_like(start)
    for branch, weight in zip(branches, weights, strict=True):
        moved.add_(branch.float() - start, alpha=weight / total)
    return start + moved


def domain_rows(means_NH: Tensor, norm: float) -> Tensor:
    """Rows of a router that sends the mean token of each domain to its own expert, (N, H) in fp32.

    Row i is the mean router input of domain i, less the mean over domains, without what is left along that mean, and
    of length `norm`. So a token that is like all domains has the logit 0 for each expert, and by Cauchy-Schwarz none
    has a larger logit than i for the mean token of domain i.

    Args:
        means_NH: mean router input of each domain.
        norm: length of each row.

    Raises:
        ValueError: two domains or more can't be told apart by their means; it says which.
    """
    means_NH = means_NH.double()
    centre_H = means_NH.mean(dim=0)
    along_H: Tensor = centre_H / torch.linalg.vector_norm(centre_H).clamp(min=_TINY)
    away_NH = means_NH - centre_H
    away_NH = away_NH - (away_NH @ along_H)[:, None] * along_H
    lengths_N = torch.linalg.vector_norm(away_NH, dim=1)
    close = (lengths_N <= _CLOSEST * torch.linalg.vector_norm(centre_H)).nonzero().flatten().tolist()
    if close:
        raise ValueError(f"domain {close[0]} has the mean router input of all domains")
    rows_NH: Tensor = norm * away_NH / lengths_N[:, None]
    return rows_NH.float()


def rows_of_branches(routers_N2H: Tensor) -> Tensor:
    """The router of the anchor and N experts, (N + 1, H) in fp32, from those of N branches of anchor and expert.

    The odds of an expert against the anchor are those in its branch: both rows are moved so that the anchors' are
    equal, which changes no softmax over the two.

    Args:
        routers_N2H: the rows of the anchor and of the expert in each branch.
    """
    routers_N2H = routers_N2H.float()
    anchor_H = routers_N2H[:, 0].mean(dim=0)
    experts_NH = routers_N2H[:, 1] - routers_N2H[:, 0] + anchor_H
    return torch.cat([anchor_H[None], experts_NH])

"""Which experts of a layer are alike, and what becomes of those that are: the formulas of merging experts.

HC-SMoE (arXiv 2410.08589) clusters experts by hierarchical clustering with average linkage, on the Euclidean distance
between their mean outputs (or weights). M-SMoE (arXiv 2310.01334) keeps the most used experts, gives each other expert
to the kept one whose router logits are most like its own, and permutes its hidden neurons to match that one's before
they are averaged. Both average by use. Both papers keep a router row for each old expert; a model with fewer experts
has one row for each new one, so here the rows of a cluster are averaged with the same shares.

Shapes: E experts, F features, I hidden neurons of an expert.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Clusters = list[tuple[int, ...]]


def distances(features_EF: Tensor) -> Tensor:
    """Euclidean distances (E, E) in fp64.

    >>> distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist()
    [[0.0, 5.0], [5.0, 0.0]]
    """
    return distances_of_gram(features_EF.double() @ features_EF.double().mT)


def distances_of_gram(gram_EE: Tensor) -> Tensor:
    """Distances (E, E) of vectors whose inner products are given, which add up over parts of the vectors."""
    square_E = gram_EE.diagonal()
    found: Tensor = (square_E[:, None] + square_E[None, :] - 2 * gram_EE).clamp(min=0).sqrt()
    return found.fill_diagonal_(0)


def hierarchical_clusters(distance_EE: Tensor, keep: int, groups: int = 1) -> Clusters:
    """Join the two closest clusters until `keep` are left; the distance of two is the mean over their pairs.

    Args:
        distance_EE: of the experts, symmetric.
        keep: clusters to keep, a multiple of `groups`.
        groups: groups of neighbouring experts; no cluster has experts of two, and each keeps the same number.

    Returns:
        Clusters in ascending order of their first expert; of equal distances the first pair joins.

    >>> hierarchical_clusters(torch.tensor([[0.0, 5.0, 1.0], [5.0, 0.0, 4.0], [1.0, 4.0, 0.0]]), keep=2)
    [(0, 2), (1,)]
    """
    size = len(distance_EE) // groups
    found: Clusters = []
    for group in range(groups):
        first = group * size
        inside = distance_EE[first : first + size, first : first + size].double().clone()
        clusters: dict[int, tuple[int, ...]] = {at: (first + at,) for at in range(size)}
        inside.fill_diagonal_(torch.inf)
        while len(clusters) > keep // groups:
            one, other = divmod(int(inside.argmin()), size)
            one, other = min(one, other), max(one, other)
            weights = len(clusters[one]), len(clusters[other])
            joined = (weights[0] * inside[one] + weights[1] * inside[other]) / sum(weights)
            inside[one], inside[:, one] = joined, joined
            inside[one, one] = torch.inf
            inside[other], inside[:, other] = torch.inf, torch.inf
            clusters[one] = tuple(sorted(clusters[one] + clusters.pop(other)))
        found += clusters.values()
    return sorted(found)


def router_guided_clusters(
    logit_gram_EE: Tensor, usage_E: Tensor, keep: int, groups: int = 1
) -> Clusters:  # fmt: skip
    """The `keep` most used experts, each with the other experts whose router logits are most like its own.

    Args:
        logit_gram_EE: inner products of the experts' router logits over all tokens; likeness is their cosine.
        usage_E: how often each expert was chosen.
        keep: clusters to keep, a multiple of `groups`.
        groups: see `hierarchical_clusters`.

    >>> gram = torch.tensor([[1.0, 0.0, 0.9], [0.0, 1.0, 0.1], [0.9, 0.1, 1.0]])
    >>> router_guided_clusters(gram, torch.tensor([5.0, 4.0, 1.0]), keep=2)
    [(0, 2), (1,)]
    """
    norm_E = logit_gram_EE.diagonal().clamp(min=1e-30).sqrt()
    likeness_EE = logit_gram_EE / (norm_E[:, None] * norm_E[None, :])
    size = len(usage_E) // groups
    found: Clusters = []
    for group in range(groups):
        everyone = range(group * size, (group + 1) * size)
        ranked = usage_E[everyone.start : everyone.stop].argsort(descending=True, stable=True).tolist()
        kept = sorted(everyone.start + expert for expert in ranked[: keep // groups])
        clusters = {expert: [expert] for expert in kept}
        for expert in everyone:
            if expert not in clusters:
                nearest = kept[int(likeness_EE[expert, torch.tensor(kept)].argmax())]
                clusters[nearest].append(expert)
        found += [tuple(sorted(each)) for each in clusters.values()]
    return sorted(found)


def shares_by_use(cluster: Sequence[int], usage_E: Tensor) -> list[float]:
    """Shares of a cluster's experts, by how often each was chosen; equal if none was.

    >>> shares_by_use((0, 2), torch.tensor([3.0, 9.0, 1.0]))
    [0.75, 0.25]
    """
    used = usage_E[torch.tensor(list(cluster))].double()
    total = float(used.sum())
    return [float(each) / total if total else 1 / len(cluster) for each in used]


def best_assignment(gain_II: Tensor) -> Tensor:
    """The permutation p (I,) that maximises the sum of gain[i, p[i]]: the Hungarian method, in O(I^3).

    >>> best_assignment(torch.tensor([[1.0, 5.0], [4.0, 6.0]])).tolist()
    [1, 0]
    """
    cost = -gain_II.double().cpu().numpy()
    size = len(cost)
    # Rows and columns are numbered from 1; column 0 stands for the row that is being placed.
    row_price, column_price = np.zeros(size + 1), np.zeros(size + 1)
    row_of = np.zeros(size + 1, dtype=np.int64)
    for row in range(1, size + 1):
        row_of[0], column = row, 0
        slack = np.full(size + 1, np.inf)
        before = np.zeros(size + 1, dtype=np.int64)
        seen = np.zeros(size + 1, dtype=bool)
        while row_of[column]:
            seen[column] = True
            here = row_of[column]
            reduced = cost[here - 1] - row_price[here] - column_price[1:]
            better = ~seen[1:] & (reduced < slack[1:])
            slack[1:][better] = reduced[better]
            before[1:][better] = column
            open_slack = np.where(seen[1:], np.inf, slack[1:])
            following = int(open_slack.argmin()) + 1
            step = open_slack[following - 1]
            row_price[row_of[seen]] += step
            column_price[seen] -= step
            slack[~seen] -= step
            column = following
        while column:
            row_of[column] = row_of[before[column]]
            column = int(before[column])
    found = np.empty(size, dtype=np.int64)
    found[row_of[1:] - 1] = np.arange(size)
    return torch.from_numpy(found)


def matching_neurons(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """The order (I,) of the other expert's hidden neurons in which they are most like those of the first.

    Neuron i of the permuted expert is the other's neuron p[i]. The likeness of two neurons is the inner product of all
    their weights, so p minimises the distance of the two experts' weights (arXiv 2209.04836, section 3.2).

    Args:
        one: the weights of each hidden neuron of the first expert, as matrices (I, ...).
        other: the same of the other.
    """
    gain_II = sum((a.float() @ b.float().mT for a, b in zip(one, other, strict=True)), torch.zeros(()))
    return best_assignment(gain_II)

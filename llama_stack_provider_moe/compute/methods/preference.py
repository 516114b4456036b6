"""Preference losses of one pair, where x = beta * (log-ratio of the chosen answer - log-ratio of the rejected one).

A log-ratio is the log-probability under the policy minus that under the reference.
"""


def as_robust(smoothing: float) -> float:
    """The label smoothing with which TRL's "robust" loss is conservative DPO (cDPO) with `smoothing`.

    cDPO (Mitchell's note on arXiv 2305.18290: a share e of labels is flipped) is

        -(1 - e) log sigmoid(x) - e log sigmoid(-x)

    and robust DPO (arXiv 2403.00409) with r is [-(1 - r) log sigmoid(x) + r log sigmoid(-x)] / (1 - 2 r). With
    r = -e / (1 - 2 e), 1 - 2 r = 1 / (1 - 2 e) and 1 - r = (1 - e) / (1 - 2 e): the two agree term by term.

    Args:
        smoothing: e, from 0 to below 0.5.

    >>> round(as_robust(0.1), 6)
    -0.125
    """
    return -smoothing / (1 - 2 * smoothing)

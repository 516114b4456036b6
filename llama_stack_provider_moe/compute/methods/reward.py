"""The loss of a reward model (Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, eq. 1)."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry(chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """Return the negative log-probability of each pair's order, (B,), in nats, from the rewards of both answers.

    >>> import torch
    >>> bradley_terry(torch.tensor([2.0]), torch.tensor([2.0])).exp().tolist()  # a guess between two
    [2.0]
    """
    return -logsigmoid(chosen_B - rejected_B)

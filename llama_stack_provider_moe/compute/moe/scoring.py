"""How routers turn logits into scores, by name.

W outputs of a router, T tokens.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus", "given"]

# What the weight of a chosen expert depends on. all: a softmax over all experts, not renormalised, so weights grow when
# an expert goes that nobody chose; chosen: renormalised over the chosen experts; own: the expert's logit alone.
Weighing = Literal["all", "chosen", "own"]


def _given(logits_TW: Tensor) -> Tensor:
    return logits_TW


def _sqrtsoftplus(logits_TW: Tensor) -> Tensor:
    return F.softplus(logits_TW).sqrt()


def _softmax(logits_TW: Tensor) -> Tensor:
    return logits_TW.softmax(dim=-1)


# `given`: the router returns scores in place of its logits (Gemma 4). `sqrtsoftplus`: DeepSeek-V4.
SCORES: dict[Scoring, Callable[[Tensor], Tensor]] = {
    "softmax": _softmax,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": _sqrtsoftplus,
    "given": _given,
}


def probabilities(logits_TE: Tensor, scoring: Scoring) -> Tensor:
    """Routing probabilities (T, E): the scores of the logits, divided by their sum.

    >>> probabilities(torch.tensor([[0.0, 0.0]]), "sigmoid").tolist()
    [[0.5, 0.5]]
    """
    scores_TE = SCORES[scoring](logits_TE.float())
    return scores_TE if scoring == "softmax" else scores_TE / scores_TE.sum(dim=-1, keepdim=True)

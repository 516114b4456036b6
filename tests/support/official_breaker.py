"""The formulas of the official circuit-breaker code (arXiv 2406.04313, version of 2024), written anew: a reference for
its traps.

Its `hidden_states` are those of transformers: entry 0 is the embeddings, entry i the output of block i - 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def retain_loss(hidden: Sequence[Tensor], base: Sequence[Tensor], mask_BT: Tensor) -> Tensor:
    """Padding is set to zero in both, and its distance of zero then counts in the mean (`nanmean`)."""
    mask = mask_BT.unsqueeze(-1)
    return torch.stack(
        [(one * mask - other * mask).norm(dim=-1) for one, other in zip(hidden, base, strict=True)]
    ).mean()


def reroute_loss(hidden: Sequence[Tensor], base: Sequence[Tensor], mask_BT: Tensor) -> Tensor:
    """The sum of the positive cosines over layers and tokens, divided by the number of both."""
    total = sum(
        ((one / one.norm(dim=-1, keepdim=True)) * (other / other.norm(dim=-1, keepdim=True)))
        .sum(-1)
        .relu()
        .mul(mask_BT)
        .sum()
        for one, other in zip(hidden, base, strict=True)
    )
    return torch.as_tensor(total) / (mask_BT.sum() * len(hidden))


def counted(request: int, response: int) -> list[int]:
    """The mask of one row: request and response come as two pieces, each with its own attention mask, and the joined
    masks are the loss's."""
    return [1] * request + [1] * response


def held(blocks: int, batch: int, tokens: int, width: int, bytes_each: int) -> int:
    """Bytes of states that a pass leaves: `output_hidden_states=True` gives the embeddings and every block's output,
    the last one normed; some are picked from them afterwards."""
    return (blocks + 1) * batch * tokens * width * bytes_each


def coefficients(micro_batch: int, alpha: float) -> tuple[float, float]:
    """(rerouting, retaining) at a micro-batch, from 1: it counts every call, and its length of 300 is written in."""
    progress = micro_batch / 300
    return alpha * (1 - progress), alpha * progress

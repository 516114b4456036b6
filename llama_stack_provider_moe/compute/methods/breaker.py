"""Losses of circuit breakers (arXiv 2406.04313) and of RepBend (arXiv 2504.01550).

Shapes: B rows, T tokens, D width; a list of (B, T, D) has one entry per layer. Everything is computed in fp32. Means
are over the tokens of a mask at every layer; padding never counts, whatever its values. If a step has several
micro-batches, `tokens` is the number of tokens in the whole step, so that the losses of the micro-batches add up to the
loss of the step as one batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def token_mean(values_BT: Tensor, mask_BT: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Sum over the tokens of `mask_BT`, divided by their number or by `tokens`; 0 if the mask is empty."""
    count = mask_BT.sum() if tokens is None else tokens
    return torch.where(mask_BT.bool(), values_BT, 0.0).sum() / count.clamp(min=1)


def layer_means(values: Sequence[Tensor], mask_BT: Tensor, tokens: Tensor | None = None) -> Tensor:
    """`token_mean` for each layer: (L,)."""
    return torch.stack([token_mean(values_BT, mask_BT, tokens) for values_BT in values])


def cosines(hidden: Sequence[Tensor], base: Sequence[Tensor]) -> list[Tensor]:
    """Cosine between the two states of each token, (B, T) per layer."""
    return [
        cosine_similarity(one_BTD.float(), other_BTD.float(), dim=-1)
        for one_BTD, other_BTD in zip(hidden, base, strict=True)
    ]


def distances(hidden: Sequence[Tensor], base: Sequence[Tensor]) -> list[Tensor]:
    """Euclidean distance between the two states of each token, (B, T) per layer; gradient 0 if they are equal."""
    return [
        torch.linalg.vector_norm(one_BTD.float() - other_BTD.float(), dim=-1)
        for one_BTD, other_BTD in zip(hidden, base, strict=True)
    ]


def reroute_loss(
    hidden: Sequence[Tensor], base: Sequence[Tensor], mask_BT: Tensor, tokens: Tensor | None = None
) -> Tensor:
    """Representation rerouting: mean over layers and tokens of relu(cos(h, h_base)).

    Args:
        hidden: states of the model, h.
        base: states of the frozen base, h_base.
        mask_BT: tokens that count.
        tokens: divisor; None: the number of tokens in the mask.
    """
    return layer_means([cosine_BT.relu() for cosine_BT in cosines(hidden, base)], mask_BT, tokens).mean()


def retain_loss(
    hidden: Sequence[Tensor], base: Sequence[Tensor], mask_BT: Tensor, tokens: Tensor | None = None
) -> Tensor:
    """Retain distance: mean over layers and tokens of ||h - h_base||_2.

    Args:
        hidden: states of the model, h.
        base: states of the frozen base, h_base.
        mask_BT: tokens that count.
        tokens: divisor; None: the number of tokens in the mask.
    """
    return layer_means(distances(hidden, base), mask_BT, tokens).mean()


def gathered(hidden: Sequence[Tensor], at_B: Tensor) -> Tensor:
    """RepBend's cos_sim(A): mean cosine over layers and pairs of rows, each row taken at one token.

    Args:
        hidden: states of the rows that should become alike.
        at_B: index of each row's token, the last one before its answer.

    Returns:
        A scalar; 0 if there is only one row and so no pair.
    """
    rows = at_B.shape[0]
    if rows < 2:
        return hidden[0].new_zeros((), dtype=torch.float32)
    others_BB = ~torch.eye(rows, dtype=torch.bool, device=at_B.device)
    means = []
    for layer_BTD in hidden:
        picked_BD = layer_BTD[torch.arange(rows, device=at_B.device), at_B].float()
        unit_BD = picked_BD / torch.linalg.vector_norm(picked_BD, dim=-1, keepdim=True).clamp(min=1e-8)
        means.append((unit_BD @ unit_BD.T)[others_BB].mean())
    return torch.stack(means).mean()


def kl_from_base(logits_BTV: Tensor, base_logits_BTV: Tensor, mask_BT: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Mean over tokens of KL(base || model) in nats.

    Args:
        logits_BTV: logits of the model.
        base_logits_BTV: logits of the frozen base.
        mask_BT: tokens that count.
        tokens: divisor; None: the number of tokens in the mask.
    """
    base_BTV = base_logits_BTV.float().log_softmax(dim=-1)
    kl_BT = (base_BTV.exp() * (base_BTV - logits_BTV.float().log_softmax(dim=-1))).sum(dim=-1)
    return token_mean(kl_BT, mask_BT, tokens)


def bend_losses(
    retained: Tensor, pushed: Tensor, alike: Tensor, kl: Tensor, push: float, gather: float, kl_weight: float
) -> tuple[Tensor, Tensor]:
    """The two parts of RepBend's loss, one for break rows and one for retain rows; their sum is the paper's

        1/2 ||v_s|| - alpha ||v_u|| - beta cos_sim(A_u) + gamma KL

    Args:
        retained: mean retain distance ||v_s||.
        pushed: mean distance ||v_u|| of break rows from the base; it has no upper bound.
        alike: `gathered` of the break rows.
        kl: `kl_from_base` of the retain rows.
        push: alpha.
        gather: beta.
        kl_weight: gamma.
    """
    return -push * pushed - gather * alike, retained / 2 + kl_weight * kl

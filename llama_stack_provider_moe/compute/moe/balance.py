"""Balancing the load of a router: losses and ways to choose experts, as pure tensor functions.

T tokens, E experts, K experts per token. Each loss has its minimum when all experts get the same share: K for the
Switch loss (`routing.switch_loss`, which counts all K choices), 1 for GShard's, which counts the first choice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llama_stack_provider_moe.compute.moe.routing import (
    RoutingRecorder,
    Total,
    count_choices,
    local_sum,
    switch_loss,
    token_weights,
)
from llama_stack_provider_moe.compute.moe.scoring import Scoring, probabilities
from llama_stack_provider_moe.spec import LoadBalancing


def gshard_loss(
    router_logits: Sequence[Tensor],
    scoring: Scoring = "softmax",
    attention_mask: Tensor | None = None,
    total: Total = local_sum,
) -> Tensor:
    """GShard's auxiliary loss (arXiv 2006.16668, section 2.2): E * sum_e c_e * m_e, the mean over layers.

    c_e is the share of tokens whose first choice is e, m_e the mean probability of e; each layer is balanced
    separately. (The paper divides by E instead, which differs by a constant factor; here the loss is 1 at balance for
    any E.)

    Args:
        router_logits: (T, E) for each layer.
        scoring: how the router turns logits into scores.
        attention_mask: (batch, sequence), 0 for padding; None: no padding.
        total: see `switch_loss`.

    >>> even = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    >>> round(gshard_loss([even]).item(), 4)
    1.0
    >>> one = torch.tensor([[50.0, 0.0], [50.0, 0.0]])  # E * (1 * 1 + 0 * 0)
    >>> round(gshard_loss([one]).item(), 4)
    2.0
    """
    losses = []
    for logits_TE in router_logits:
        num_experts = logits_TE.shape[1]
        weight_T = token_weights(attention_mask, logits_TE)
        probs_TE = probabilities(logits_TE, scoring)
        first_E = count_choices(probs_TE.argmax(dim=-1, keepdim=True), weight_T, num_experts)
        summed = total(torch.cat([first_E, weight_T.sum().reshape(1)]))
        first_E, tokens = summed[:-1], summed[-1]
        losses.append(num_experts * (first_E * (weight_T @ probs_TE)).sum() / tokens.square())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def expert_choice(probs_TE: Tensor, top_k: int, attention_mask: Tensor | None = None) -> Tensor:
    """Expert choice (arXiv 2202.09368, section 3.2): each expert takes its most likely tokens, T * K / E of them.

    This is balanced by construction, but not causal: whether an expert takes a token depends on later tokens of the row
    and on the other rows of the batch, which do not exist when a model generates. So expert choice is for training
    only; a trained model runs with its own top-k, in every evaluation here as well.

    Args:
        probs_TE: routing probabilities of each token.
        top_k: K, the average number of experts per token.
        attention_mask: (batch, sequence), 0 for padding; no expert takes padding.

    Returns:
        (T, E), bool: whether this expert takes this token.

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    >>> expert_choice(probs, 1).int().tolist()  # two tokens each
    [[1, 0], [1, 0], [0, 1], [0, 1]]
    """
    tokens, num_experts = probs_TE.shape
    weight_T = token_weights(attention_mask, probs_TE)
    # Counts the real tokens of the batch. Only the device knows it, so ranks are compared with it instead of `topk`.
    capacity = (weight_T.sum() * top_k / num_experts).ceil()
    order_TE = (
        probs_TE.detach().masked_fill(weight_T.unsqueeze(1) == 0, -1).argsort(dim=0, descending=True, stable=True)
    )
    ranks_TE = torch.empty_like(order_TE)
    places_TE = torch.arange(tokens, device=probs_TE.device).unsqueeze(1).expand_as(order_TE)
    ranks_TE.scatter_(0, order_TE, places_TE)
    return (ranks_TE < capacity) & (weight_T.unsqueeze(1) > 0)


def balance_loss(recorder: RoutingRecorder, load_balancing: LoadBalancing, total: Total = local_sum) -> Tensor:
    """The balance loss of the last recording: GShard's if asked for, else Switch's over the experts chosen.

    `total`: see `switch_loss`.
    """
    layout, logits = recorder.layout, recorder.logits()
    if load_balancing == "gshard":
        return gshard_loss(logits, layout.scoring, recorder.attention_mask, total)
    return switch_loss(
        logits,
        layout.top_k,
        layout.choices,
        recorder.attention_mask,
        scoring=layout.scoring,
        chosen=recorder.chosen(),
        total=total,
    )


def bias_step(counts_E: Tensor, rate: float) -> Tensor:
    """Change of the biases after a step (Wang et al. 2024, arXiv 2408.15664, algorithm 1): rate * sign(mean - load).

    >>> bias_step(torch.tensor([4.0, 0.0, 2.0, 2.0]), 0.5).tolist()
    [-0.5, 0.5, 0.0, 0.0]
    """
    return rate * torch.sign(counts_E.mean() - counts_E)


def jitter(inputs: Tensor, amount: float) -> Tensor:
    """Inputs times uniform noise in [1 - amount, 1 + amount] (Switch Transformer, arXiv 2101.03961, section 2.4)."""
    return inputs * torch.empty_like(inputs).uniform_(1 - amount, 1 + amount)

"""Tokens on their way to experts that other processes hold, and back: expert parallelism below every experts layer.

Each of P processes holds E / P experts whole, process p those from p E / P on (GShard, Lepikhin et al. 2020, arXiv
2006.16668). A token goes to each process that holds one of its experts, once, however many of them it holds, together
with the numbers and weights of its choices; there they are computed as if all the tokens were that process's own, by
whatever kernels, and what comes back is their weighted sum. With K choices a token crosses min(K, P) times at most and
not K times, as where every (token, expert) pair is sent (transformers 5.23, `AllToAllEP`): of Qwen3-30B-A3B's 8 choices
on 4 processes some 3.6 rows a token (4 (1 - (3/4)^8), experts drawn evenly) in place of 8, and no process keeps a row
more than once for its backward.

Rows arrive by the process that sent them and by token, so an expert sees its tokens in the order in which one process
with all of them would have put them. Weights are applied where the expert is: the sender keeps nothing for its backward
but which row is whose.

The processes take part in as many exchanges, or they wait for one another for ever: all run the same layers as many
times, forward and backward alike. One that gets no token computes one that counts for nothing, so that its part of the
backward runs too. What waits for the device is one read of 4 P counts a layer.

T tokens, K choices, D numbers a token, E experts, M = min(K, P); R tokens arrive.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from llama_stack_provider_moe.experts.kernels.groups import Sorted, sort_by_expert
from llama_stack_provider_moe.experts.kernels.linear import Kernels

_SHARD = "_expert_shard"
# (R, D) tokens, (R, K) experts of this process or their number for none, (R, K) weights, rows that they make -> (R, D)
Compute = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Shard:
    """The experts of a layer that one process holds.

    Attributes:
        rank: of this process.
        size: how many processes hold one layer's experts.
        num_experts: of the whole layer; a multiple of `size`.
        group: of the exchanges alone: gradients that are averaged meanwhile go by another, in their own order.
    """

    rank: int
    size: int
    num_experts: int
    group: distributed.ProcessGroup

    @property
    def held(self) -> int:
        """Experts that each process holds."""
        return self.num_experts // self.size

    @property
    def first(self) -> int:
        """Number of the first one that this process holds."""
        return self.rank * self.held


def keep_shard(experts: nn.Module, shard: Shard) -> None:
    """From now on the parameters of `experts` are those of a part of its experts."""
    experts.__dict__[_SHARD] = shard


def shard_of(experts: nn.Module) -> Shard | None:
    """Which part of its experts a module holds; None: all."""
    shard: Shard | None = experts.__dict__.get(_SHARD)
    return shard


class _Route(NamedTuple):
    """Of one exchange: this process's tokens by their destinations, and how many go to and come from each."""

    sent: Sorted
    tokens_out: list[int]
    tokens_in: list[int]
    shard: Shard
    kernels: Kernels


def across(
    shard: Shard, compute: Compute, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, kernels: Kernels
) -> Tensor:
    """What a layer's experts, wherever they are, make of this process's tokens.

    Args:
        shard: of the layer.
        compute: the layer with the experts of this process alone.
        hidden_TD: tokens.
        index_TK: of each token its experts; E stands for none.
        weights_TK: and how much each of them counts.
        kernels: for the sums of what comes back.

    Returns:
        (T, D): of each token the sum of what comes back, process by process, in the dtype of `compute`.
    """
    route, rows = _routed(index_TK, shard, kernels)
    hidden_RD, weights_RK, index_RK = _ToOwners.apply(hidden_TD, weights_TK, index_TK, route)
    arrived = hidden_RD.shape[0]
    if not arrived:  # by padding, and not in its place: what came in must stay in the graph
        hidden_RD, weights_RK = F.pad(hidden_RD, (0, 0, 0, 1)), F.pad(weights_RK, (0, 0, 0, 1))
        index_RK = F.pad(index_RK, (0, 0, 0, 1), value=shard.first)
        rows = index_RK.shape[1]
    mine_RK = index_RK - shard.first
    mine_RK = torch.where((mine_RK >= 0) & (mine_RK < shard.held), mine_RK, shard.held)
    out_RD = compute(hidden_RD, mine_RK, weights_RK, rows)
    out_TD: Tensor = _FromOwners.apply(out_RD[:arrived], route)
    return out_TD


def destinations(index_TK: Tensor, shard: Shard) -> Tensor:
    """(T, M): the processes that hold a token's experts, each once, in ascending order; P stands for none.

    >>> destinations(torch.tensor([[0, 5, 1], [4, 5, 6]]), Shard(0, 2, 6, None)).tolist()  # experts 0-2 and 3-5
    [[0, 1], [1, 2]]
    """
    ranks_TK = (index_TK // shard.held).sort(dim=1).values
    again_TK = F.pad(ranks_TK[:, 1:] == ranks_TK[:, :-1], (1, 0))
    once_TK = ranks_TK.masked_fill(again_TK, shard.size).sort(dim=1).values
    return once_TK[:, : min(index_TK.shape[1], shard.size)]


def _routed(index_TK: Tensor, shard: Shard, kernels: Kernels) -> tuple[_Route, int]:
    """The way of this process's tokens, and how many (token, expert) pairs come here."""
    sent = sort_by_expert(destinations(index_TK, shard), shard.size, torch.float32, partial=True)
    tokens_P = sent.groups.ends_E.long().diff(prepend=sent.groups.ends_E.new_zeros(1, dtype=torch.long))
    owners_S = (index_TK // shard.held).reshape(-1)
    pairs_P = torch.zeros(shard.size + 1, dtype=torch.long, device=owners_S.device)
    pairs_P = pairs_P.scatter_add(0, owners_S, torch.ones_like(owners_S))[: shard.size]
    out_P2 = torch.stack([tokens_P, pairs_P], dim=1)
    in_P2 = torch.empty_like(out_P2)
    distributed.all_to_all_single(in_P2, out_P2, group=shard.group)
    tokens_out, tokens_in, pairs_in = torch.stack([out_P2[:, 0], in_P2[:, 0], in_P2[:, 1]]).tolist()
    return _Route(sent.cut(sum(tokens_out)), tokens_out, tokens_in, shard, kernels), sum(pairs_in)


class _ToOwners(torch.autograd.Function):
    """Tokens and their choices to where the experts are; what they make of them has its gradient brought back."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weights_TK: Tensor, index_TK: Tensor, route: _Route
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(R, D), (R, K), (R, K)"""
        ctx.route, ctx.dtype = route, weights_TK.dtype
        tokens_S, choices = route.sent.tokens_S, index_TK.shape[1]
        # In one exchange: a number below 2^24 is exact in fp32.
        wide = torch.promote_types(weights_TK.dtype, torch.float32)
        told_SC = torch.cat([index_TK.to(wide), weights_TK.to(wide)], dim=1)[tokens_S]
        hidden_RD = _exchanged(hidden_TD[tokens_S], route.tokens_out, route.tokens_in, route.shard)
        told_RC = _exchanged(told_SC, route.tokens_out, route.tokens_in, route.shard)
        index_RK, weights_RK = told_RC[:, :choices].long(), told_RC[:, choices:].to(weights_TK.dtype)
        ctx.mark_non_differentiable(index_RK)
        return hidden_RD, weights_RK, index_RK

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Which of the two are wanted is alike in all processes, for they run the same model."""
        route: _Route = ctx.route
        d_hidden = d_weights = None
        if ctx.needs_input_grad[0]:
            d_rows_SD = _exchanged(gradients[0], route.tokens_in, route.tokens_out, route.shard)
            d_hidden = route.kernels.weighted_sum(d_rows_SD, route.sent)
        if ctx.needs_input_grad[1]:
            d_rows_SK = _exchanged(gradients[1], route.tokens_in, route.tokens_out, route.shard)
            d_weights = route.kernels.weighted_sum(d_rows_SK, route.sent)
        return d_hidden, d_weights, None, None


class _FromOwners(torch.autograd.Function):
    """What experts made of tokens back to where the tokens are; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, out_RD: Tensor, route: _Route) -> Tensor:
        """(T, D)"""
        ctx.route = route
        out_SD = _exchanged(out_RD, route.tokens_in, route.tokens_out, route.shard)
        return route.kernels.weighted_sum(out_SD, route.sent)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        route: _Route = ctx.route
        d_out_SD = gradients[0][route.sent.tokens_S]
        return _exchanged(d_out_SD, route.tokens_out, route.tokens_in, route.shard), None


def _exchanged(rows: Tensor, out: list[int], into: list[int], shard: Shard) -> Tensor:
    """Rows for each process, in their order, for rows from each; as bytes: gloo knows not every dtype."""
    found = rows.new_empty(sum(into), *rows.shape[1:])
    distributed.all_to_all_single(
        found.view(torch.uint8), rows.contiguous().view(torch.uint8), into, out, group=shard.group
    )
    return found

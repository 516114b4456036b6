"""Send tokens to experts that other processes hold, and back: expert parallelism below every experts layer.

Each of P processes holds E / P whole experts, process p those from p E / P on (GShard, Lepikhin et al. 2020, arXiv
2006.16668). A token goes once to each process that holds any of its experts, together with the indices and weights of
its choices. That process computes the tokens as its own, with any kernels, and sends back their weighted sums. With K
choices a token is sent at most min(K, P) times instead of K times, as when every (token, expert) pair is sent
(transformers 5.23, `AllToAllEP`): with Qwen3-30B-A3B's 8 choices on 4 processes that is about 3.6 rows per token
(4 (1 - (3/4)^8), experts drawn evenly) instead of 8, and no process keeps a row more than once for its backward.

Rows arrive ordered by sending process and token, so an expert sees its tokens in the same order as in one process with
all of them. Weights are applied where the expert is: for its backward the sender keeps only which row belongs to whom.

All processes must take part in the same number of exchanges, or they wait for each other forever: all run the same
layers the same number of times, forward and backward. A process that gets no token computes a dummy token, so that its
part of the backward runs too. Each layer waits for the device once, to read 4 P counts.

T tokens, K choices, D numbers per token, E experts, M = min(K, P); R tokens arrive.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from llama_stack_provider_moe.compute.moe.kernels.groups import Sorted, sort_by_expert
from llama_stack_provider_moe.compute.moe.kernels.linear import Kernels

_SHARD = "_expert_shard"
# (R, D) tokens, (R, K) experts of this process (their count means none), (R, K) weights, rows in total -> (R, D)
Compute = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Shard:
    """The experts of a layer that one process holds.

    Attributes:
        rank: rank of this process.
        size: number of processes that hold the experts of one layer.
        num_experts: experts of the whole layer; a multiple of `size`.
        group: process group for the exchanges only; gradients are averaged meanwhile, in another group and order.
    """

    rank: int
    size: int
    num_experts: int
    group: distributed.ProcessGroup

    @property
    def experts_each(self) -> int:
        """Experts that each process holds."""
        return self.num_experts // self.size

    @property
    def first(self) -> int:
        """Index of the first expert that this process holds."""
        return self.rank * self.experts_each


def keep_shard(experts: nn.Module, shard: Shard) -> None:
    """Mark `experts` as holding the parameters of only `shard`."""
    experts.__dict__[_SHARD] = shard


def shard_of(experts: nn.Module) -> Shard | None:
    """The part of its experts that a module holds; None: all."""
    shard: Shard | None = experts.__dict__.get(_SHARD)
    return shard


class _Route(NamedTuple):
    """One exchange: the tokens of this process by destination, and how many go to and come from each process."""

    sent: Sorted
    tokens_out: list[int]
    tokens_in: list[int]
    shard: Shard
    kernels: Kernels


class _ToOwnersContext(Protocol):
    route: _Route
    needs_input_grad: tuple[bool, ...]

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


class _FromOwnersContext(Protocol):
    route: _Route


def exchange_tokens(
    shard: Shard, compute: Compute, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, kernels: Kernels
) -> Tensor:
    """Run the tokens of this process through a layer's experts, wherever those are.

    Args:
        shard: the layer's experts in this process.
        compute: the layer with only the experts of this process.
        hidden_TD: tokens.
        index_TK: experts of each token; E means none.
        weights_TK: weight of each of them.
        kernels: kernels that sum the results.

    Returns:
        (T, D): for each token the sum of the results, process by process, in the dtype of `compute`.
    """
    route, rows = _routed(index_TK, shard, kernels)
    hidden_RD, weights_RK, index_RK = _ToOwners.apply(hidden_TD, weights_TK, index_TK, route)
    arrived = hidden_RD.shape[0]
    if not arrived:  # padded, not replaced: the received tensors must stay in the graph
        hidden_RD, weights_RK = F.pad(hidden_RD, (0, 0, 0, 1)), F.pad(weights_RK, (0, 0, 0, 1))
        index_RK = F.pad(index_RK, (0, 0, 0, 1), value=shard.first)
        rows = index_RK.shape[1]
    mine_RK = index_RK - shard.first
    mine_RK = torch.where((mine_RK >= 0) & (mine_RK < shard.experts_each), mine_RK, shard.experts_each)
    out_RD = compute(hidden_RD, mine_RK, weights_RK, rows)
    out_TD: Tensor = _FromOwners.apply(out_RD[:arrived], route)
    return out_TD


def destinations(index_TK: Tensor, shard: Shard) -> Tensor:
    """(T, M): the processes that hold a token's experts, each once, in ascending order; P means none.

    >>> destinations(torch.tensor([[0, 5, 1], [4, 5, 6]]), Shard(0, 2, 6, None)).tolist()  # experts 0-2 and 3-5
    [[0, 1], [1, 2]]
    """
    ranks_TK = (index_TK // shard.experts_each).sort(dim=1).values
    again_TK = F.pad(ranks_TK[:, 1:] == ranks_TK[:, :-1], (1, 0))
    once_TK = ranks_TK.masked_fill(again_TK, shard.size).sort(dim=1).values
    return once_TK[:, : min(index_TK.shape[1], shard.size)]


def _routed(index_TK: Tensor, shard: Shard, kernels: Kernels) -> tuple[_Route, int]:
    """The route of this process's tokens, and the number of (token, expert) pairs that arrive here."""
    sent = sort_by_expert(destinations(index_TK, shard), shard.size, torch.float32, partial=True)
    tokens_P = sent.groups.ends_E.long().diff(prepend=sent.groups.ends_E.new_zeros(1, dtype=torch.long))
    owners_S = (index_TK // shard.experts_each).reshape(-1)
    pairs_P = torch.zeros(shard.size + 1, dtype=torch.long, device=owners_S.device)
    pairs_P = pairs_P.scatter_add(0, owners_S, torch.ones_like(owners_S))[: shard.size]
    out_P2 = torch.stack([tokens_P, pairs_P], dim=1)
    in_P2 = torch.empty_like(out_P2)
    distributed.all_to_all_single(in_P2, out_P2, group=shard.group)
    tokens_out, tokens_in, pairs_in = torch.stack([out_P2[:, 0], in_P2[:, 0], in_P2[:, 1]]).tolist()
    return _Route(sent.cut(sum(tokens_out)), tokens_out, tokens_in, shard, kernels), sum(pairs_in)


class _ToOwners(torch.autograd.Function):
    """Send tokens and their choices to the experts; backward brings the gradients back."""

    @staticmethod
    def forward(
        ctx: _ToOwnersContext, hidden_TD: Tensor, weights_TK: Tensor, index_TK: Tensor, route: _Route
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(R, D), (R, K), (R, K)"""
        ctx.route = route
        tokens_S, choices = route.sent.tokens_S, index_TK.shape[1]
        # Indices and weights go in one exchange: a number below 2^24 is exact in fp32.
        wide = torch.promote_types(weights_TK.dtype, torch.float32)
        choices_SC = torch.cat([index_TK.to(wide), weights_TK.to(wide)], dim=1)[tokens_S]
        hidden_RD = _exchanged(hidden_TD[tokens_S], route.tokens_out, route.tokens_in, route.shard)
        choices_RC = _exchanged(choices_SC, route.tokens_out, route.tokens_in, route.shard)
        index_RK, weights_RK = choices_RC[:, :choices].long(), choices_RC[:, choices:].to(weights_TK.dtype)
        ctx.mark_non_differentiable(index_RK)
        return hidden_RD, weights_RK, index_RK

    @staticmethod
    def backward(ctx: _ToOwnersContext, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """All processes need the same ones of the two gradients, because they run the same model."""
        route = ctx.route
        d_hidden = d_weights = None
        if ctx.needs_input_grad[0]:
            d_rows_SD = _exchanged(gradients[0], route.tokens_in, route.tokens_out, route.shard)
            d_hidden = route.kernels.weighted_sum(d_rows_SD, route.sent)
        if ctx.needs_input_grad[1]:
            d_rows_SK = _exchanged(gradients[1], route.tokens_in, route.tokens_out, route.shard)
            d_weights = route.kernels.weighted_sum(d_rows_SK, route.sent)
        return d_hidden, d_weights, None, None


class _FromOwners(torch.autograd.Function):
    """Send the experts' results back to the tokens' processes; backward sends gradients to the experts."""

    @staticmethod
    def forward(ctx: _FromOwnersContext, out_RD: Tensor, route: _Route) -> Tensor:
        """(T, D)"""
        ctx.route = route
        out_SD = _exchanged(out_RD, route.tokens_in, route.tokens_out, route.shard)
        return route.kernels.weighted_sum(out_SD, route.sent)

    @staticmethod
    def backward(ctx: _FromOwnersContext, *gradients: Tensor) -> tuple[Tensor, None]:
        route = ctx.route
        d_out_SD = gradients[0][route.sent.tokens_S]
        return _exchanged(d_out_SD, route.tokens_out, route.tokens_in, route.shard), None


def _exchanged(rows: Tensor, out: list[int], into: list[int], shard: Shard) -> Tensor:
    """Send rows to each process, in order, and receive rows from each; as bytes, because gloo lacks some dtypes."""
    found = rows.new_empty(sum(into), *rows.shape[1:])
    distributed.all_to_all_single(
        found.view(torch.uint8), rows.contiguous().view(torch.uint8), into, out, group=shard.group
    )
    return found

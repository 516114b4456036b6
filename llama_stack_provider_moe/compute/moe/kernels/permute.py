"""To the experts and back: gather the rows of tokens in expert order, and sum each token's rows again.

Both backward passes are gathers. torch's own backward of an index that may repeat adds row by row (`index_put_`), which
is slow on a CPU and not deterministic on a GPU.
"""

from typing import Protocol

import torch
from torch import Tensor

from llama_stack_provider_moe.compute.moe.kernels.groups import Sorted
from llama_stack_provider_moe.compute.moe.kernels.reference import weighted_sum


def dispatch(hidden_TD: Tensor, found: Sorted) -> Tensor:
    """(S, D): for each row the vector of its token; padding rows hold that of any token."""
    rows: Tensor = _Dispatch.apply(hidden_TD, found)
    return rows


def combine(rows_SD: Tensor, weights_TK: Tensor, found: Sorted) -> Tensor:
    """(T, D): for each token the weighted sum of its rows, in the order of its choices; in the wider dtype."""
    summed: Tensor = _Combine.apply(rows_SD, weights_TK, found)
    return summed


class _DispatchContext(Protocol):
    found: Sorted


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _DispatchContext, hidden_TD: Tensor, found: Sorted) -> Tensor:
        ctx.found = found
        return hidden_TD[found.tokens_S]

    @staticmethod
    def backward(ctx: _DispatchContext, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.found.of_choices(gradients[0]).sum(dim=1), None


class _CombineContext(Protocol):
    found: Sorted
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, Tensor]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _CombineContext, rows_SD: Tensor, weights_TK: Tensor, found: Sorted) -> Tensor:
        ctx.save_for_backward(rows_SD, weights_TK)
        ctx.found = found
        return weighted_sum(rows_SD, found, weights_TK)

    @staticmethod
    def backward(ctx: _CombineContext, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_SD, weights_TK = ctx.saved_tensors
        found: Sorted = ctx.found
        d_rows = d_weights = None
        d_out_SD = gradients[0][found.tokens_S]
        if ctx.needs_input_grad[1]:
            d_weight_S = (rows_SD * d_out_SD).sum(dim=-1, keepdim=True)
            d_weights = found.of_choices(d_weight_S).squeeze(-1).to(weights_TK.dtype)
        if ctx.needs_input_grad[0]:
            d_rows = (d_out_SD * found.of_rows(weights_TK).unsqueeze(-1)).to(rows_SD.dtype)
        return d_rows, d_weights, None

"""To the experts and back: tokens' rows sorted by expert, and each token's rows summed again.

Both backwards are gathers. torch's own, of an index that may repeat, adds up row after row (`index_put_`), which is
slow on a CPU and, on a GPU, not the same every time.
"""

from typing import Any

import torch
from torch import Tensor

from llama_stack_provider_moe.experts.kernels.groups import Sorted
from llama_stack_provider_moe.experts.kernels.reference import weighted_sum


def dispatch(hidden_TD: Tensor, found: Sorted) -> Tensor:
    """(S, D): each row its token's; rows that fill up hold any token's."""
    rows: Tensor = _Dispatch.apply(hidden_TD, found)
    return rows


def combine(rows_SD: Tensor, weights_TK: Tensor, found: Sorted) -> Tensor:
    """(T, D): of each token the weighted sum of its rows, in the order of its choices; in the wider of both dtypes."""
    summed: Tensor = _Combine.apply(rows_SD, weights_TK, found)
    return summed


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, found: Sorted) -> Tensor:
        ctx.found = found
        return hidden_TD[found.tokens_S]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.found.of_choices(gradients[0]).sum(dim=1), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, weights_TK: Tensor, found: Sorted) -> Tensor:
        ctx.save_for_backward(rows_SD, weights_TK)
        ctx.found = found
        return weighted_sum(rows_SD, found, weights_TK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
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

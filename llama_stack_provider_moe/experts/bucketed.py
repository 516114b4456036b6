"""Experts on a CPU in half precision: matrix products of few shapes, for there a new shape costs more than the product.

oneDNN, which computes torch's bf16 products, generates code for each shape. How many rows an expert gets differs from
step to step, so nearly every product of a grouped or eager forward is of a new shape: on the machine where this was
found (AMX, torch 2.15) one of 576 x 3072 took 75 to 140 ms when its shape was new, and 1 to 2 ms when it was not.
Rows are therefore filled up with zeros to one of few counts, `bucket`; what zeros give is cut off again. LoRA
on experts is added as thin products, see `split_lora`.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from llama_stack_provider_moe.experts.split_lora import take_lora

BUCKETED: Literal["bucketed_mm"] = "bucketed_mm"
SMALLEST = 16  # rows; oneDNN's tiles hold as many


def bucket(rows: int) -> int:
    """`rows` rounded up to a multiple of about an eighth to a quarter of it: at most four sizes between powers of two.

    >>> [bucket(rows) for rows in (1, 16, 17, 100, 129, 300)]
    [16, 16, 32, 112, 160, 320]
    """
    granule = max(SMALLEST, 1 << max(rows.bit_length() - 3, 0))
    return -(-rows // granule) * granule


def bucketed_experts(experts: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The forward of an experts module of transformers, of any layout that its `grouped_mm` takes.

    Args:
        experts: the module; its weights (E, out, in), or (E, in, out) where it is transposed.
        hidden_TD: tokens.
        index_TK: of each token, the experts it goes to.
        weights_TK: and how much each of them counts.

    Returns:
        (T, D), in the dtype of `hidden_TD`.
    """
    top_k = index_TK.shape[1]
    order_S = torch.argsort(index_TK.reshape(-1), stable=True)
    counts_E: list[int] = torch.bincount(index_TK.reshape(-1), minlength=experts.num_experts).tolist()
    sorted_SD = hidden_TD[order_S // top_k]
    inner_SI = _grouped(sorted_SD, counts_E, _weights(experts, "gate_up_proj" if experts.has_gate else "up_proj"))
    inner_SI = experts._apply_gate(inner_SI) if experts.has_gate else experts.act_fn(inner_SI)
    out_SD = _grouped(inner_SI, counts_E, _weights(experts, "down_proj"))
    if experts.has_post_expert_norm:
        out_SD = experts.post_expert_norm(out_SD)
    out_SD = out_SD * weights_TK.reshape(-1)[order_S].unsqueeze(-1)
    # Back into the tokens' order, and summed in it: unlike `index_add_` the same every time.
    out_TKD = out_SD[torch.argsort(order_S)].view(*index_TK.shape, -1)
    return out_TKD.sum(dim=1).to(hidden_TD.dtype)


class _Weights(NamedTuple):
    """Of all experts: W (E, O, I), its bias (E, O), and LoRA's A (E, R, I) and B (E, O, R), B scaled."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None


def _weights(experts: Any, name: str) -> _Weights:
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    weight = getattr(experts, name)  # taken once: where PEFT folds LoRA into it, it does so at each look
    left, right = take_lora(experts, name) or (None, None)
    if not experts.is_transposed:
        return _Weights(weight, bias, right, left)
    lora_a, lora_b = (None if part is None else part.transpose(1, 2) for part in (left, right))
    return _Weights(weight.transpose(1, 2), bias, lora_a, lora_b)


def _grouped(rows_SI: Tensor, counts_E: list[int], of: _Weights) -> Tensor:
    """Each expert's weight times its rows, which lie one expert after the other."""
    # `unbind`, not `weight[e]`: its gradient is one stack, not a whole tensor of zeros for each expert.
    parts = [[None] * len(counts_E) if part is None else part.unbind() for part in of]
    pieces = []
    for rows, weight, bias, lora_a, lora_b in zip(
        torch.split(rows_SI.to(of.weight.dtype), counts_E), *parts, strict=True
    ):
        count = rows.shape[0]
        if count:
            filled = F.pad(rows, (0, 0, 0, bucket(count) - count))
            product = F.linear(filled, weight, bias)
            if lora_a is not None:
                product = product + F.linear(F.linear(filled, lora_a), lora_b)
            pieces.append(product[:count])
    return torch.cat(pieces)


ALL_EXPERTS_FUNCTIONS.register(BUCKETED, bucketed_experts)

"""One linear layer per expert, with LoRA beside its weight (Hu et al. 2021, arXiv 2106.09685, section 4.1).

PEFT (0.21) folds W + B A of every expert in each forward, and its backward computes a gradient as large as W to derive
those of A and B. Here the forward is x W^T + (x A^T) B^T, two thin products beside that of the weight, and the backward
computes a gradient of W only if W trains. In half precision the fold also loses everything smaller than half of W's
last digit, which is most of an update early in training.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from llama_stack_provider_moe.compute.moe.kernels import reference
from llama_stack_provider_moe.compute.moe.kernels.drop import Drop, scale_of
from llama_stack_provider_moe.compute.moe.kernels.groups import Groups, Sorted
from llama_stack_provider_moe.compute.moe.kernels.reference import Activation, Stored


class Kernels(Protocol):
    """The ragged products: `reference` in plain torch, `grouped` in Triton."""

    @property
    def WIDEST_RANK(self) -> int:
        """Largest rank of LoRA that runs in one pass with the base."""
        ...

    def product(
        self,
        rows_SI: Tensor,
        weight: Tensor | Stored,
        groups: Groups,
        first_ERI: Tensor | None = None,
        second_EOR: Tensor | None = None,
        bias_EO: Tensor | None = None,
        *,
        flip: bool = False,
        index_S: Tensor | None = None,
        drop: Drop | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `reference.product`."""
        ...

    def rows_by_rows(
        self,
        left_SO: Tensor,
        right_SI: Tensor,
        groups: Groups,
        *,
        left_index_S: Tensor | None = None,
        right_index_S: Tensor | None = None,
        drop: Drop | None = None,
    ) -> Tensor:
        """See `reference.rows_by_rows`."""
        ...

    def gated(self, inner_SJ: Tensor, activation: Activation, drop: Drop | None = None) -> Tensor:
        """See `reference.gated`."""
        ...

    def gated_backward(
        self,
        inner_SJ: Tensor,
        activation: Activation,
        d_inner_SI: Tensor,
        weight_S: Tensor,
        drop: Drop | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `reference.gated_backward`."""
        ...

    def weighted_sum(self, rows_SD: Tensor, found: Sorted, weights_TK: Tensor | None = None) -> Tensor:
        """See `reference.weighted_sum`."""
        ...


class Lora(NamedTuple):
    """Factors of the updates B A of all experts; B includes the scale. `dropout`: dropped share of the input."""

    a_ERI: Tensor
    b_EOR: Tensor
    dropout: float = 0.0

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B as kernels take them; B has the scale of dropout, so that masks need none."""
        b_EOR = self.b_EOR * scale_of(self.dropout) if self.dropout else self.b_EOR
        # PEFT stores B with the experts innermost, so every product would copy its matrix.
        return self.a_ERI.to(dtype).contiguous(), b_EOR.to(dtype).contiguous()


def grouped_linear(
    rows_SI: Tensor,
    weight: Tensor | Stored,
    groups: Groups,
    bias_EO: Tensor | None = None,
    lora: Lora | None = None,
    kernels: Kernels = reference,
    drop: Drop | None = None,
) -> Tensor:
    """x W_e^T + b_e + (drop(x) A_e^T) B_e^T, where e is the expert of each row.

    Computed in the weight's dtype; autocast has no effect inside.

    Args:
        rows_SI: rows sorted by expert.
        weight: (E, O, I) with any strides, or a stored form, which can't train.
        groups: which rows belong to which expert.
        bias_EO: bias of each expert.
        lora: update of each expert; None: no LoRA.
        kernels: kernels that compute the products.
        drop: dropout on the input of `lora`, of its share; None if that is 0.

    Returns:
        (S, O), in the weight's dtype.
    """
    rows_SI = rows_SI.to(weight.dtype)
    asked = 0.0 if lora is None else lora.dropout
    assert asked == (0.0 if drop is None else drop.share), "LoRA's dropout and its mask differ"
    a_ERI, b_EOR = (None, None) if lora is None else lora.factors(weight.dtype)
    tensor, stored = (weight, None) if isinstance(weight, Tensor) else (None, weight)
    out: Tensor = _Product.apply(rows_SI, tensor, bias_EO, a_ERI, b_EOR, stored, groups, kernels, drop)
    return out


class _Context(Protocol):
    groups: Groups
    kernels: Kernels
    stored: Stored | None
    drop: Drop | None
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Any, ...]  # Tensor or None, by position

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _Product(torch.autograd.Function):
    """Saves the rows and x A^T, which is all that backward needs beside the weights."""

    @staticmethod
    def forward(
        ctx: _Context,
        rows_SI: Tensor,
        weight_EOI: Tensor | None,
        bias_EO: Tensor | None,
        a_ERI: Tensor | None,
        b_EOR: Tensor | None,
        stored: Stored | None,
        groups: Groups,
        kernels: Kernels,
        drop: Drop | None,
    ) -> Tensor:
        """(S, O)"""
        weight = stored if weight_EOI is None else weight_EOI
        assert weight is not None
        with torch.autocast(rows_SI.device.type, enabled=False):
            out_SO, low_SR = kernels.product(rows_SI, weight, groups, a_ERI, b_EOR, bias_EO, drop=drop)
        needs_rows = a_ERI is not None or ctx.needs_input_grad[1]
        ctx.save_for_backward(rows_SI if needs_rows else None, weight_EOI, bias_EO, a_ERI, b_EOR, low_SR)
        ctx.stored, ctx.groups, ctx.kernels, ctx.drop = stored, groups, kernels, drop
        return out_SO

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs that need one, None for all others."""
        rows_SI, weight_EOI, bias_EO, a_ERI, b_EOR, low_SR = ctx.saved_tensors
        groups, kernels = ctx.groups, ctx.kernels
        weight = ctx.stored if weight_EOI is None else weight_EOI
        assert weight is not None
        d_out_SO = gradients[0].to(weight.dtype).contiguous()
        d_rows = d_weight = d_bias = d_a = d_b = None
        d_low_SR: Any = None
        needs_rows, needs_weight, needs_bias, needs_a, needs_b, *_ = ctx.needs_input_grad
        with torch.autocast(d_out_SO.device.type, enabled=False):
            turned: Any = (None, None) if a_ERI is None else (b_EOR.mT, a_ERI.mT)
            if needs_rows:
                d_rows, d_low_SR = kernels.product(d_out_SO, weight, groups, *turned, flip=True, drop=ctx.drop)
            elif needs_a:
                d_low_SR, _ = kernels.product(d_out_SO, turned[0], groups)
            if needs_weight:
                d_weight = kernels.rows_by_rows(d_out_SO, rows_SI, groups)
            if needs_bias:
                d_bias = reference.sums_of_rows(d_out_SO, groups, kernels.rows_by_rows).to(bias_EO.dtype)
            if needs_b:
                d_b = kernels.rows_by_rows(d_out_SO, low_SR, groups)
            if needs_a:
                d_a = kernels.rows_by_rows(d_low_SR, rows_SI, groups, drop=ctx.drop)
        return d_rows, d_weight, d_bias, d_a, d_b, None, None, None, None

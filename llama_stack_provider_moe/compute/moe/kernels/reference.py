"""The ragged products in plain torch: one matrix product per expert, or torch's grouped product where available."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_stack_provider_moe.compute.moe.kernels.drop import Drop
from llama_stack_provider_moe.compute.moe.kernels.groups import Groups, Sorted

WIDEST_RANK = sys.maxsize  # largest rank of LoRA in one pass with the base
_ONE_PASS = (torch.float32, torch.float64)  # sums of other dtypes are rounded more than once there
ALIGNED = 8  # elements: `F.grouped_mm` needs strides of 16 bytes

ActivationKind = Literal["silu", "clamped", "other"]


@dataclass(frozen=True)
class Activation:
    """The activation between an expert's two projections.

    It turns the output of the up projection (S, J) into (S, I); J is 2 I if there is a gate.

    Attributes:
        function: the model's own function; it has no randomness and no parameters, because backward runs it again.
        kind: the formula of `function`. silu: silu(gate) * up, with the gate in the first half (SwiGLU, Shazeer 2020,
            arXiv 2002.05202). clamped: gpt-oss's (clamp(up) + 1) * gate' * sigmoid(alpha gate') with
            gate' = min(gate, limit), gate and up interleaved (arXiv 2508.10925). other: no kernel has it.
        alpha: alpha of clamped.
        limit: limit of clamped.
    """

    function: Callable[[Tensor], Tensor]
    kind: ActivationKind = "other"
    alpha: float = 0.0
    limit: float = 0.0


class Stored(Protocol):
    """Weights (E, O, I) in another form, decoded where they are needed and never kept decoded."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def expert(self, number: int) -> Tensor:
        """(O, I) for one expert."""
        ...

    def whole(self) -> Tensor:
        """(E, O, I)"""
        ...


def times_weights(
    rows_SI: Tensor, weight: Tensor | Stored, groups: Groups, *, flip: bool = False, onto: Tensor | None = None
) -> Tensor:
    """Multiply each row by the weight of its expert: row_I W_e^T.

    Args:
        rows_SI: rows in the dtype of the weights.
        weight: (E, O, I).
        groups: which rows belong to which expert.
        flip: multiply by W_e instead: rows are (S, O), the result is (S, I).
        onto: (S, O): add the products to it, in place.

    Returns:
        (S, O); zeros in rows of no expert.

    >>> weight = torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]]])  # two experts, each from two numbers to one
    >>> rows = torch.tensor([[1.0, 1.0], [4.0, 5.0]])
    >>> times_weights(rows, weight, Groups(torch.tensor([1, 2]))).tolist()
    [[2.0], [15.0]]
    """
    if _can_group(rows_SI):
        matrices = weight if isinstance(weight, Tensor) else weight.whole()
        out = _grouped(rows_SI, matrices if flip else matrices.transpose(1, 2), groups)
        return out if onto is None else onto.add_(out)
    matrix_of = _matrices(weight, flip)
    out_SO = _room(rows_SI, weight.shape[2 if flip else 1], groups) if onto is None else onto
    for (expert, _, _), rows, out in zip(groups.spans, groups.parts(rows_SI), groups.parts(out_SO), strict=True):
        if onto is None:
            torch.mm(rows, matrix_of(expert), out=out)
        else:
            out.addmm_(rows, matrix_of(expert))
    return out_SO


def product(
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
    """x W_e^T + (x F_e^T) G_e^T + b_e, and the thin x F_e^T that a gradient of G needs.

    Args:
        rows_SI: rows sorted by expert, in the dtype of the weights.
        weight: (E, O, I).
        groups: which rows belong to which expert.
        first_ERI: F; None: no thin product.
        second_EOR: G; None if F is None.
        bias_EO: b.
        flip: use W_e instead of W_e^T: rows are (S, O), and F and G are (E, R, O) and (E, I, R).
        index_S: index into `rows_SI` for each row; `rows_SI` then holds unsorted tokens, each read several times.
        drop: dropout, unscaled, on LoRA's side of (S, I): on the x of x F_e^T, or with `flip` on what G adds.

    Returns:
        (S, O) and (S, R); with `flip` (S, I) and (S, R).
    """
    rows_SI = _gathered(rows_SI, index_S)
    alone = bias_EO is None and drop is None and not _can_group(rows_SI)
    if alone and first_ERI is not None and second_EOR is not None:
        return _both(rows_SI, weight, groups, first_ERI, second_EOR, flip)
    out_SO = times_weights(rows_SI, weight, groups, flip=flip)
    return with_bias_and_lora(rows_SI, out_SO, groups, first_ERI, second_EOR, bias_EO, flip=flip, drop=drop)


def with_bias_and_lora(
    rows_SI: Tensor,
    out_SO: Tensor,
    groups: Groups,
    first_ERI: Tensor | None,
    second_EOR: Tensor | None,
    bias_EO: Tensor | None,
    *,
    flip: bool,
    drop: Drop | None,
) -> tuple[Tensor, Tensor | None]:
    """Add to `out_SO`, the product with the weights, all else that `product` has; arguments and results are its own."""
    if bias_EO is not None:
        out_SO += bias_EO.to(out_SO.dtype)[experts_of_rows(groups, out_SO.shape[0])]
    if first_ERI is None or second_EOR is None:
        return out_SO, None
    low_SR = times_weights(rows_SI if drop is None or flip else drop.of(rows_SI), first_ERI, groups)
    if drop is None or not flip:
        times_weights(low_SR, second_EOR, groups, onto=out_SO)
    else:
        out_SO += drop.of(times_weights(low_SR, second_EOR, groups))
    return out_SO, low_SR


def _both(
    rows_SI: Tensor, weight: Tensor | Stored, groups: Groups, first_ERI: Tensor, second_EOR: Tensor, flip: bool
) -> tuple[Tensor, Tensor]:
    """`product`, one expert after the other: its rows are still in the processor's cache for the thin products."""
    out_SO = _room(rows_SI, weight.shape[2 if flip else 1], groups)
    low_SR = _room(rows_SI, first_ERI.shape[1], groups)
    matrix_of, first_of, second_of = _matrices(weight, flip), _matrices(first_ERI), _matrices(second_EOR)
    parts = (groups.parts(each) for each in (rows_SI, out_SO, low_SR))
    for (expert, _, _), rows, out, low in zip(groups.spans, *parts, strict=True):
        torch.mm(rows, matrix_of(expert), out=out)
        torch.mm(rows, first_of(expert), out=low)
        out.addmm_(low, second_of(expert))
    return out_SO, low_SR


def rows_by_rows(
    left_SO: Tensor,
    right_SI: Tensor,
    groups: Groups,
    *,
    left_index_S: Tensor | None = None,
    right_index_S: Tensor | None = None,
    drop: Drop | None = None,
) -> Tensor:
    """For each expert the sum over its rows of left_O right_I^T, as in the gradient of a weight.

    Args:
        left_SO: left rows.
        right_SI: right rows.
        groups: which rows belong to which expert.
        left_index_S: index into `left_SO` for each row, as in `product`.
        right_index_S: index into `right_SI` for each row.
        drop: dropout, unscaled, on the right rows.

    Returns:
        (E, O, I); zeros for an expert without rows.
    """
    left_SO, right_SI = _gathered(left_SO, left_index_S), _gathered(right_SI, right_index_S)
    right_SI = right_SI if drop is None else drop.of(right_SI)
    shape = (groups.ends_E.shape[0], left_SO.shape[1], right_SI.shape[1])
    if _can_group(left_SO):
        return _grouped_outer(left_SO, right_SI, groups)
    every = len(groups.spans) == shape[0]
    out_EOI = (left_SO.new_empty if every else left_SO.new_zeros)(shape)
    outs = out_EOI.unbind()
    for (expert, _, _), left, right in zip(groups.spans, groups.parts(left_SO), groups.parts(right_SI), strict=True):
        torch.mm(left.T, right, out=outs[expert])
    return out_EOI


def sums_of_rows(
    rows_SO: Tensor, groups: Groups, outer: Callable[[Tensor, Tensor, Groups], Tensor] = rows_by_rows
) -> Tensor:
    """For each expert the sum of its rows, (E, O), computed by `outer`, as in the gradient of a bias."""
    return outer(rows_SO, rows_SO.new_ones(rows_SO.shape[0], 1), groups)[:, :, 0]


def weighted_sum(rows_SD: Tensor, found: Sorted, weights_TK: Tensor | None = None) -> Tensor:
    """(T, D): for each token the sum of its rows in the order of its choices, each times its weight (None: 1).

    The result has the wider dtype of rows and weights.
    """
    if _sums_in_one_pass(rows_SD, found, weights_TK):
        return F.embedding_bag(found.places_TK, rows_SD, mode="sum", per_sample_weights=weights_TK)
    rows_TKD = found.of_choices(rows_SD)
    return (rows_TKD if weights_TK is None else rows_TKD * weights_TK.unsqueeze(-1)).sum(dim=1)


def gated(inner_SJ: Tensor, activation: Activation, drop: Drop | None = None) -> Tensor:
    """(S, I): `activation` applied to the up projection's output (S, J), and dropout."""
    if activation.kind == "silu" and not inner_SJ.requires_grad:
        gate_SI, up_SI = inner_SJ.chunk(2, dim=-1)
        inner_SI = F.silu(gate_SI).mul_(up_SI)
    else:
        inner_SI = activation.function(inner_SJ)
    return inner_SI if drop is None else drop.of(inner_SI) * drop.scale


def gated_backward(
    inner_SJ: Tensor, activation: Activation, d_inner_SI: Tensor, weight_S: Tensor, drop: Drop | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `weight * gated(inner)`.

    Args:
        inner_SJ: output of the up projection.
        activation: the function between the projections.
        d_inner_SI: gradient of `weight * gated(inner)`.
        weight_S: weight of each row.
        drop: dropout of `gated`.

    Returns:
        Gradient of `inner_SJ`; `weight * gated(inner)`, (S, I), recomputed; gradient of `weight_S`.
    """
    if activation.kind == "silu" and drop is None:
        return _silu_backward(inner_SJ, d_inner_SI, weight_S)
    with torch.enable_grad():
        leaf_SJ = inner_SJ.detach().requires_grad_()
        inner_SI = activation.function(leaf_SJ)
    weight_S1 = weight_S.to(inner_SI.dtype).unsqueeze(-1)
    if drop is not None:  # one mask for both
        dropped_SI = ~drop.keep(d_inner_SI.shape[1])
        d_inner_SI = d_inner_SI.masked_fill(dropped_SI, 0) * drop.scale
    (d_inner_SJ,) = torch.autograd.grad(inner_SI, leaf_SJ, d_inner_SI * weight_S1)
    inner_SI = inner_SI.detach()
    if drop is not None:
        # The scale is in the gradient already, and <scale g, d> = <g, scale d>.
        dots_S = _row_dots(inner_SI, d_inner_SI)
        return d_inner_SJ, inner_SI.masked_fill(dropped_SI, 0) * drop.scale * weight_S1, dots_S
    return d_inner_SJ, inner_SI * weight_S1, _row_dots(inner_SI, d_inner_SI)


def _silu_backward(inner_SJ: Tensor, d_inner_SI: Tensor, weight_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_backward` of silu(gate) * up, each number read and written as few times as torch allows."""
    weight_S1 = weight_S.to(inner_SJ.dtype).unsqueeze(-1)
    d_inner_SJ = torch.empty_like(inner_SJ)
    (gate_SI, up_SI), (d_gate_SI, d_up_SI) = inner_SJ.chunk(2, dim=-1), d_inner_SJ.chunk(2, dim=-1)
    silu_SI = F.silu(gate_SI)
    made_SI = silu_SI * up_SI
    dots_S = _row_dots(made_SI, d_inner_SI)
    weighted_SI = d_inner_SI * weight_S1
    torch.mul(weighted_SI, silu_SI, out=d_up_SI)
    weighted_SI.mul_(up_SI)
    torch.ops.aten.silu_backward.grad_input(weighted_SI, gate_SI, grad_input=d_gate_SI)
    return d_inner_SJ, made_SI.mul_(weight_S1), dots_S


def _row_dots(left: Tensor, right: Tensor) -> Tensor:
    """(S,): for each row the sum of the products, in fp32 or wider."""
    wide = torch.promote_types(left.dtype, torch.float32)
    dots: Tensor = torch.linalg.vecdot(left.to(wide), right.to(wide))
    return dots


def _gathered(rows: Tensor, index_S: Tensor | None) -> Tensor:
    return rows if index_S is None else rows.index_select(0, index_S)


def _matrices(weight: Tensor | Stored, flip: bool = False) -> Callable[[int], Tensor]:
    """From an expert to W_e^T, or with `flip` to W_e."""
    if isinstance(weight, Tensor):
        return (weight if flip else weight.mT).unbind().__getitem__
    return weight.expert if flip else lambda expert: weight.expert(expert).T


def _sums_in_one_pass(rows: Tensor, found: Sorted, weights: Tensor | None) -> bool:
    """Whether torch gathers, weights and adds rows in one pass, without a copy of each: on a CPU, in one dtype."""
    return (
        rows.device.type == "cpu"
        and rows.dtype in _ONE_PASS
        and not found.some_without_row
        and (weights is None or weights.dtype == rows.dtype)
    )


def experts_of_rows(groups: Groups, rows: int) -> Tensor:
    """(S,): the expert of each row; the last expert for rows of no expert."""
    places = torch.arange(rows, device=groups.ends_E.device, dtype=torch.int32)
    return torch.searchsorted(groups.ends_E, places, right=True).clamp_(max=groups.ends_E.shape[0] - 1)


def _room(rows: Tensor, width: int, groups: Groups) -> Tensor:
    """Memory for the result of each row; zeros if some rows belong to no expert."""
    reached = not groups.partial and bool(groups.spans)
    return (rows.new_empty if reached else rows.new_zeros)(rows.shape[0], width)


def _can_group(rows: Tensor) -> bool:
    return rows.is_cuda and rows.dtype == torch.bfloat16


def _grouped(rows_SK: Tensor, matrices_EKN: Tensor, groups: Groups) -> Tensor:
    """`F.grouped_mm`, which needs strides that are multiples of 16 bytes."""
    outputs = matrices_EKN.shape[2]
    out = F.grouped_mm(filled(rows_SK, 1), filled(filled(matrices_EKN, 1), 2), offs=groups.ends_E)[:, :outputs]
    return without_strays(out, groups)


def _grouped_outer(left_SO: Tensor, right_SI: Tensor, groups: Groups) -> Tensor:
    shape = left_SO.shape[1], right_SI.shape[1]
    if groups.partial:
        left_SO, right_SI = without_strays(left_SO, groups), without_strays(right_SI, groups)
    out = F.grouped_mm(filled(left_SO, 1).T, filled(right_SI, 1), offs=groups.ends_E)
    return out[:, : shape[0], : shape[1]]


def without_strays(rows: Tensor, groups: Groups) -> Tensor:
    """Zeros in the rows after the last end, which grouped products don't write."""
    if not groups.partial:
        return rows
    places = torch.arange(rows.shape[0], device=rows.device)
    return rows.masked_fill((places >= groups.ends_E[-1]).unsqueeze(1), 0)


def filled(matrix: Tensor, axis: int) -> Tensor:
    """Pad with zeros to a multiple of `ALIGNED` along `axis`."""
    missing = -matrix.shape[axis] % ALIGNED
    if not missing:
        return matrix
    return F.pad(matrix, [0, 0] * (matrix.dim() - 1 - axis) + [0, missing])

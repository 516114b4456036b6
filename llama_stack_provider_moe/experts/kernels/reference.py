"""The ragged products in plain torch: one matrix product an expert, or torch's own grouped one where it can."""

import sys
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_stack_provider_moe.experts.kernels.gate import Gate
from llama_stack_provider_moe.experts.kernels.groups import Groups, Sorted

WIDEST_RANK = sys.maxsize  # of LoRA in one pass with the base
ALIGNED = 8  # elements: `F.grouped_mm` wants strides of 16 bytes


class Stored(Protocol):
    """Weights (E, O, I) that are kept in another form and decoded where they are needed, never kept decoded."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def expert(self, number: int) -> Tensor:
        """(O, I) of one expert."""
        ...

    def whole(self) -> Tensor:
        """(E, O, I)"""
        ...


def times_weights(
    rows_SI: Tensor, weight: Tensor | Stored, groups: Groups, *, flip: bool = False, onto: Tensor | None = None
) -> Tensor:
    """Each row times its own expert's weight: row_I W_e^T.

    Args:
        rows_SI: in the dtype of the weights.
        weight: (E, O, I).
        flip: times W_e instead: rows are (S, O), what comes out is (S, I).
        onto: (S, O): the products are added to it, in place.

    Returns:
        (S, O); zeros in rows of no expert.

    >>> weight = torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]]])  # two experts, from two numbers to one
    >>> rows = torch.tensor([[1.0, 1.0], [4.0, 5.0]])
    >>> times_weights(rows, weight, Groups(torch.tensor([1, 2]))).tolist()
    [[2.0], [15.0]]
    """
    if _can_group(rows_SI):
        matrices = weight if isinstance(weight, Tensor) else weight.whole()
        out = _grouped(rows_SI, matrices if flip else matrices.transpose(1, 2), groups)
        return out if onto is None else onto.add_(out)
    out_SO = onto
    for expert, begin, end in groups.spans:
        matrix = weight[expert] if isinstance(weight, Tensor) else weight.expert(expert)
        matrix = matrix if flip else matrix.T
        if out_SO is None:
            out_SO = _room(rows_SI, matrix.shape[1], groups)
        if onto is None:
            torch.mm(rows_SI[begin:end], matrix, out=out_SO[begin:end])
        else:
            out_SO[begin:end].addmm_(rows_SI[begin:end], matrix)
    if out_SO is None:  # no rows at all
        matrix = weight[0] if isinstance(weight, Tensor) else weight.expert(0)
        out_SO = _room(rows_SI, matrix.shape[1 if flip else 0], groups)
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
) -> tuple[Tensor, Tensor | None]:
    """x W_e^T + (x F_e^T) G_e^T + b_e, and the thin x F_e^T that a gradient of G needs.

    Args:
        rows_SI: sorted by expert, in the dtype of the weights.
        weight: (E, O, I).
        first_ERI: F; None: no thin product.
        second_EOR: G, beside F.
        bias_EO: b.
        flip: W_e in the place of W_e^T, so that rows are (S, O), and F and G are (E, R, O) and (E, I, R).
        index_S: the row of `rows_SI` that stands for each row: tokens, unsorted, of which one is read several times.

    Returns:
        (S, O) and (S, R); with `flip` (S, I) and (S, R).
    """
    rows_SI = _gathered(rows_SI, index_S)
    out_SO = times_weights(rows_SI, weight, groups, flip=flip)
    if bias_EO is not None:
        out_SO += bias_EO.to(out_SO.dtype)[experts_of_rows(groups, out_SO.shape[0])]
    if first_ERI is None or second_EOR is None:
        return out_SO, None
    low_SR = times_weights(rows_SI, first_ERI, groups)
    times_weights(low_SR, second_EOR, groups, onto=out_SO)
    return out_SO, low_SR


def rows_by_rows(
    left_SO: Tensor,
    right_SI: Tensor,
    groups: Groups,
    *,
    left_index_S: Tensor | None = None,
    right_index_S: Tensor | None = None,
) -> Tensor:
    """Of each expert the sum over its rows of left_O right_I^T: what a weight's gradient is.

    Args:
        left_index_S: the row of `left_SO` that stands for each row, as in `product`.
        right_index_S: of `right_SI`.

    Returns:
        (E, O, I); zeros for an expert without rows.
    """
    left_SO, right_SI = _gathered(left_SO, left_index_S), _gathered(right_SI, right_index_S)
    shape = (groups.ends_E.shape[0], left_SO.shape[1], right_SI.shape[1])
    if _can_group(left_SO):
        return _grouped_outer(left_SO, right_SI, groups)
    out_EOI = left_SO.new_empty(shape)
    left_out = set(range(shape[0]))
    for expert, begin, end in groups.spans:
        torch.mm(left_SO[begin:end].T, right_SI[begin:end], out=out_EOI[expert])
        left_out.remove(expert)
    for expert in left_out:
        out_EOI[expert].zero_()
    return out_EOI


def sums_of_rows(
    rows_SO: Tensor, groups: Groups, outer: Callable[[Tensor, Tensor, Groups], Tensor] = rows_by_rows
) -> Tensor:
    """Of each expert the sum of its rows, (E, O), by `outer`: what a bias's gradient is."""
    return outer(rows_SO, rows_SO.new_ones(rows_SO.shape[0], 1), groups)[:, :, 0]


def weighted_sum(rows_SD: Tensor, found: Sorted, weights_TK: Tensor | None = None) -> Tensor:
    """(T, D): of each token the sum of its rows in the order of its choices, each times its weight (None: 1).

    In the wider dtype of rows and weights.
    """
    rows_TKD = found.of_choices(rows_SD)
    return (rows_TKD if weights_TK is None else rows_TKD * weights_TK.unsqueeze(-1)).sum(dim=1)


def gated(inner_SJ: Tensor, gate: Gate) -> Tensor:
    """(S, I): what `gate` makes of the up projection's (S, J)."""
    return gate.function(inner_SJ)


def gated_backward(inner_SJ: Tensor, gate: Gate, d_inner_SI: Tensor, weight_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `weight * gated(inner)`, from the gradient of what comes out, before its weight.

    Args:
        inner_SJ: what the up projection gave.
        d_inner_SI: gradient of `weight * gated(inner)`.
        weight_S: of each row.

    Returns:
        Gradient of `inner_SJ`; `weight * gated(inner)`, (S, I), which is computed again; gradient of `weight_S`.
    """
    with torch.enable_grad():
        leaf_SJ = inner_SJ.detach().requires_grad_()
        inner_SI = gate.function(leaf_SJ)
    weight_S1 = weight_S.to(inner_SI.dtype).unsqueeze(-1)
    (d_inner_SJ,) = torch.autograd.grad(inner_SI, leaf_SJ, d_inner_SI * weight_S1)
    inner_SI = inner_SI.detach()
    return d_inner_SJ, inner_SI * weight_S1, _row_dots(inner_SI, d_inner_SI)


def _row_dots(left: Tensor, right: Tensor) -> Tensor:
    """(S,): of each row the sum of the products; in fp32 where they are narrower."""
    wide = torch.promote_types(left.dtype, torch.float32)
    dots: Tensor = torch.linalg.vecdot(left.to(wide), right.to(wide))
    return dots


def _gathered(rows: Tensor, index_S: Tensor | None) -> Tensor:
    return rows if index_S is None else rows[index_S]


def experts_of_rows(groups: Groups, rows: int) -> Tensor:
    """(S,): the expert of each row; the last one for rows of none."""
    places = torch.arange(rows, device=groups.ends_E.device, dtype=torch.int32)
    return torch.searchsorted(groups.ends_E, places, right=True).clamp_(max=groups.ends_E.shape[0] - 1)


def _room(rows: Tensor, width: int, groups: Groups) -> Tensor:
    """For one row each; zeros where some of them are of no expert."""
    reached = not groups.partial and bool(groups.spans)
    return (rows.new_empty if reached else rows.new_zeros)(rows.shape[0], width)


def _can_group(rows: Tensor) -> bool:
    return rows.is_cuda and rows.dtype == torch.bfloat16


def _grouped(rows_SK: Tensor, matrices_EKN: Tensor, groups: Groups) -> Tensor:
    """`F.grouped_mm`, whose strides are to be multiples of 16 bytes."""
    outputs = matrices_EKN.shape[2]
    out = F.grouped_mm(_filled(rows_SK, 1), _filled(_filled(matrices_EKN, 1), 2), offs=groups.ends_E)[:, :outputs]
    return _without_strays(out, groups)


def _grouped_outer(left_SO: Tensor, right_SI: Tensor, groups: Groups) -> Tensor:
    shape = left_SO.shape[1], right_SI.shape[1]
    if groups.partial:
        left_SO, right_SI = _without_strays(left_SO, groups), _without_strays(right_SI, groups)
    out = F.grouped_mm(_filled(left_SO, 1).T, _filled(right_SI, 1), offs=groups.ends_E)
    return out[:, : shape[0], : shape[1]]


def _without_strays(rows: Tensor, groups: Groups) -> Tensor:
    # grouped_mm leaves the rows after the last end as it found them.
    if not groups.partial:
        return rows
    places = torch.arange(rows.shape[0], device=rows.device)
    return rows.masked_fill((places >= groups.ends_E[-1]).unsqueeze(1), 0)


def _filled(matrix: Tensor, axis: int) -> Tensor:
    """Zeros up to a multiple of `ALIGNED` along `axis`."""
    missing = -matrix.shape[axis] % ALIGNED
    if not missing:
        return matrix
    return F.pad(matrix, [0, 0] * (matrix.dim() - 1 - axis) + [0, missing])

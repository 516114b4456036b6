"""The ragged products by quack-kernels' grouped GEMM (Apache-2.0, CuTe DSL; `pip install quack-kernels`).

Only the products with an expert's whole matrices are its work: rows times weights, their gradient, and the weights' own
gradient. LoRA's thin products, gates and sums of rows are `reference`'s. `quack.gemm_interface.gemm`, as version 0.6.5
documents it:

- `gemm(A, B, cu_seqlens_m=begins)`: A (S, K), B (E, K, N) -> (S, N), where the rows from begins[e] to begins[e + 1] are
  multiplied by B[e]; A row-major, B with either inner stride 1.
- `gemm(A, B, cu_seqlens_k=begins)`: A (M, S) with M contiguous, B (S, N) -> (E, M, N), the sums over each group's rows.
- `begins` is int32 of E + 1; sides are multiples of 8 numbers; bf16 or fp16; sm_80 to sm_120.

`tuned=False` takes its default tiles: its own tuning would time some forty candidates for each new number of rows,
between steps. No GPU has run this: tests run all of it but the GEMM, in place of which they have the documented
arithmetic in torch. A job uses it after a trial against `reference` alone (`kernel_choice`).
"""

from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_stack_provider_moe.compute.moe.kernels import reference
from llama_stack_provider_moe.compute.moe.kernels.drop import Drop
from llama_stack_provider_moe.compute.moe.kernels.groups import Groups
from llama_stack_provider_moe.compute.moe.kernels.reference import (
    Stored,
    filled,
    gated,
    gated_backward,
    weighted_sum,
    without_strays,
)

__all__ = ["WIDEST_RANK", "gated", "gated_backward", "product", "rows_by_rows", "weighted_sum"]

WIDEST_RANK = reference.WIDEST_RANK
PACKAGE = "quack-kernels"
DTYPES = (torch.bfloat16, torch.float16)
_THIN = 64  # a product with a side up to this is `reference`'s

Gemm = Callable[..., Tensor]


def installed() -> str | None:
    """The installed version; None: there is none. It does not import the package, which patches CuTe's classes."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


@cache
def gemm() -> Gemm:
    """quack-kernels' grouped GEMM."""
    from quack.gemm_interface import gemm as found  # not installed everywhere

    wanted: Gemm = found
    return wanted


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
    """Twin of `reference.product`; takes the same arguments."""
    rows_SI = rows_SI if index_S is None else rows_SI[index_S]
    matrices = weight if isinstance(weight, Tensor) else weight.whole()
    out_SO = _times(rows_SI, matrices if flip else matrices.mT, groups)
    return reference.with_bias_and_lora(rows_SI, out_SO, groups, first_ERI, second_EOR, bias_EO, flip=flip, drop=drop)


def rows_by_rows(
    left_SO: Tensor,
    right_SI: Tensor,
    groups: Groups,
    *,
    left_index_S: Tensor | None = None,
    right_index_S: Tensor | None = None,
    drop: Drop | None = None,
) -> Tensor:
    """Twin of `reference.rows_by_rows`; takes the same arguments."""
    sides = left_SO.shape[1], right_SI.shape[1]
    if min(sides) <= _THIN:
        return reference.rows_by_rows(
            left_SO, right_SI, groups, left_index_S=left_index_S, right_index_S=right_index_S, drop=drop
        )
    left_SO = left_SO if left_index_S is None else left_SO[left_index_S]
    right_SI = right_SI if right_index_S is None else right_SI[right_index_S]
    right_SI = right_SI if drop is None else drop.of(right_SI)
    lhs, rhs = filled(left_SO, 1).contiguous().T, filled(right_SI, 1).contiguous()
    out_EOI = gemm()(lhs, rhs, cu_seqlens_k=_begins(groups), tuned=False)
    return out_EOI[:, : sides[0], : sides[1]]


def _times(rows_SK: Tensor, matrices_EKN: Tensor, groups: Groups) -> Tensor:
    outputs = matrices_EKN.shape[2]
    rows, matrices = filled(rows_SK, 1).contiguous(), filled(filled(matrices_EKN, 1), 2)
    if 1 not in matrices.stride()[1:]:
        matrices = matrices.contiguous()
    out_SN = gemm()(rows, matrices, cu_seqlens_m=_begins(groups), tuned=False)
    return without_strays(out_SN[:, :outputs], groups)


def _begins(groups: Groups) -> Tensor:
    """(E + 1,), int32: where the rows of each expert begin, and the end of the last one's."""
    return F.pad(groups.ends_E, (1, 0)).int()

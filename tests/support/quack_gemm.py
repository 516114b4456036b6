"""The grouped GEMM of quack-kernels 0.6.5 in plain torch: its documented arithmetic, and what it demands of its inputs.

Rows that it does not write are NaN here, for its memory is not initialised.
"""

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float64)  # double precision in tests alone


def _aligned(tensor: Tensor) -> bool:
    """One of the last two strides is 1, and all others are multiples of 16 bytes in half precision."""
    strides = sorted(tensor.stride()[-2:])
    return strides[0] == 1 and strides[1] % 8 == 0


def gemm(
    A: Tensor,
    B: Tensor,
    *,
    cu_seqlens_m: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    tuned: bool = True,
) -> Tensor:
    """Rows times the matrix of their group, or for each group the sum of outer products."""
    begins = cu_seqlens_m if cu_seqlens_k is None else cu_seqlens_k
    assert begins is not None
    assert (cu_seqlens_m is None) != (cu_seqlens_k is None), "one of both"
    assert not tuned, "it would time candidates between steps"
    assert begins.dtype == torch.int32
    assert begins.is_contiguous()
    assert begins[0] == 0
    assert A.dtype == B.dtype
    assert A.dtype in DTYPES
    assert A.ndim == 2
    groups = begins.shape[0] - 1
    if cu_seqlens_m is not None:
        assert A.stride(1) == 1, "varlen_m requires A to be k-major"
        assert A.shape[1] == B.shape[1]
        assert B.shape[0] == groups
        assert _aligned(A)
        assert _aligned(B)
        assert B.shape[2] % 8 == 0, "the result's rows are aligned"
        out = A.new_full((A.shape[0], B.shape[2]), torch.nan)
        for group in range(groups):
            rows = slice(int(begins[group]), int(begins[group + 1]))
            out[rows] = A[rows] @ B[group]
        return out
    assert A.stride(0) == 1, "varlen_k requires A to be m-major"
    assert B.stride(1) == 1, "varlen_k requires B to be n-major"
    assert A.shape[1] == B.shape[0]
    assert A.shape[0] % 8 == 0
    assert B.shape[1] % 8 == 0
    sums = [A[:, begins[group] : begins[group + 1]] @ B[begins[group] : begins[group + 1]] for group in range(groups)]
    return torch.stack(sums)

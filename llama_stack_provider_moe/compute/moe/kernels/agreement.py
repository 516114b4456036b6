"""Whether a kernel's result agrees with its plain-torch twin's: block by block, so that one wrong tile shows.

An error relative to the norm of the whole tensor hides a wrong tile: of the 6,144 tiles of 128 x 128 in Qwen3-30B's
(65,536, 1,536) activations one that is all wrong is 1.3% of the norm, as much as bf16's own rounding. So the error is
the largest of all blocks of 16 x 16 numbers, the smallest tile.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Largest error of a block, relative to its norm (or to that of an average block, if that is larger). Correct kernels
# differ by a few roundings of intermediate values, 2^-9 each in bf16; a wrong tile by about 1.
AGREES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_BLOCK = 16


def worst_error(found: Tensor, expected: Tensor) -> float:
    """The largest relative error of any block; NaN if a number is NaN. Leading dimensions are rows.

    >>> right = torch.ones(64, 64)
    >>> wrong = right.clone()
    >>> wrong[16:32, 48:] = 0  # one tile of sixteen
    >>> worst_error(right, right), worst_error(wrong, right)
    (0.0, 1.0)
    """
    if not expected.numel():
        return 0.0
    one, other = (_matrix(each).float() for each in (found, expected))
    sizes = _sums(other.square())
    average = other.square().mean() * _BLOCK * _BLOCK
    errors = _sums((one - other).square()) / torch.maximum(sizes, average).clamp(min=1e-30)
    return float(errors.max().sqrt())


def disagreement(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """What to say of results that are too far from the expected ones; None if all agree."""
    for one, other in zip(found, expected, strict=True):
        error = worst_error(one, other)
        if not error <= AGREES[other.dtype]:  # so that NaN fails
            return f"is off by {error:.2g} of the norm in a block of {tuple(other.shape)}"
    return None


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.unsqueeze(-1)


def _sums(squares: Tensor) -> Tensor:
    """The sum of each block."""
    rows, columns = squares.shape
    filled = F.pad(squares, (0, -columns % _BLOCK, 0, -rows % _BLOCK))
    blocks = filled.view(filled.shape[0] // _BLOCK, _BLOCK, filled.shape[1] // _BLOCK, _BLOCK)
    return blocks.sum(dim=(1, 3))

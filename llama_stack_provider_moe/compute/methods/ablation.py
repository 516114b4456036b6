"""Directional ablation (Arditi et al. 2024, arXiv 2406.11717): one direction of the residual stream, and its removal.

A direction is the unit difference of the mean hidden states of two sets of prompts, without what it shares with the
mean of the second set, unless it is `plain`. A matrix that writes into the residual stream loses its output along the
direction r, at a scale s:

    W' = W - s r r^T W

and a router, which reads the residual stream x after a norm of weight g, loses its input along g * r:

    W' = W - c (W q) q^T,  q = g * r / |g * r|

On one token, taking q out of the router's input gives the same logits. Where a norm of weight g stands between a
matrix and the stream, the stream gets g * y / rms(y), which has no part along r if y has none along g * r: then the
matrix loses q = g * r / |g * r| instead of r.

Shapes: H width of the residual stream, I input width, E experts. Matrices are (H, I): rows are what they write.
"""

import torch
from torch import Tensor

from llama_stack_provider_moe.spec.ablation import DirectionKind, NormPreserving

# A difference this small beside the means is rounding, not a direction.
LEAST_SHARE = 1e-6
_TINY = 1e-30
_ROWS = 128  # they and their squares fit into a core's cache


class NoDirection(ValueError):
    """The means do not differ, or nothing of their difference is left."""


def difference(target_H: Tensor, baseline_H: Tensor) -> Tensor:
    """Mean of the target set minus that of the baseline set, in fp64."""
    return target_H.double() - baseline_H.double()


def without(vector_H: Tensor, *others: Tensor) -> Tensor:
    """The part of a vector that is orthogonal to every one of `others`, in fp64."""
    left = vector_H.double()
    basis: list[Tensor] = []
    for other in others:
        rest = _apart(other.double(), basis)
        length = rest.norm()
        if length > LEAST_SHARE * other.double().norm():
            basis.append(rest / length)
    return _apart(left, basis)


def _apart(vector_H: Tensor, basis: list[Tensor]) -> Tensor:
    # Twice: the first pass leaves rounding errors as large as the part that it takes away.
    for unit in [*basis, *basis]:
        vector_H = vector_H - (vector_H @ unit) * unit
    return vector_H


def direction(
    target_H: Tensor,
    baseline_H: Tensor,
    kind: DirectionKind,
    at_layer_H: Tensor | None = None,
    sparsity: float = 0.0,
) -> Tensor:
    """The unit direction, (H,), in fp64.

    Args:
        target_H: mean of the target set where it was measured.
        baseline_H: mean of the baseline set at the same place.
        kind: plain: the difference; projected: its part orthogonal to `baseline_H`; biprojected: also to `at_layer_H`.
        at_layer_H: mean of the baseline set at the edited layer; only `biprojected` uses it.
        sparsity: see `sparse`.

    Raises:
        NoDirection: nothing is left.
    """
    found = difference(target_H, baseline_H)
    if kind == "projected":
        found = without(found, baseline_H)
    if kind == "biprojected":
        assert at_layer_H is not None, "biprojected needs the mean at the edited layer"
        found = without(found, baseline_H, at_layer_H)
    whole = max(float(target_H.double().norm()), float(baseline_H.double().norm()))
    if not float(found.norm()) > LEAST_SHARE * whole:
        raise NoDirection("the two means are equal, or differ only along the baseline's mean")
    return sparse(found / found.norm(), sparsity)


def untouched(width: int, sparsity: float) -> int:
    """How many of `width` dimensions a sparsity leaves untouched.

    >>> untouched(64, 0.1)
    6
    """
    return round(width * sparsity)


def sparse(unit_H: Tensor, sparsity: float) -> Tensor:
    """The direction without the share `sparsity` of its dimensions, those with the smallest numbers; of length 1."""
    count = untouched(len(unit_H), sparsity)
    if not count:
        return unit_H
    kept = unit_H.clone()
    kept[unit_H.abs().argsort(stable=True)[:count]] = 0.0
    kept /= kept.norm()
    return kept


def remove_output(weight_HI: Tensor, unit_H: Tensor, scale: float, norms: NormPreserving) -> Tensor:
    """`remove_output_` of a copy."""
    made = weight_HI.clone()
    remove_output_(made, unit_H, scale, norms)
    return made


def remove_output_(weight_HI: Tensor, unit_H: Tensor, scale: float, norms: NormPreserving) -> None:
    """Take the share `scale` of what a matrix writes along a direction out of it, in place.

    Rows where the direction is 0 stay.

    Args:
        weight_HI: fp32 or fp64.
        unit_H: of length 1.
        scale: 1 removes all of it.
        norms: column: each input's column keeps its norm, and at scale 1 nothing of the direction is left; row: each
            row keeps its norm, and some of the direction comes back; off: norms shrink.
    """
    unit_H = unit_H.to(weight_HI.dtype)
    touched = unit_H != 0
    if not bool(touched.all()):
        rows = weight_HI[touched]
        remove_output_(rows, unit_H[touched], scale, norms)
        weight_HI[touched] = rows
        return
    lengths = None if norms == "off" else _lengths(weight_HI, norms)
    weight_HI.addr_(unit_H, unit_H @ weight_HI, alpha=-scale)
    if norms != "off" and lengths is not None:
        left = _lengths(weight_HI, norms)
        # What is all along the direction has nothing left that could be made longer.
        weight_HI *= torch.where(left > LEAST_SHARE * lengths, lengths / left.clamp(min=_TINY), 1.0)


def _lengths(weight_HI: Tensor, norms: NormPreserving) -> Tensor:
    """Norms of the columns, (1, I), or of the rows, (H, 1)."""
    if norms == "row":
        of_rows: Tensor = torch.linalg.vector_norm(weight_HI, dim=1, keepdim=True)
        return of_rows
    # A block of rows at a time, added number by number: torch's norms of columns take 15 times as long.
    squares = torch.zeros_like(weight_HI[:_ROWS])
    for rows in torch.split(weight_HI, _ROWS):
        squares[: len(rows)].addcmul_(rows, rows)
    return squares.sum(dim=0, keepdim=True).sqrt()


def remove_from_bias(bias_H: Tensor, unit_H: Tensor, scale: float) -> Tensor:
    """A bias that writes, without the share `scale` of its part along a direction. Its norm is not kept."""
    unit_H = unit_H.to(bias_H.dtype)
    made: Tensor = bias_H - scale * (unit_H @ bias_H) * unit_H
    return made


def read_direction(unit_H: Tensor, norm_H: Tensor) -> Tensor:
    """The direction after a norm with weight `norm_H`, (H,), of length 1.

    Raises:
        NoDirection: the norm's weight is 0 wherever the direction is not.
    """
    found = norm_H.double() * unit_H.double()
    length = float(found.norm())
    if not length > LEAST_SHARE * float(norm_H.double().norm()):
        raise NoDirection("the norm's weight is 0 along it")
    return found.div(length)


def remove_input(weight_EH: Tensor, unit_H: Tensor, scale: float) -> Tensor:
    """A matrix that reads, (E, H), without the share `scale` of what it reads along a direction."""
    unit_H = unit_H.to(weight_EH.dtype)
    made: Tensor = torch.addr(weight_EH, weight_EH @ unit_H, unit_H, alpha=-scale)
    return made


def norms_along(weight_HI: Tensor, unit_H: Tensor) -> tuple[float, float]:
    """|W| and |r^T W|."""
    along_I = unit_H.to(weight_HI.dtype) @ weight_HI
    return float(torch.linalg.vector_norm(weight_HI)), float(torch.linalg.vector_norm(along_I))


def share_along(weight_HI: Tensor, unit_H: Tensor) -> float:
    """|r^T W| / |W|: 0 if a matrix writes nothing along r, 1 if it writes nothing else."""
    whole, along = norms_along(weight_HI, unit_H)
    return along / whole if whole else 0.0

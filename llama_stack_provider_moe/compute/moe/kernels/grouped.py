"""The ragged products by our Triton kernels (`ragged`): what they are called with, and the tiles of each call.

Twin of `reference`, behind the same signatures.
"""

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from llama_stack_provider_moe.compute.moe.kernels import reference
from llama_stack_provider_moe.compute.moe.kernels.drop import Drop
from llama_stack_provider_moe.compute.moe.kernels.groups import Groups
from llama_stack_provider_moe.compute.moe.kernels.pointwise import gated, gated_backward, masked, weighted_sum
from llama_stack_provider_moe.compute.moe.kernels.ragged import outer, times
from llama_stack_provider_moe.compute.moe.kernels.reference import Stored
from llama_stack_provider_moe.compute.moe.kernels.tiles import (
    INTERPRETED,
    Call,
    Tiles,
    best,
    for_outers,
    for_products,
    has_descriptors,
    rows_bucket,
)

__all__ = ["WIDEST_RANK", "gated", "gated_backward", "product", "rows_by_rows", "schedule", "weighted_sum"]

WIDEST_RANK = 64  # largest rank of the one-pass kernel, which holds the thin accumulator beside the wide one
RANK_STEP = 16  # ranks are padded with zeros to a multiple
_LANES = 8  # row tiles that share the blocks of a weight in the second-level cache


def schedule(groups: Groups, rows: int, block: int) -> Tensor:
    """(tiles, 3), int32: for each tile of `block` rows its expert, first row, and the end of its expert's rows.

    Computed on the device. Tiles past the last have no rows: their first row equals their end.

    >>> schedule(Groups(torch.tensor([3, 3, 8], dtype=torch.int32)), 8, 4).tolist()
    [[0, 0, 3], [2, 3, 8], [2, 7, 8], [2, 8, 8], [2, 8, 8]]
    """
    ends_E = groups.ends_E.long()
    begins_E = torch.nn.functional.pad(ends_E[:-1], (1, 0))
    tiles_E = (ends_E - begins_E + block - 1) // block
    tile_ends_E = tiles_E.cumsum(0)
    tile = torch.arange(triton.cdiv(rows, block) + ends_E.shape[0], device=ends_E.device)
    expert = torch.searchsorted(tile_ends_E, tile, right=True).clamp_(max=ends_E.shape[0] - 1)
    first = begins_E[expert] + (tile - (tile_ends_E - tiles_E)[expert]) * block
    return torch.stack([expert, torch.minimum(first, ends_E[expert]), ends_E[expert]], dim=1).int()


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
    """x W_e^T + (x F_e^T) G_e^T + b_e, and the thin x F_e^T; twin of `reference.product`.

    Args: see there.

    A weight in another form is decoded whole, into memory that is freed afterwards.
    """
    matrices = weight if isinstance(weight, Tensor) else weight.whole()
    mask = Mask(None if flip else drop, drop if flip else None)
    return _product(rows_SI, matrices.mT if flip else matrices, groups, first_ERI, second_EOR, bias_EO, index_S, mask)


class Mask(NamedTuple):
    """Dropout on the thin product's rows, or on what LoRA adds."""

    into: Drop | None = None
    out: Drop | None = None


NO_MASK = Mask()


def _product(
    rows_SI: Tensor,
    weight_EOI: Tensor,
    groups: Groups,
    first_ERI: Tensor | None = None,
    second_EOR: Tensor | None = None,
    bias_EO: Tensor | None = None,
    index_S: Tensor | None = None,
    mask: Mask = NO_MASK,
) -> tuple[Tensor, Tensor | None]:
    """Accepts views with any strides, so the gradient of the rows is the same call with W, F and G transposed."""
    if first_ERI is None or second_EOR is None:
        return one_pass(rows_SI, weight_EOI, groups, bias_EO=bias_EO, index_S=index_S), None
    rank = first_ERI.shape[1]
    if rank > WIDEST_RANK:
        low_SR = one_pass(rows_SI, first_ERI, groups, index_S=index_S, mask=Mask(mask.into))
        out_SO = one_pass(rows_SI, weight_EOI, groups, bias_EO=bias_EO, index_S=index_S)
        return out_SO.add_(one_pass(low_SR, second_EOR, groups, mask=Mask(None, mask.out))), low_SR
    if rank % RANK_STEP:
        first_ERI, second_EOR = _filled(first_ERI, 1), _filled(second_EOR, 2)
    rows = rows_SI.shape[0] if index_S is None else index_S.shape[0]
    if mask.into is None:
        low_SR = _room(rows_SI, rows, first_ERI.shape[1], groups)
        lora = InPass(first_ERI, second_EOR, low_SR)
    else:
        low_SR = one_pass(rows_SI, first_ERI, groups, index_S=index_S, mask=Mask(mask.into))
        lora = InPass(None, second_EOR, low_SR)
    out_SO = one_pass(rows_SI, weight_EOI, groups, lora, bias_EO, index_S, Mask(None, mask.out))
    return out_SO, low_SR[:, :rank]


class InPass(NamedTuple):
    """LoRA in one pass with the base: factors, and the thin product, which is written, or read if there is no first."""

    first_ERI: Tensor | None
    second_EOR: Tensor
    low_SR: Tensor


def one_pass(
    rows_SI: Tensor,
    weight_EOI: Tensor,
    groups: Groups,
    lora: InPass | None = None,
    bias_EO: Tensor | None = None,
    index_S: Tensor | None = None,
    mask: Mask = NO_MASK,
) -> Tensor:
    """One launch of `times`."""
    experts, outputs, inputs = weight_EOI.shape
    rows = rows_SI.shape[0] if index_S is None else index_S.shape[0]
    out_SO = _room(rows_SI, rows, outputs, groups)
    if not rows:
        return out_SO
    first_ERI, second_EOR, low_SR = (None, None, None) if lora is None else lora
    rank = 0 if low_SR is None else low_SR.shape[1]
    first = weight_EOI if first_ERI is None else first_ERI  # not read
    second = weight_EOI if second_EOR is None else second_EOR
    weight_described, rows_described = _can_describe(weight_EOI), index_S is None and _can_describe(rows_SI)
    weight_turned = weight_EOI.stride(2) != 1
    separate = _chaining_fails(rows_SI.device)
    drop = mask.into or mask.out

    def run(tiles: Tiles) -> CompiledKernel | None:
        if (rows, tiles.rows) not in groups.schedules:
            groups.schedules[rows, tiles.rows] = schedule(groups, rows, tiles.rows)
        table = groups.schedules[rows, tiles.rows]
        tiles_o = triton.cdiv(outputs, tiles.outputs)
        total = table.shape[0] * tiles_o
        described = tiles.descriptors and weight_described
        rows_too = tiles.descriptors and rows_described
        matrices = weight_EOI.mT if weight_turned else weight_EOI
        sides = (tiles.inputs, tiles.outputs) if weight_turned else (tiles.outputs, tiles.inputs)
        compiled: CompiledKernel | None = times[(_programs(rows_SI, total),)](
            TensorDescriptor.from_tensor(rows_SI, [tiles.rows, tiles.inputs]) if rows_too else rows_SI,
            TensorDescriptor.from_tensor(matrices, [1, *sides]) if described else weight_EOI,
            first, second, out_SO if bias_EO is None else bias_EO, out_SO,
            out_SO if low_SR is None else low_SR, table if index_S is None else index_S,
            table if drop is None else drop.keys_S2, table, total, outputs, inputs, rank, tiles_o,
            *rows_SI.stride(), *weight_EOI.stride(), *first.stride(), *second.stride(),
            BLOCK_S=tiles.rows, BLOCK_O=tiles.outputs, BLOCK_I=tiles.inputs,
            BLOCK_R=max(16, triton.next_power_of_2(rank)), LANES=_LANES, HAS_LORA=first_ERI is not None,
            HAS_BIAS=bias_EO is not None, HAS_INDEX=index_S is not None, ROWS_DESCRIBED=rows_too,
            WEIGHT_DESCRIBED=described, WEIGHT_TURNED=weight_turned,
            WIDEN=INTERPRETED and rows_SI.dtype == torch.bfloat16, SEPARATE=separate,
            GIVEN=rank > 0 and first_ERI is None, MASK_IN=mask.into is not None, MASK_OUT=mask.out is not None,
            LIMIT=0 if drop is None else drop.limit, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return compiled

    per_expert = rows_bucket(rows, experts)
    asked = (
        per_expert, experts, outputs, inputs, rank, str(rows_SI.dtype), bias_EO is not None, index_S is not None,
        weight_turned, weight_described, rows_described, first_ERI is not None, mask.into is not None,
        mask.out is not None,
    )  # fmt: skip
    described = weight_described and has_descriptors(rows_SI.device)
    found = for_products(
        per_expert, outputs, rank, rows_SI.dtype, described, weight_turned, separate or mask.out is not None
    )
    results = (out_SO,) if low_SR is None or first_ERI is None else (out_SO, low_SR)
    call = Call(
        run, results, lambda: _twin(rows_SI, weight_EOI, groups, lora, bias_EO, index_S, mask),
        (lambda: int(groups.ends_E[-1])) if groups.partial else None,
    )  # fmt: skip
    run(best("times", asked, found, rows_SI.device, call))
    return out_SO


def _twin(
    rows_SI: Tensor,
    weight_EOI: Tensor,
    groups: Groups,
    lora: InPass | None,
    bias_EO: Tensor | None,
    index_S: Tensor | None,
    mask: Mask,
) -> tuple[Tensor, ...]:
    """What `one_pass` writes, in plain torch."""
    into, out = (None if each is None else replace(each, exact=True) for each in mask)
    if lora is not None and lora.first_ERI is not None:
        # With `flip` masks are on what LoRA adds, which is the same product of the transposed weight.
        found = reference.product(
            rows_SI, weight_EOI.mT, groups, lora.first_ERI, lora.second_EOR, bias_EO, flip=True, index_S=index_S,
            drop=out,
        )  # fmt: skip
        return tuple(each for each in found if each is not None)
    rows_SI = rows_SI if index_S is None else rows_SI[index_S]
    whole, _ = reference.product(rows_SI if into is None else into.of(rows_SI), weight_EOI, groups, bias_EO=bias_EO)
    if lora is None:
        return (whole if out is None else out.of(whole),)
    added = reference.times_weights(lora.low_SR, lora.second_EOR, groups)
    return (whole.add_(added if out is None else out.of(added)),)


def rows_by_rows(
    left_SO: Tensor,
    right_SI: Tensor,
    groups: Groups,
    *,
    left_index_S: Tensor | None = None,
    right_index_S: Tensor | None = None,
    drop: Drop | None = None,
) -> Tensor:
    """For each expert the sum over its rows of left_O right_I^T, (E, O, I); twin of `reference.rows_by_rows`.

    Args: see there.
    """
    experts, outputs, inputs = groups.ends_E.shape[0], left_SO.shape[1], right_SI.shape[1]
    out_EOI = left_SO.new_empty(experts, outputs, inputs)

    def run(tiles: Tiles) -> CompiledKernel | None:
        tiles_o, tiles_i = triton.cdiv(outputs, tiles.outputs), triton.cdiv(inputs, tiles.inputs)
        total = experts * tiles_o * tiles_i
        compiled: CompiledKernel | None = outer[(_programs(left_SO, total),)](
            left_SO, right_SI, out_EOI, groups.ends_E if left_index_S is None else left_index_S,
            groups.ends_E if right_index_S is None else right_index_S,
            groups.ends_E if drop is None else drop.keys_S2, groups.ends_E,
            total, outputs, inputs, tiles_o, tiles_i, *left_SO.stride(), *right_SI.stride(),
            BLOCK_S=tiles.rows, BLOCK_O=tiles.outputs, BLOCK_I=tiles.inputs,
            LEFT_INDEX=left_index_S is not None, RIGHT_INDEX=right_index_S is not None,
            WIDEN=INTERPRETED and left_SO.dtype == torch.bfloat16, **masked(drop),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return compiled

    def twin() -> tuple[Tensor, ...]:
        indices = {"left_index_S": left_index_S, "right_index_S": right_index_S}
        exact = None if drop is None else replace(drop, exact=True)
        return (reference.rows_by_rows(left_SO, right_SI, groups, **indices, drop=exact),)

    index = left_index_S if right_index_S is None else right_index_S
    rows = left_SO.shape[0] if index is None else index.shape[0]
    asked = (
        rows_bucket(rows, experts), experts, outputs, inputs, str(left_SO.dtype),
        left_index_S is not None, right_index_S is not None, drop is not None,
    )  # fmt: skip
    call = Call(run, (out_EOI,), twin)
    found = for_outers(outputs, inputs, left_SO.dtype, has_descriptors(left_SO.device))
    run(best("outer", asked, found, left_SO.device, call))
    return out_EOI


def _room(rows: Tensor, count: int, width: int, groups: Groups) -> Tensor:
    """Memory for results; zeros if some rows belong to no expert, for those are not written."""
    return (rows.new_zeros if groups.partial else rows.new_empty)(count, width)


def _filled(factor: Tensor, axis: int) -> Tensor:
    """A factor of LoRA with zeros up to a multiple of `RANK_STEP`: with rows of 16 numbers its loads are aligned."""
    missing = -factor.shape[axis] % RANK_STEP
    return torch.nn.functional.pad(factor, [0, 0] * (2 - axis) + [0, missing]).contiguous()


def _can_describe(tensor: Tensor) -> bool:
    """Whether a tensor descriptor can describe it: one of the last two strides 1, others multiples of 16 bytes."""
    inner, *outer = sorted(tensor.stride())
    aligned = all(stride * tensor.element_size() % 16 == 0 for stride in outer) and tensor.data_ptr() % 16 == 0
    last = tensor.stride()[-2:] if tensor.dim() == 3 else tensor.stride()[-1:]
    return inner == 1 and 1 in last and aligned and tensor.numel() > 0


@lru_cache(maxsize=8)
def _chaining_fails(device: torch.device) -> bool:
    """Whether two dots on one accumulator are miscompiled, as for sm_103 (triton issue 10821); the sum of two is right.

    All of that generation is treated alike. Hopper keeps the chain: a second accumulator would make it spill.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10


def _programs(rows: Tensor, total: int) -> int:
    """Two programs per multiprocessor, if there are enough tiles: one loads while the other multiplies."""
    if INTERPRETED or not rows.is_cuda:
        return min(total, 4)
    return min(total, 2 * torch.cuda.get_device_properties(rows.device).multi_processor_count)

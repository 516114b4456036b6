"""The ragged products as Triton kernels: base and LoRA in one pass, and the sums of outer products.

Two kernels serve forward and backward. `_times` computes rows W_e^T + (rows F_e^T) G_e^T: with F = A and G = B this is
the forward, with W, B and A transposed it is the gradient of the rows. The thin product rows F_e^T shares the loop over
the inputs, and G_e is applied at its end, so rows are read once (kernels.md calls it the fused split). `_outer` sums
left_O right_I^T over each expert's rows: the gradients of A and B, and of W if it trains.

Arithmetic, for S rows, I inputs, O outputs, rank R, E experts, b bytes per number:

| | FLOPs | minimum bytes |
|---|---|---|
| forward | 2 S (I O + R I + R O) | b (S I + S O + S R + E (I O + R I + R O)) |
| gradient of rows | the same | the same |
| gradients of A, B | 2 S R (I + O) | b (S I + S O + 2 S R + E R (I + O)) |
| gradient of W | 2 S I O | b (S I + S O + E I O) |

For Qwen3-30B's gate_up (S 65,536 = 8,192 tokens x 8, I 2,048, O 1,536, R 16, E 128) the forward is 0.42 TFLOP and
1.3 GB in bf16: bound by arithmetic on any Hopper GPU. Each tile of `BLOCK_O` outputs recomputes the thin product,
R / BLOCK_O of its work (1/8 at 16 and 128).

Rows may be tokens that are gathered while they are loaded (`index_S`), which avoids an (S, I) copy: S I b bytes written
and read again. Ordered rows and the weights are loaded through tensor descriptors (TMA) if the device has them and they
were faster (`tiles`).

A table computed on the device (`schedule`) gives the expert of each tile of rows, so nothing waits for the host. Its
length is an upper bound, S / BLOCK_S + E tiles; tiles past the end return at once.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from llama_stack_provider_moe.compute.moe.kernels import reference
from llama_stack_provider_moe.compute.moe.kernels.groups import Groups
from llama_stack_provider_moe.compute.moe.kernels.pointwise import gated, gated_backward, weighted_sum
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


@triton.jit
def _times(
    rows, weight, first, second, bias, out, low, index, table, total, outputs, inputs, rank, tiles_o,
    rows_s, rows_i, weight_e, weight_o, weight_i, first_e, first_r, first_i, second_e, second_o, second_r,
    BLOCK_S: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
    LANES: tl.constexpr, HAS_LORA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INDEX: tl.constexpr,
    ROWS_DESCRIBED: tl.constexpr, WEIGHT_DESCRIBED: tl.constexpr, WEIGHT_TURNED: tl.constexpr, WIDEN: tl.constexpr,
    SEPARATE: tl.constexpr,
):  # fmt: skip
    """Persistent over (row tile, output tile); `LANES` row tiles at a time go through all output tiles.

    If described, `rows` and `weight` are tensor descriptors of (S, I) and (E, O, I), or (E, I, O) if turned.
    """
    tiles_s = total // tiles_o
    for job in range(tl.program_id(0), total, tl.num_programs(0)):
        lane = job // (LANES * tiles_o)
        lanes = tl.minimum(tiles_s - lane * LANES, LANES)
        tile = lane * LANES + (job % (LANES * tiles_o)) % lanes
        tile_o = (job % (LANES * tiles_o)) // lanes
        expert_32 = tl.load(table + tile * 3)
        expert = expert_32.to(tl.int64)
        row_first = tl.load(table + tile * 3 + 1)
        row_end = tl.load(table + tile * 3 + 2)
        if row_first < row_end:
            at_s = (row_first + tl.arange(0, BLOCK_S)).to(tl.int64)
            at_o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
            at_r = tl.arange(0, BLOCK_R)
            is_s, is_o, is_r = at_s < row_end, at_o < outputs, at_r < rank
            from_s = at_s
            if HAS_INDEX:
                from_s = tl.load(index + at_s, is_s, 0).to(tl.int64)
            acc = tl.zeros((BLOCK_S, BLOCK_O), tl.float32)
            thin = tl.zeros((BLOCK_S, BLOCK_R), tl.float32)
            for start in range(0, inputs, BLOCK_I):
                at_i = start + tl.arange(0, BLOCK_I)
                is_i = at_i < inputs
                if ROWS_DESCRIBED:
                    x = rows.load([row_first, start])  # may include rows of the next expert, which are not stored
                else:
                    x = tl.load(
                        rows + from_s[:, None] * rows_s + at_i[None, :] * rows_i, is_s[:, None] & is_i[None, :], 0.0
                    )
                if WEIGHT_DESCRIBED:
                    if WEIGHT_TURNED:
                        w = weight.load([expert_32, start, tile_o * BLOCK_O]).reshape(BLOCK_I, BLOCK_O)
                    else:
                        w = weight.load([expert_32, tile_o * BLOCK_O, start]).reshape(BLOCK_O, BLOCK_I).T
                else:
                    w = tl.load(
                        weight + expert * weight_e + at_o[None, :] * weight_o + at_i[:, None] * weight_i,
                        is_o[None, :] & is_i[:, None], 0.0,
                    )  # fmt: skip
                if WIDEN:
                    x, w = x.to(tl.float32), w.to(tl.float32)
                acc = tl.dot(x, w, acc, input_precision="ieee")
                if HAS_LORA:
                    from_f = first + expert * first_e + at_r[None, :] * first_r + at_i[:, None] * first_i
                    f = tl.load(from_f, is_r[None, :] & is_i[:, None], 0.0)
                    if WIDEN:
                        f = f.to(tl.float32)
                    thin = tl.dot(x, f, thin, input_precision="ieee")
            if HAS_LORA:
                narrow = thin.to(low.dtype.element_ty)
                if tile_o == 0:
                    tl.store(low + at_s[:, None] * rank + at_r[None, :], narrow, is_s[:, None] & is_r[None, :])
                from_g = second + expert * second_e + at_o[None, :] * second_o + at_r[:, None] * second_r
                g = tl.load(from_g, is_o[None, :] & is_r[:, None], 0.0)
                if WIDEN:
                    narrow, g = narrow.to(tl.float32), g.to(tl.float32)
                if SEPARATE:
                    # Without the mask, whose rows are not stored, Triton would chain this dot, too.
                    acc += tl.where(is_s[:, None], tl.dot(narrow, g, input_precision="ieee"), 0.0)
                else:
                    acc = tl.dot(narrow, g, acc, input_precision="ieee")
            if HAS_BIAS:
                acc += tl.load(bias + expert * outputs + at_o, is_o, 0.0).to(tl.float32)[None, :]
            tl.store(
                out + at_s[:, None] * outputs + at_o[None, :], acc.to(out.dtype.element_ty),
                is_s[:, None] & is_o[None, :],
            )  # fmt: skip


@triton.jit
def _outer(
    left, right, out, left_index, right_index, ends, total, outputs, inputs, tiles_o, tiles_i,
    left_s, left_o, right_s, right_i,
    BLOCK_S: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
    LEFT_INDEX: tl.constexpr, RIGHT_INDEX: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Persistent over (expert, output tile, input tile); the loop runs over the expert's rows."""
    for job in range(tl.program_id(0), total, tl.num_programs(0)):
        expert = job // (tiles_o * tiles_i)
        tile_o = job % (tiles_o * tiles_i) // tiles_i
        tile_i = job % tiles_i
        row_end = tl.load(ends + expert)
        row_first = tl.load(ends + expert - 1, expert > 0, 0)
        at_o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
        at_i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
        is_o, is_i = at_o < outputs, at_i < inputs
        acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        for start in range(row_first, row_end, BLOCK_S):
            at_s = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
            is_s = at_s < row_end
            left_at, right_at = at_s, at_s
            if LEFT_INDEX:
                left_at = tl.load(left_index + at_s, is_s, 0).to(tl.int64)
            if RIGHT_INDEX:
                right_at = tl.load(right_index + at_s, is_s, 0).to(tl.int64)
            lhs = tl.load(left + left_at[None, :] * left_s + at_o[:, None] * left_o, is_s[None, :] & is_o[:, None], 0.0)
            rhs = tl.load(
                right + right_at[:, None] * right_s + at_i[None, :] * right_i, is_s[:, None] & is_i[None, :], 0.0
            )
            if WIDEN:
                lhs, rhs = lhs.to(tl.float32), rhs.to(tl.float32)
            acc = tl.dot(lhs, rhs, acc, input_precision="ieee")
        place = out + (expert.to(tl.int64) * outputs + at_o[:, None]) * inputs + at_i[None, :]
        tl.store(place, acc.to(out.dtype.element_ty), is_o[:, None] & is_i[None, :])


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
    """x W_e^T + (x F_e^T) G_e^T + b_e, and the thin x F_e^T; twin of `reference.product`.

    Args: see there.

    A weight in another form is decoded whole, into memory that is freed afterwards.
    """
    matrices = weight if isinstance(weight, Tensor) else weight.whole()
    return _product(rows_SI, matrices.mT if flip else matrices, groups, first_ERI, second_EOR, bias_EO, index_S)


def _product(
    rows_SI: Tensor,
    weight_EOI: Tensor,
    groups: Groups,
    first_ERI: Tensor | None = None,
    second_EOR: Tensor | None = None,
    bias_EO: Tensor | None = None,
    index_S: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Accepts views with any strides, so the gradient of the rows is the same call with W, F and G transposed."""
    asked_rank = rank = 0 if first_ERI is None else first_ERI.shape[1]
    if rank > WIDEST_RANK:
        assert first_ERI is not None
        assert second_EOR is not None
        low_SR, _ = _product(rows_SI, first_ERI, groups, index_S=index_S)
        out_SO, _ = _product(rows_SI, weight_EOI, groups, bias_EO=bias_EO, index_S=index_S)
        return out_SO.add_(_product(low_SR, second_EOR, groups)[0]), low_SR
    if rank % RANK_STEP:
        rank = asked_rank + -asked_rank % RANK_STEP
        first_ERI, second_EOR = _filled(first_ERI, 1, rank), _filled(second_EOR, 2, rank)
    experts, outputs, inputs = weight_EOI.shape
    rows = rows_SI.shape[0] if index_S is None else index_S.shape[0]
    make = rows_SI.new_zeros if groups.partial else rows_SI.new_empty
    out_SO = make(rows, outputs)
    low_SR = make(rows, rank) if rank else None
    if not rows:
        return out_SO, None if low_SR is None else low_SR[:, :asked_rank]
    first = weight_EOI if first_ERI is None else first_ERI  # not read
    second = weight_EOI if second_EOR is None else second_EOR
    weight_described, rows_described = _can_describe(weight_EOI), index_S is None and _can_describe(rows_SI)
    weight_turned = weight_EOI.stride(2) != 1
    separate = _chaining_fails(rows_SI.device)

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
        compiled: CompiledKernel | None = _times[(_programs(rows_SI, total),)](
            TensorDescriptor.from_tensor(rows_SI, [tiles.rows, tiles.inputs]) if rows_too else rows_SI,
            TensorDescriptor.from_tensor(matrices, [1, *sides]) if described else weight_EOI,
            first, second, out_SO if bias_EO is None else bias_EO, out_SO,
            out_SO if low_SR is None else low_SR, table if index_S is None else index_S,
            table, total, outputs, inputs, rank, tiles_o,
            *rows_SI.stride(), *weight_EOI.stride(), *first.stride(), *second.stride(),
            BLOCK_S=tiles.rows, BLOCK_O=tiles.outputs, BLOCK_I=tiles.inputs,
            BLOCK_R=max(16, triton.next_power_of_2(rank)), LANES=_LANES, HAS_LORA=rank > 0,
            HAS_BIAS=bias_EO is not None, HAS_INDEX=index_S is not None, ROWS_DESCRIBED=rows_too,
            WEIGHT_DESCRIBED=described, WEIGHT_TURNED=weight_turned,
            WIDEN=INTERPRETED and rows_SI.dtype == torch.bfloat16, SEPARATE=separate,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return compiled

    def twin() -> tuple[Tensor, ...]:
        found = reference.product(rows_SI, weight_EOI, groups, first_ERI, second_EOR, bias_EO, index_S=index_S)
        return tuple(each for each in found if each is not None)

    per_expert = rows_bucket(rows, experts)
    asked = (
        per_expert, experts, outputs, inputs, rank, str(rows_SI.dtype), bias_EO is not None, index_S is not None,
        weight_turned, weight_described, rows_described,
    )  # fmt: skip
    described = weight_described and has_descriptors(rows_SI.device)
    found = for_products(per_expert, outputs, rank, rows_SI.dtype, described, weight_turned, separate)
    results = (out_SO,) if low_SR is None else (out_SO, low_SR)
    call = Call(run, results, twin, (lambda: int(groups.ends_E[-1])) if groups.partial else None)
    run(best("times", asked, found, rows_SI.device, call))
    return out_SO, None if low_SR is None else low_SR[:, :asked_rank]


def rows_by_rows(
    left_SO: Tensor,
    right_SI: Tensor,
    groups: Groups,
    *,
    left_index_S: Tensor | None = None,
    right_index_S: Tensor | None = None,
) -> Tensor:
    """For each expert the sum over its rows of left_O right_I^T, (E, O, I); twin of `reference.rows_by_rows`.

    Args: see there.
    """
    experts, outputs, inputs = groups.ends_E.shape[0], left_SO.shape[1], right_SI.shape[1]
    out_EOI = left_SO.new_empty(experts, outputs, inputs)

    def run(tiles: Tiles) -> CompiledKernel | None:
        tiles_o, tiles_i = triton.cdiv(outputs, tiles.outputs), triton.cdiv(inputs, tiles.inputs)
        total = experts * tiles_o * tiles_i
        compiled: CompiledKernel | None = _outer[(_programs(left_SO, total),)](
            left_SO, right_SI, out_EOI, groups.ends_E if left_index_S is None else left_index_S,
            groups.ends_E if right_index_S is None else right_index_S, groups.ends_E,
            total, outputs, inputs, tiles_o, tiles_i, *left_SO.stride(), *right_SI.stride(),
            BLOCK_S=tiles.rows, BLOCK_O=tiles.outputs, BLOCK_I=tiles.inputs,
            LEFT_INDEX=left_index_S is not None, RIGHT_INDEX=right_index_S is not None,
            WIDEN=INTERPRETED and left_SO.dtype == torch.bfloat16, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return compiled

    def twin() -> tuple[Tensor, ...]:
        indices = {"left_index_S": left_index_S, "right_index_S": right_index_S}
        return (reference.rows_by_rows(left_SO, right_SI, groups, **indices),)

    index = left_index_S if right_index_S is None else right_index_S
    rows = left_SO.shape[0] if index is None else index.shape[0]
    asked = (
        rows_bucket(rows, experts), experts, outputs, inputs, str(left_SO.dtype),
        left_index_S is not None, right_index_S is not None,
    )  # fmt: skip
    call = Call(run, (out_EOI,), twin)
    run(best("outer", asked, for_outers(outputs, inputs, left_SO.dtype), left_SO.device, call))
    return out_EOI


def _filled(factor: Tensor | None, axis: int, rank: int) -> Tensor:
    """A factor of LoRA with zeros up to `rank`: with rows of 16 numbers its loads are aligned."""
    assert factor is not None
    missing = rank - factor.shape[axis]
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

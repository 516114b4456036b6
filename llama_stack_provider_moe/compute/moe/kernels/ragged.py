"""The two Triton kernels of the ragged products: base and LoRA in one pass, and the sums of outer products.

Two kernels serve forward and backward. `times` computes rows W_e^T + (rows F_e^T) G_e^T: with F = A and G = B this is
the forward, with W, B and A transposed it is the gradient of the rows. The thin product rows F_e^T shares the loop over
the inputs, and G_e is applied at its end, so rows are read once (kernels.md calls it the fused split). `outer` sums
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

With dropout on LoRA's input (`drop`) forward computes the masked thin product first, reading the rows once more, and
the wide one adds G_e's product at its end: a mask inside the loop would be computed again by each tile of outputs. For
Qwen3-30B that is 12 times 65,536 x 2,048 numbers of ten integer operations, on a Hopper GPU about as long as the whole
product. Backward masks what LoRA adds to the gradient of the rows, once per number, and the rows of A's gradient as
they are loaded.

A table computed on the device (`schedule`) gives the expert of each tile of rows, so nothing waits for the host. Its
length is an upper bound, S / BLOCK_S + E tiles; tiles past the end return at once.
"""

import triton
import triton.language as tl

from llama_stack_provider_moe.compute.moe.kernels.pointwise import kept

# Numbers that differ from step to step: Triton would compile a kernel again for those that 16 divides, between steps.
VARYING = ("total", "tiles_o", "tiles_i")


@triton.jit
def _tiles(job, tiles_s, tiles_o, LANES: tl.constexpr):
    """The row tile and the output tile of a job: `LANES` row tiles at a time go through all output tiles."""
    lane = job // (LANES * tiles_o)
    lanes = tl.minimum(tiles_s - lane * LANES, LANES)
    within = job % (LANES * tiles_o)
    return lane * LANES + within % lanes, within // lanes


@triton.jit
def _narrow(thin, from_low, is_there, is_first, GIVEN: tl.constexpr):
    """The thin product of a tile of rows: as it was given, or as it was computed, which the first output tile keeps."""
    if GIVEN:
        narrow = tl.load(from_low, is_there, 0.0)
    else:
        narrow = thin.to(from_low.dtype.element_ty)
        if is_first:
            tl.store(from_low, narrow, is_there)
    return narrow


@triton.jit(do_not_specialize=VARYING)
def times(
    rows, weight, first, second, bias, out, low, index, keys, table, total, outputs, inputs, rank, tiles_o,
    rows_s, rows_i, weight_e, weight_o, weight_i, first_e, first_r, first_i, second_e, second_o, second_r,
    BLOCK_S: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
    LANES: tl.constexpr, HAS_LORA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INDEX: tl.constexpr,
    ROWS_DESCRIBED: tl.constexpr, WEIGHT_DESCRIBED: tl.constexpr, WEIGHT_TURNED: tl.constexpr, WIDEN: tl.constexpr,
    SEPARATE: tl.constexpr, GIVEN: tl.constexpr, MASK_IN: tl.constexpr, MASK_OUT: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Persistent over (row tile, output tile); `LANES` row tiles at a time go through all output tiles.

    If described, `rows` and `weight` are tensor descriptors of (S, I) and (E, O, I), or (E, I, O) if turned. GIVEN: the
    thin product is in `low`. MASK_IN: dropout on `rows`, without LoRA. MASK_OUT: on what LoRA adds, or without LoRA on
    the whole product.
    """
    tiles_s = total // tiles_o
    for job in range(tl.program_id(0), total, tl.num_programs(0)):
        tile, tile_o = _tiles(job, tiles_s, tiles_o, LANES)
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
                    from_x = rows + from_s[:, None] * rows_s + at_i[None, :] * rows_i
                    x = tl.load(from_x, is_s[:, None] & is_i[None, :], 0.0)
                if WEIGHT_DESCRIBED:
                    if WEIGHT_TURNED:
                        w = weight.load([expert_32, start, tile_o * BLOCK_O]).reshape(BLOCK_I, BLOCK_O)
                    else:
                        w = weight.load([expert_32, tile_o * BLOCK_O, start]).reshape(BLOCK_O, BLOCK_I).T
                else:
                    from_w = weight + expert * weight_e + at_o[None, :] * weight_o + at_i[:, None] * weight_i
                    w = tl.load(from_w, is_o[None, :] & is_i[:, None], 0.0)
                if MASK_IN:
                    x = tl.where(kept(keys, at_s, is_s, at_i, LIMIT), x, tl.zeros_like(x))
                if WIDEN:
                    x, w = x.to(tl.float32), w.to(tl.float32)
                acc = tl.dot(x, w, acc, input_precision="ieee")
                if HAS_LORA:
                    from_f = first + expert * first_e + at_r[None, :] * first_r + at_i[:, None] * first_i
                    f = tl.load(from_f, is_r[None, :] & is_i[:, None], 0.0)
                    if WIDEN:
                        f = f.to(tl.float32)
                    thin = tl.dot(x, f, thin, input_precision="ieee")
            if HAS_LORA or GIVEN:
                from_low = low + at_s[:, None] * rank + at_r[None, :]
                narrow = _narrow(thin, from_low, is_s[:, None] & is_r[None, :], tile_o == 0, GIVEN)
                from_g = second + expert * second_e + at_o[None, :] * second_o + at_r[:, None] * second_r
                g = tl.load(from_g, is_o[None, :] & is_r[:, None], 0.0)
                if WIDEN:
                    narrow, g = narrow.to(tl.float32), g.to(tl.float32)
                if MASK_OUT:
                    added = tl.dot(narrow, g, input_precision="ieee")
                    acc += tl.where(kept(keys, at_s, is_s, at_o, LIMIT), added, 0.0)
                elif SEPARATE:
                    # Without the mask, whose rows are not stored, Triton would chain this dot, too.
                    acc += tl.where(is_s[:, None], tl.dot(narrow, g, input_precision="ieee"), 0.0)
                else:
                    acc = tl.dot(narrow, g, acc, input_precision="ieee")
            elif MASK_OUT:
                acc = tl.where(kept(keys, at_s, is_s, at_o, LIMIT), acc, 0.0)
            if HAS_BIAS:
                acc += tl.load(bias + expert * outputs + at_o, is_o, 0.0).to(tl.float32)[None, :]
            to_out = out + at_s[:, None] * outputs + at_o[None, :]
            tl.store(to_out, acc.to(out.dtype.element_ty), is_s[:, None] & is_o[None, :])


@triton.jit(do_not_specialize=VARYING)
def outer(
    left, right, out, left_index, right_index, keys, ends, total, outputs, inputs, tiles_o, tiles_i,
    left_s, left_o, right_s, right_i,
    BLOCK_S: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
    LEFT_INDEX: tl.constexpr, RIGHT_INDEX: tl.constexpr, WIDEN: tl.constexpr,
    DROPS: tl.constexpr, LIMIT: tl.constexpr,
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
            if DROPS:
                rhs = tl.where(kept(keys, at_s, is_s, at_i, LIMIT), rhs, tl.zeros_like(rhs))
            if WIDEN:
                lhs, rhs = lhs.to(tl.float32), rhs.to(tl.float32)
            acc = tl.dot(lhs, rhs, acc, input_precision="ieee")
        place = out + (expert.to(tl.int64) * outputs + at_o[:, None]) * inputs + at_i[None, :]
        tl.store(place, acc.to(out.dtype.element_ty), is_o[:, None] & is_i[None, :])

"""Triton kernels for the operations that are not products: gates with their backward, and sums of a token's rows.

All are bound by memory. For S rows, J = 2 I inputs of the gate, b bytes per number:

| | minimum bytes | for Qwen3-30B-A3B's 8,192 tokens (S 65,536, I 768, D 2,048, T S / 8) in bf16 |
|---|---|---|
| gate | 3 b S I | 0.30 GB |
| its backward, which also recomputes the gate's output | 6 b S I | 0.60 GB |
| sum of rows | b D (S + T) | 0.30 GB |

As separate passes, torch's silu, product, their two gradients, the weighted output and the dot products read and write
about 20 b S I. Dropout's mask is computed from keys of rows (`drop`). Numbers are fp32 inside. One program handles each
row or token, always in the same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama_stack_provider_moe.compute.moe.kernels import reference
from llama_stack_provider_moe.compute.moe.kernels.drop import Drop
from llama_stack_provider_moe.compute.moe.kernels.groups import Sorted
from llama_stack_provider_moe.compute.moe.kernels.reference import Activation

_ROWS = 4  # per program
_COLUMNS = 256


@triton.jit
def kept(keys, at_s, is_s, at_i, LIMIT: tl.constexpr):
    """(S, I), bool: which numbers dropout keeps; twin of `drop.Drop.keep`, with the same bits."""
    first = tl.load(keys + 2 * at_s, is_s, 0).to(tl.uint32, bitcast=True)
    second = tl.load(keys + 2 * at_s + 1, is_s, 0).to(tl.uint32, bitcast=True)
    word = first[:, None] + (at_i.to(tl.uint32) * 0x61C88647)[None, :]
    word ^= word >> 16
    word *= 0x21F0AAAD
    word ^= second[:, None]
    word ^= word >> 15
    word *= 0x735A2D97
    return (word & 0x7FFFFFFF) >= LIMIT


@triton.jit
def _gate_and_up(inner, at_s, at_i, here, width, CLAMPED: tl.constexpr):
    """The two inputs of each output (`at_s`, `at_i`), in fp32."""
    if CLAMPED:
        place = inner + at_s[:, None] * (2 * width) + 2 * at_i[None, :]
        return tl.load(place, here, 0.0).to(tl.float32), tl.load(place + 1, here, 0.0).to(tl.float32)
    place = inner + at_s[:, None] * (2 * width) + at_i[None, :]
    return tl.load(place, here, 0.0).to(tl.float32), tl.load(place + width, here, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=("rows",))
def _gated(
    inner, out, keys, rows, width, alpha, limit, scale,
    CLAMPED: tl.constexpr, DROPS: tl.constexpr, LIMIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    at_s = (tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
    at_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    here = (at_s < rows)[:, None] & (at_i < width)[None, :]
    gate, up = _gate_and_up(inner, at_s, at_i, here, width, CLAMPED)
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1.0
        made = up * gate * tl.sigmoid(gate * alpha)
    else:
        made = up * gate * tl.sigmoid(gate)
    if DROPS:
        made = tl.where(kept(keys, at_s, at_s < rows, at_i, LIMIT), made * scale, 0.0)
    tl.store(out + at_s[:, None] * width + at_i[None, :], made.to(out.dtype.element_ty), here)


@triton.jit(do_not_specialize=("rows",))
def _gated_backward(
    inner, d_made, weight, d_inner, made, d_weight, keys, rows, width, alpha, limit, scale,
    CLAMPED: tl.constexpr, DROPS: tl.constexpr, LIMIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    at_s = (tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
    is_s = at_s < rows
    weight_s = tl.load(weight + at_s, is_s, 0.0).to(tl.float32)
    dots = tl.zeros((BLOCK_S,), tl.float32)
    for start in range(0, width, BLOCK_I):
        at_i = start + tl.arange(0, BLOCK_I)
        here = is_s[:, None] & (at_i < width)[None, :]
        gate, up = _gate_and_up(inner, at_s, at_i, here, width, CLAMPED)
        place = at_s[:, None] * width + at_i[None, :]
        d = tl.load(d_made + place, here, 0.0).to(tl.float32)
        if CLAMPED:
            # Like torch's clamp, pass the whole gradient at the bound itself.
            passes_gate, passes_up = gate <= limit, (up >= -limit) & (up <= limit)
            gate, slope = tl.minimum(gate, limit), alpha
            up = tl.minimum(tl.maximum(up, -limit), limit) + 1.0
        else:
            slope = 1.0
        curve = tl.sigmoid(gate * slope)
        act = gate * curve
        both = up * act
        if DROPS:
            factor = tl.where(kept(keys, at_s, is_s, at_i, LIMIT), scale, 0.0)
            both *= factor
            dots += tl.sum(d * both, 1)
            d *= factor
        else:
            dots += tl.sum(d * both, 1)
        d *= weight_s[:, None]
        d_gate = d * up * curve * (1.0 + slope * gate * (1.0 - curve))
        d_up = d * act
        tl.store(made + place, (both * weight_s[:, None]).to(made.dtype.element_ty), here)
        if CLAMPED:
            d_gate, d_up = tl.where(passes_gate, d_gate, 0.0), tl.where(passes_up, d_up, 0.0)
            pair = d_inner + at_s[:, None] * (2 * width) + 2 * at_i[None, :]
            tl.store(pair, d_gate.to(d_inner.dtype.element_ty), here)
            tl.store(pair + 1, d_up.to(d_inner.dtype.element_ty), here)
        else:
            half = d_inner + at_s[:, None] * (2 * width) + at_i[None, :]
            tl.store(half, d_gate.to(d_inner.dtype.element_ty), here)
            tl.store(half + width, d_up.to(d_inner.dtype.element_ty), here)
    tl.store(d_weight + at_s, dots, is_s)


@triton.jit(do_not_specialize=("all_rows",))
def _weighted_sum(
    rows, places, weights, out, all_rows, width,
    CHOICES: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_d = at_d < width
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for choice in range(CHOICES):
        row = tl.load(places + token * CHOICES + choice).to(tl.int64)
        reach = tl.where(row < all_rows, width, 0)  # a choice of no expert has no row
        found = tl.load(rows + row * width + at_d, at_d < reach, 0.0).to(tl.float32)
        if HAS_WEIGHTS:
            found *= tl.load(weights + token * CHOICES + choice).to(tl.float32)
        acc += found
    tl.store(out + token * width + at_d, acc.to(out.dtype.element_ty), is_d)


def masked(drop: Drop | None) -> dict[str, bool | int]:
    """The constants of a kernel's mask."""
    return {"DROPS": drop is not None, "LIMIT": 0 if drop is None else drop.limit}


def gated(inner_SJ: Tensor, activation: Activation, drop: Drop | None = None) -> Tensor:
    """(S, I): `activation` applied to the up projection's output (S, J); twin of `reference.gated`."""
    if activation.kind == "other":
        return reference.gated(inner_SJ, activation, drop)
    rows, width = inner_SJ.shape[0], inner_SJ.shape[1] // 2
    out_SI = inner_SJ.new_empty(rows, width)
    if rows:
        _gated[(triton.cdiv(rows, _ROWS), triton.cdiv(width, _COLUMNS))](
            inner_SJ, out_SI, inner_SJ if drop is None else drop.keys_S2, rows, width,
            activation.alpha, activation.limit, 1.0 if drop is None else drop.scale,
            CLAMPED=activation.kind == "clamped", **masked(drop), BLOCK_S=_ROWS, BLOCK_I=_COLUMNS,
        )  # fmt: skip
    return out_SI


def gated_backward(
    inner_SJ: Tensor, activation: Activation, d_inner_SI: Tensor, weight_S: Tensor, drop: Drop | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of `reference.gated_backward`; takes the same arguments."""
    if activation.kind == "other":
        return reference.gated_backward(inner_SJ, activation, d_inner_SI, weight_S, drop)
    rows, width = d_inner_SI.shape
    d_inner_SJ, inner_SI = torch.empty_like(inner_SJ), torch.empty_like(d_inner_SI)
    d_weight_S = inner_SJ.new_empty(rows, dtype=torch.float32)
    if rows:
        _gated_backward[(triton.cdiv(rows, _ROWS),)](
            inner_SJ, d_inner_SI, weight_S.contiguous(), d_inner_SJ, inner_SI, d_weight_S,
            inner_SJ if drop is None else drop.keys_S2, rows, width,
            activation.alpha, activation.limit, 1.0 if drop is None else drop.scale,
            CLAMPED=activation.kind == "clamped", **masked(drop), BLOCK_S=_ROWS, BLOCK_I=_COLUMNS,
        )  # fmt: skip
    return d_inner_SJ, inner_SI, d_weight_S


def weighted_sum(rows_SD: Tensor, found: Sorted, weights_TK: Tensor | None = None) -> Tensor:
    """Twin of `reference.weighted_sum`."""
    (tokens, choices), width = found.places_TK.shape, rows_SD.shape[1]
    dtype = rows_SD.dtype if weights_TK is None else torch.promote_types(rows_SD.dtype, weights_TK.dtype)
    out_TD = rows_SD.new_empty(tokens, width, dtype=dtype)
    block = min(1024, triton.next_power_of_2(width))
    if tokens:
        _weighted_sum[(tokens, triton.cdiv(width, block))](
            rows_SD, found.places_TK, rows_SD if weights_TK is None else weights_TK.contiguous(), out_TD,
            rows_SD.shape[0], width, CHOICES=choices, HAS_WEIGHTS=weights_TK is not None, BLOCK_D=block,
        )  # fmt: skip
    return out_TD

"""The codec of a quantised base: matrices as 4- or 8-bit numbers in blocks, with a scale for each block.

NF4 in blocks of 64 or 8-bit dynamic numbers in blocks of 256, by bitsandbytes. A scale takes 4 bytes: 4.5 bits a number
in NF4. With nested scales (double quantisation: Dettmers et al. 2023, arXiv 2305.14314, section 3) the scales less
their mean are 8-bit dynamic numbers themselves, in blocks of 256: 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import bitsandbytes.functional as codec
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

Bits = Literal[4, 8]
BLOCKS: dict[Bits, int] = {4: 64, 8: 256}  # numbers that share a scale; the codec's usual sizes
NESTED_BLOCK = 256  # scales that share a scale of theirs
_SINGLE = 4  # bytes of a number in fp32
_MOST_NUMBERS = 2**30  # per part; the codec's kernels count in 32 bits
# On a CPU bitsandbytes 0.50 encodes NF4 in torch, with copies of 30 bytes a number.
_ENCODED_AT_ONCE = 2**20


@dataclass(frozen=True)
class Coding:
    """How weights are quantised: to so many bits, and whether the scales are quantised too (4 bits only)."""

    bits: Bits
    nested: bool = False

    def __post_init__(self) -> None:
        assert not (self.nested and self.bits != 4), "the door refuses it"

    def text(self) -> str:
        """The coding for a person."""
        return ("NF4" if self.bits == 4 else "8-bit") + (" with 8-bit scales" if self.nested else "")


def bytes_of(shape: tuple[int, ...], coding: Coding) -> int:
    """Bytes of the code of (E, O, I): numbers and scales.

    >>> bytes_of((128, 1536, 2048), Coding(4)) * 8 / (128 * 1536 * 2048)
    4.5
    >>> round(bytes_of((128, 1536, 2048), Coding(4, nested=True)) * 8 / (128 * 1536 * 2048), 3)
    4.127
    """
    matrices, numbers = shape[0], math.prod(shape[1:])
    total = 0
    for first, last in _parts(matrices, numbers, coding.bits):
        blocks = (last - first) * -(-numbers // BLOCKS[coding.bits])
        total += -(-(last - first) * numbers * coding.bits // 8)
        total += blocks + _SINGLE * (-(-blocks // NESTED_BLOCK) + 1) if coding.nested else _SINGLE * blocks
    return total


def parts_of(matrices: int, numbers: int, bits: Bits) -> int:
    """The number of parts of a code of so many matrices of so many numbers; a GPU decodes each in one launch.

    >>> parts_of(128, 1536 * 2048, 4), parts_of(16, 16384 * 5120, 4)
    (1, 2)
    """
    return len(list(_parts(matrices, numbers, bits)))


def _parts(matrices: int, numbers: int, bits: Bits) -> Iterator[tuple[int, int]]:
    """The first matrix of each part, and the first that no longer belongs to it."""
    # A block across two matrices would tie their scales together and could not be split.
    together = 1 if numbers % BLOCKS[bits] else max(1, _MOST_NUMBERS // numbers)
    for first in range(0, matrices, together):
        yield first, min(first + together, matrices)


class _Scales:
    """The scales of consecutive blocks."""

    def __init__(self, scales_B: Tensor, nested: bool) -> None:
        self._stored_B, self._outer, self._offset = scales_B, None, None
        if nested:  # as `quantize_4bit` does it
            self._offset = scales_B.mean()
            self._stored_B, self._outer = codec.quantize_blockwise(scales_B - self._offset, blocksize=NESTED_BLOCK)

    @property
    def nbytes(self) -> int:
        outer = 0 if self._outer is None or self._offset is None else self._outer.absmax.nbytes + self._offset.nbytes
        return self._stored_B.nbytes + outer

    @property
    def large(self) -> list[Tensor]:
        """The tensors that grow with the number of blocks."""
        return [self._stored_B] if self._outer is None else [self._stored_B, self._outer.absmax]

    def placed(self, large: Sequence[Tensor], device: torch.device) -> "_Scales":
        """The same scales with these tensors in place of `large`, and all others on `device`."""
        made = copy.copy(self)
        made._stored_B = large[0]
        if self._outer is not None and self._offset is not None:
            made._offset = self._offset.to(device)
            made._outer = QuantState(
                large[1], code=self._outer.code.to(device), blocksize=NESTED_BLOCK, dtype=torch.float32
            )
        return made

    def of_blocks(self, first: int, last: int) -> Tensor:
        """In fp32, of the blocks from `first` to before `last`."""
        if self._outer is None or self._offset is None:
            return self._stored_B[first:last]
        begin = first // NESTED_BLOCK
        outer = QuantState(
            self._outer.absmax[begin : -(-last // NESTED_BLOCK)],
            code=self._outer.code, blocksize=NESTED_BLOCK, dtype=torch.float32,
        )  # fmt: skip
        decoded_B: Tensor = codec.dequantize_blockwise(self._stored_B[begin * NESTED_BLOCK : last], outer)
        return decoded_B[first - begin * NESTED_BLOCK :] + self._offset


@dataclass(frozen=True)
class _Part:
    """Consecutive matrices: numbers, packed and flat, scales, and the numbers' table of values."""

    packed: Tensor
    scales: _Scales
    values: Tensor


class Code:
    """Matrices (E, O, I) in `coding.bits` per number with one scale per block; a `Stored` for the ragged products.

    One part of a code holds as many matrices as possible, so that a GPU decodes them in one launch.
    """

    def __init__(self, weight_EOI: Tensor, coding: Coding) -> None:
        self.dtype, self.shape, self.coding = weight_EOI.dtype, tuple(weight_EOI.shape), coding
        self._numbers = math.prod(self.shape[1:])
        self._blocks = -(-self._numbers // BLOCKS[coding.bits])
        parts = list(_parts(self.shape[0], self._numbers, coding.bits))
        self._together = parts[0][1] if parts else 1
        self._parts = [_encode(weight_EOI[first:last], coding) for first, last in parts]

    @property
    def nbytes(self) -> int:
        """Bytes of numbers and scales."""
        return sum(part.packed.nbytes + part.scales.nbytes for part in self._parts)

    def tensors(self) -> list[Tensor]:
        """The tensors that grow with the matrices; beside them a code has tables of some 1 KB."""
        return [tensor for part in self._parts for tensor in (part.packed, *part.scales.large)]

    def placed(self, tensors: Sequence[Tensor], device: torch.device) -> "Code":
        """The same code over these tensors, which hold what `tensors()` does; its tables go to `device`."""
        made, left = copy.copy(self), list(tensors)
        made._parts = []
        for part in self._parts:
            count = len(part.scales.large)
            packed, large, left = left[0], left[1 : 1 + count], left[1 + count :]
            made._parts.append(_Part(packed, part.scales.placed(large, device), part.values.to(device)))
        assert not left
        return made

    def moved(self, device: torch.device) -> "Code":
        """The same code on another device."""
        return self.placed([tensor.to(device) for tensor in self.tensors()], device)

    def expert(self, number: int) -> Tensor:
        """(O, I), decoded."""
        part, place = divmod(number, self._together)
        return self._decode(self._parts[part], place, place + 1).view(self.shape[1:])

    def whole(self) -> Tensor:
        """(E, O, I), decoded."""
        held = [part.packed.numel() * 8 // self.coding.bits // self._numbers for part in self._parts]
        decoded = [self._decode(part, 0, count) for part, count in zip(self._parts, held, strict=True)]
        return (decoded[0] if len(decoded) == 1 else torch.cat(decoded)).view(self.shape)

    def _decode(self, part: _Part, first: int, last: int) -> Tensor:
        """All numbers of the matrices of a part from `first` to before `last`."""
        bits, numbers = self.coding.bits, (last - first) * self._numbers
        begin = first * self._numbers * bits // 8
        packed = part.packed[begin : begin + -(-numbers * bits // 8)]
        scales_B = part.scales.of_blocks(first * self._blocks, last * self._blocks)
        # Flat: on a CPU bitsandbytes 0.50 decodes a matrix row by row, and silently wrong if the row length is not a
        # multiple of the block size.
        state = QuantState(scales_B, (numbers,), part.values, BLOCKS[bits], "nf4", self.dtype)
        decoded: Tensor = (
            codec.dequantize_4bit(packed.unsqueeze(-1), state)
            if bits == 4
            else codec.dequantize_blockwise(packed, state)
        )
        return decoded.flatten()


def _encode(matrices_NOI: Tensor, coding: Coding) -> _Part:
    """Encode matrices that form a part, some at a time: blocks do not depend on each other."""
    bits, total, device = coding.bits, matrices_NOI.numel(), matrices_NOI.device
    packed = torch.empty(-(-total * bits // 8), dtype=torch.uint8, device=device)
    scales_B = torch.empty(-(-total // BLOCKS[bits]), dtype=torch.float32, device=device)
    place, values = 0, torch.empty(0)
    at_once = max(1, _ENCODED_AT_ONCE // max(1, math.prod(matrices_NOI.shape[1:])))
    for some_NOI in torch.split(matrices_NOI, at_once):
        # A transposed weight is copied here.
        for piece in torch.split(some_NOI.contiguous().flatten(), _ENCODED_AT_ONCE):
            numbers, state = (
                codec.quantize_4bit(piece, blocksize=BLOCKS[4], quant_type="nf4")
                if bits == 4
                else codec.quantize_blockwise(piece, blocksize=BLOCKS[8])
            )
            packed[place * bits // 8 :][: numbers.numel()] = numbers.flatten()
            scales_B[place // BLOCKS[bits] :][: state.absmax.numel()] = state.absmax
            place, values = place + piece.numel(), state.code
    return _Part(packed, _Scales(scales_B, coding.nested), values)

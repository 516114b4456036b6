"""Dropout by formula: whether a number is dropped follows from a seed and its place, so backward computes it again.

Nothing is stored between forward and backward but the seed, so a layer that recomputes its activations can have
dropout. The formula works on 32-bit words, all sums and products modulo 2^32, and its two implementations, in plain
torch here and in Triton (`pointwise.kept`), give the same bits. For a seed, a stream (which of a layer's dropouts), the
id of a row and a column:

    mix(x):  x ^= x >> 16;  x *= 0x21F0AAAD;  x ^= x >> 15;  x *= 0x735A2D97;  x ^= x >> 15
    a = mix(seed low + stream * 0x61C88647);      b = mix(seed high ^ a)
    first = mix(id + a);                          second = mix(first ^ b)
    h = first + column * 0x61C88647;  h ^= h >> 16;  h *= 0x21F0AAAD;  h ^= second;  h ^= h >> 15;  h *= 0x735A2D97
    kept if the lower 31 bits of h are >= round(share * 2^31)

Multipliers and shifts are those of a 32-bit hash with low bias that Chris Wellons found by search (hash-prospector,
public domain); the summand is 2^32 over the golden ratio, negated. Keys of rows are computed once per call, so a kernel
spends ten integer operations on a number. Philox, as in `tl.rand`, takes some sixteen, and its twin in torch some
hundred passes over memory.

The id of a row is the place of its choice, token * K + k, and not its place among the rows sorted by expert: padding
rows and tiles don't change which numbers of real rows are dropped. Seeds come from torch's generator on the CPU, whose
state checkpoints keep and gradient checkpointing restores, and which each process of a job seeds differently.

>>> ids = torch.tensor([0, 1])
>>> Drop(0.5, seed=1, stream=UP, ids_S=ids).keep(8).int().tolist()
[[1, 0, 1, 0, 0, 0, 1, 1], [1, 1, 0, 0, 1, 0, 1, 1]]
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

UP, INNER, DOWN = 0, 1, 2  # streams: LoRA on the up projection, the inner activation, LoRA on the down projection
STEP, FIRST, SECOND = 0x61C88647, 0x21F0AAAD, 0x735A2D97
BITS = 31
_WORD = 0xFFFFFFFF
_AT_ONCE = 1 << 18  # numbers whose words are computed at once: they fit into a core's cache


@dataclass(frozen=True)
class Drop:
    """Which numbers of (S, I) are dropped.

    Attributes:
        share: dropped share.
        seed: less than 2^62.
        stream: which of a layer's dropouts.
        ids_S: id of each row.
        exact: use the formula on a GPU too. Else plain torch draws there with a generator of this seed: the formula
            would take ten passes over memory, and that takes one.
    """

    share: float
    seed: int
    stream: int
    ids_S: Tensor = field(repr=False)
    exact: bool = False

    @property
    def limit(self) -> int:
        """Words below it are dropped."""
        return limit_of(self.share)

    @property
    def scale(self) -> float:
        """What keeps the mean: 1 over the kept share."""
        return scale_of(self.share)

    @cached_property
    def keys_S2(self) -> Tensor:
        """(S, 2), int32: `first` and `second` of each row."""
        a, b = _seeds(self.seed, self.stream)
        first_S = _mix(self.ids_S.int() + _signed(a))
        return torch.stack([first_S, _mix(first_S ^ _signed(b))], dim=1)

    def keep(self, columns: int) -> Tensor:
        """(S, columns), bool: what is kept."""
        device = self.ids_S.device
        kept_SI = torch.empty(self.ids_S.shape[0], columns, dtype=torch.bool, device=device)
        if device.type != "cpu" and not self.exact:
            a, b = _seeds(self.seed, self.stream)
            generator = torch.Generator(device).manual_seed((a << 31) ^ b)
            return kept_SI.bernoulli_(1 - self.share, generator=generator)
        steps_I = torch.arange(columns, device=device, dtype=torch.int32) * STEP
        rows = max(1, _AT_ONCE // max(1, columns))
        for begin in range(0, kept_SI.shape[0], rows):
            first_S1, second_S1 = self.keys_S2[begin : begin + rows].unbind(dim=1)
            words = first_S1.unsqueeze(1) + steps_I
            words ^= (words >> 16).bitwise_and_(_WORD >> 16)
            words *= FIRST
            words ^= second_S1.unsqueeze(1)
            words ^= (words >> 15).bitwise_and_(_WORD >> 15)
            words *= SECOND
            torch.ge(words.bitwise_and_(_WORD >> 1), self.limit, out=kept_SI[begin : begin + rows])
        return kept_SI

    def of(self, rows_SI: Tensor) -> Tensor:
        """The rows with zeros where they are dropped; not scaled."""
        return rows_SI.masked_fill(~self.keep(rows_SI.shape[1]), 0)


class Dropout(NamedTuple):
    """The dropout of one pass through a layer.

    Attributes:
        seed: of all its streams.
        inner: dropped share of the inner activation; LoRA's shares are in `Lora`.
        exact: see `Drop`.
    """

    seed: int
    inner: float = 0.0
    exact: bool = False

    def drop(self, stream: int, share: float, ids_S: Tensor) -> Drop | None:
        """What is dropped of rows with these ids; None: nothing."""
        return Drop(share, self.seed, stream, ids_S, self.exact) if share else None


def draw_seed() -> int:
    """A seed from torch's generator on the CPU, also where tensors have no numbers (`compute.planning`)."""
    with unset_fake_temporarily():
        return int(torch.randint(0, 2**62, (), device="cpu"))


def limit_of(share: float) -> int:
    """`share` as the formula has it, in 2^-31.

    >>> limit_of(0.0), limit_of(0.25)
    (0, 536870912)
    """
    return min(round(share * (1 << BITS)), (1 << BITS) - 1)


def scale_of(share: float) -> float:
    """1 over the kept share.

    >>> scale_of(0.0), scale_of(0.5)
    (1.0, 2.0)
    """
    return 1 / (1 - limit_of(share) / (1 << BITS))


def _seeds(seed: int, stream: int) -> tuple[int, int]:
    a = _mixed((seed & _WORD) + stream * STEP & _WORD)
    return a, _mixed(seed >> 32 ^ a)


def _mixed(word: int) -> int:
    word ^= word >> 16
    word = word * FIRST & _WORD
    word ^= word >> 15
    word = word * SECOND & _WORD
    return word ^ word >> 15


def _mix(words: Tensor) -> Tensor:
    """`_mixed` of int32 words, whose shifts keep the sign and whose products wrap around."""
    words = words ^ ((words >> 16) & (_WORD >> 16))
    words = words * FIRST
    words = words ^ ((words >> 15) & (_WORD >> 15))
    words = words * SECOND
    return words ^ ((words >> 15) & (_WORD >> 15))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word

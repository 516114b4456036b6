"""`RowSample`: some rows of a data set, kept while all of them are copied."""

import random
from collections.abc import Mapping
from typing import NamedTuple

FIRST = 32
SPREAD = 32
LIMIT_BYTES = 256 * 1024


class SampledRow(NamedTuple):
    """A row in its canonical form; `number` is its number in the data set, from 1."""

    number: int
    row: Mapping[str, object]
    size_bytes: int


class RowSample:
    """The first 32 conversations, and 32 more of the whole set, at most 256 KB.

    A longer row than half of that is left out, and so is a plain text, which no chat template renders. The same data
    set gives the same sample.
    """

    def __init__(self) -> None:
        self._first: list[SampledRow] = []
        self._spread: list[SampledRow] = []
        self._offered = 0
        self._random = random.Random(0)

    def offer(self, number: int, row: Mapping[str, object], size_bytes: int) -> None:
        """Keep a row, or not."""
        if "text" in row or size_bytes > LIMIT_BYTES // 2:
            return
        sampled = SampledRow(number, row, size_bytes)
        if len(self._first) < FIRST:
            self._first.append(sampled)
            return
        # Algorithm R (Vitter 1985): each of the offered rows is kept with the same probability.
        self._offered += 1
        place = len(self._spread) if len(self._spread) < SPREAD else self._random.randrange(self._offered)
        self._spread[place : place + 1] = [sampled] if place < SPREAD else []

    def rows(self) -> list[SampledRow]:
        """The kept rows by their numbers, without those that exceed the size."""
        kept, left = [], LIMIT_BYTES
        # Long rows at the beginning leave room for others.
        order = [row for pair in zip(self._first, self._spread, strict=False) for row in pair]
        order += self._first[len(self._spread) :]
        for sampled in order:
            if sampled.size_bytes <= left:
                left -= sampled.size_bytes
                kept.append(sampled)
        return sorted(kept, key=lambda sampled: sampled.number)

"""Mix several data sets in one batch: choose which rows go together, and collate them.

An epoch goes over the rows of the first set (`break`). Each of them comes with rows of the other sets, by their ratios:
with a ratio of 1.5, one and two rows in turn.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from llama_stack_provider_moe.compute.data.sampling import EpochSampler, folded

Part = Literal["break", "retain", "safe"]
PARTS: tuple[Part, ...] = get_args(Part)
IGNORED = -100
Item = tuple[tuple[Part, int], ...]
Row = dict[str, Any]  # token ids and marks, and the name of the part


class RowSet(Protocol):
    """A data set: its rows by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Row: ...


class Mixture(Dataset[list[Row]]):
    """The rows of a training item, which a `MixtureSampler` chooses; its length is that of the first set."""

    def __init__(self, sets: Mapping[Part, RowSet]) -> None:
        self.sets = dict(sets)

    def __len__(self) -> int:
        return len(self.sets["break"])

    def __getitem__(self, item: Item) -> list[Row]:
        return [{"part": part, **self.sets[part][row]} for part, row in item]


class HeldOutRows(Dataset[list[Row]]):
    """Every held-out row of every set, one after the other."""

    def __init__(self, sets: Mapping[Part, RowSet]) -> None:
        self._mixture = Mixture(sets)
        self.sets = self._mixture.sets
        self._items: list[Item] = [((part, row),) for part, rows in sets.items() for row in range(len(rows))]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> list[Row]:
        return self._mixture[self._items[index]]


class MixtureSampler(Sampler[Item]):
    """The items of one epoch; every choice depends only on (seed, epoch), so a resumed run sees the same rows.

    Args:
        rows: the number of rows of each set.
        ratios: rows of each other set for one row of the first.
        most: the maximum number of items in an epoch.
        shuffle: true permutes each set anew in every epoch; false keeps its order, and the other sets continue where
            the previous epoch ended.
        seed: of the permutations.
    """

    def __init__(
        self, rows: Mapping[Part, int], ratios: Mapping[Part, float], most: int, shuffle: bool, seed: int
    ) -> None:
        self._first = EpochSampler(rows["break"], most, shuffle, seed)
        self._rows = dict(rows)
        self._ratios = dict(ratios)
        self._shuffle = shuffle
        self._seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; accelerate calls this before each one."""
        self._first.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._first)

    def __iter__(self) -> Iterator[Item]:
        streams = {part: self._stream(part) for part in self._ratios}
        for position, row in enumerate(self._first):
            others = [
                (part, next(streams[part]))
                for part, ratio in self._ratios.items()
                for _ in range(_due(position + 1, ratio) - _due(position, ratio))
            ]
            yield (("break", row), *others)

    def _stream(self, part: Part) -> Iterator[int]:
        rows, epoch = self._rows[part], self._first.epoch
        if self._shuffle:
            seed = folded((PARTS.index(part) << 48) + (self._seed << 16) + epoch)
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
            start = 0
        else:
            order, start = list(range(rows)), epoch * _due(len(self), self._ratios[part])
        while True:
            yield order[start % rows]
            start += 1


def _due(items: int, ratio: float) -> int:
    """Rows that come with the first `items` items; the tiny term is for ratios such as 0.29, which are not exact
    binary numbers."""
    return math.floor(items * ratio + 1e-9)


class Collator:
    """Makes a batch from items: rows of `break` first, then `retain`, then `safe`, padded on the right.

    Columns: `input_ids`, `attention_mask`; `counted`: 1 for tokens whose states the losses use; `labels`: the
    assistant's tokens of retained rows, for their perplexity; `part`: (B,), index into `PARTS`; `answer_at`: (B,), the
    last token before the answer.

    Args:
        pad_id: the token that fills rows shorter than the longest.
        answers_alone: whether only the answer of break rows counts; retained rows always count whole.
    """

    def __init__(self, pad_id: int, answers_alone: bool) -> None:
        self._pad_id = pad_id
        self._answers_alone = answers_alone

    def __call__(self, items: Sequence[list[Row]]) -> dict[str, Tensor]:
        rows = sorted((row for item in items for row in item), key=lambda row: PARTS.index(row["part"]))
        said = [[bool(token) for token in row["said"]] for row in rows]
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(values: list[list[int]], filler: int) -> Tensor:
            return torch.tensor([each + [filler] * (longest - len(each)) for each in values])

        of_break = [row["part"] == "break" for row in rows]
        counted = [
            [int(token or not (broken and self._answers_alone)) for token in tokens]
            for broken, tokens in zip(of_break, said, strict=True)
        ]
        labels = [
            [token if learnt and not broken else IGNORED for token, learnt in zip(ids, tokens, strict=True)]
            for ids, broken, tokens in zip([row["input_ids"] for row in rows], of_break, said, strict=True)
        ]
        return {
            "input_ids": padded([row["input_ids"] for row in rows], self._pad_id),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "counted": padded(counted, 0),
            "labels": padded(labels, IGNORED),
            "part": torch.tensor([PARTS.index(row["part"]) for row in rows]),
            "answer_at": torch.tensor([max(0, tokens.index(True) - 1) for tokens in said]),
        }

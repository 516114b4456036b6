"""Rows of several domains: a data set with a column for the domain, an order that mixes them, and batches that know it.

An epoch has a fixed number of rows of each domain (`spec.data.epoch_counts`), spread evenly over it, so that every
step has the ratios within a row or two. A domain's rows come in passes: all of them once, in the order of a permutation
that depends only on (seed, domain, pass), and then the next pass. An epoch continues each domain where the one before
ended, so all rows of a domain are used equally often, give or take one time. All of it follows from (seed, epoch): a
resumed run sees the same rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from torch.utils.data import Sampler

from llama_stack_provider_moe.compute.data.sampling import folded
from llama_stack_provider_moe.spec.data import Data, epoch_counts, ratios_of, require_few_passes

COLUMN = "domain"  # of rows and batches: the domain's index
Split = tuple[Dataset, Dataset | None]  # training rows, held-out rows
Collate = Callable[[list[Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Domains:
    """The domains of a job's rows.

    Attributes:
        names: in the job's order; a row's domain is an index into them.
        rows: training rows of each.
        held_out: held-out rows of each.
        tokens: of the training rows of each; of pairs, of the longer answer with its prompt.
        epoch: rows of each in one epoch, without a limit on its steps.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    held_out: tuple[int, ...]
    tokens: tuple[int, ...]
    epoch: tuple[int, ...]

    def as_json(self, most: int, epochs: int) -> list[dict[str, object]]:
        """What a run will read of each domain, for its plan.

        Args:
            most: the maximum number of rows in an epoch.
            epochs: of the run.
        """
        used = spread(self.epoch)[:most].bincount(minlength=len(self.names)).tolist()
        return [
            {
                "name": name,
                "rows": self.rows[index],
                "tokens": self.tokens[index],
                "held_out_rows": self.held_out[index],
                "rows_an_epoch": used[index],
                "share": round(used[index] / sum(used), 6),
                "times_seen": round(used[index] * epochs / self.rows[index], 6),
            }
            for index, name in enumerate(self.names)
        ]


def mix(
    data: Data, splits: Mapping[str, Split], lengths: Callable[[Dataset], Tensor]
) -> tuple[Dataset, Dataset | None, Domains]:
    """The training rows of all domains, one domain after the other, their held-out rows, and the domains.

    Args:
        data: a block with domains, or a column of them.
        splits: name of each domain -> its training rows and its held-out rows.
        lengths: the number of tokens of each row of a set.

    Raises:
        InvalidInput: an epoch would repeat a domain too often.
    """
    rows = {name: len(train) for name, (train, _) in splits.items()}
    require_few_passes(data, rows)
    made = [*splits.values()]
    domains = Domains(
        names=tuple(rows),
        rows=tuple(rows.values()),
        held_out=tuple(0 if held_out is None else len(held_out) for _, held_out in made),
        tokens=tuple(int(lengths(train).sum()) for train, _ in made),
        epoch=tuple(epoch_counts([*rows.values()], ratios_of(data, rows), data.exhausted)),
    )
    train = concatenate_datasets([_marked(each, index) for index, (each, _) in enumerate(made)])
    held = [_marked(each, index) for index, (_, each) in enumerate(made) if each is not None]
    return train, concatenate_datasets(held) if held else None, domains


def _marked(rows: Dataset, domain: int) -> Dataset:
    return rows.add_column(COLUMN, [domain] * len(rows))


def spread(counts: Sequence[int]) -> Tensor:
    """The domain of each row of an epoch: `counts` rows of each, as evenly as possible.

    >>> spread([4, 2]).tolist()
    [0, 1, 0, 0, 1, 0]
    """
    # Row k of a domain's n belongs at (k + 1/2) / n of the epoch.
    times = torch.cat([(torch.arange(count, dtype=torch.float64) + 0.5) / count for count in counts])
    domains = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return domains[times.argsort(stable=True)]


class DomainSampler(Sampler[int]):
    """The row indices of one epoch, with the domains mixed; see the module.

    Args:
        domains: of the rows.
        most: the maximum number of rows in an epoch.
        shuffle: whether to permute each domain's rows, anew for every pass.
        seed: of the permutations.
    """

    def __init__(self, domains: Domains, most: int, shuffle: bool, seed: int) -> None:
        self.domains = domains
        self.order = spread(domains.epoch)[:most]
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; accelerate calls this before each one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        indices = torch.empty(len(self.order), dtype=torch.int64)
        first = 0
        for domain, rows in enumerate(self.domains.rows):
            places = (self.order == domain).nonzero().flatten()
            indices[places] = first + self._next(domain, rows, len(places))
            first += rows
        return iter(indices.tolist())

    def _next(self, domain: int, rows: int, count: int) -> Tensor:
        """The next `count` rows of a domain: those after the rows of earlier epochs."""
        begin = self.epoch * count
        passes = range(begin // rows, -(-(begin + count) // rows))
        found = torch.cat([self._pass(domain, rows, each) for each in passes] or [torch.empty(0, dtype=torch.int64)])
        skipped = begin % rows
        return found[skipped : skipped + count]

    def _pass(self, domain: int, rows: int, number: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(rows)
        generator = torch.Generator().manual_seed(folded((domain << 48) + (self.seed << 16) + number))
        return torch.randperm(rows, generator=generator)


class DomainCollator:
    """A collator that also puts each row's domain into the batch: `COLUMN`, (rows,)."""

    def __init__(self, collate: Collate) -> None:
        self._collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        bare = [{name: value for name, value in row.items() if name != COLUMN} for row in rows]
        return {**self._collate(bare), COLUMN: torch.tensor([row[COLUMN] for row in rows])}


def runs_by_domain(held_out: Sequence[int], length: int) -> list[tuple[int, ...]]:
    """Runs of at most `length` held-out rows, each of one domain.

    >>> runs_by_domain([3, 2], 2)
    [(0, 1), (2,), (3, 4)]

    Args:
        held_out: held-out rows of each domain, which follow each other.
        length: of a run, at most.
    """
    runs: list[tuple[int, ...]] = []
    first = 0
    for rows in held_out:
        runs += batched(range(first, first + rows), length)
        first += rows
    return runs

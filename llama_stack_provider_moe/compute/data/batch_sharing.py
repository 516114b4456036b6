"""Divide a step's rows among the processes of a job.

`P` processes with micro-batches of `b` rows compute the same as one process with micro-batches of `P * b`: of each run
of `P * b` rows in the sampler's order, process p gets the p-th part. If an epoch's last run is shorter, its parts
differ by at most one row. accelerate's own division would fill the last run with the epoch's first rows, which would
then count twice.

Every process must take part in every micro-batch, or the others wait forever for its gradients. A process that gets no
row runs a row of another process as ballast, which does not count.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import batched
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments

from llama_stack_provider_moe.compute.runtime.peers import Peers

IGNORED = -100
SHARE = "rows_that_count"  # in this process's part of a micro-batch
TOKEN_SHARE = "share_of_the_steps_tokens"  # a micro-batch's tokens in all processes, divided by its step's
Batch = dict[str, Any]  # tensors, and what a recipe's collator adds


class Ballast(NamedTuple):
    """A row, or its index, that does not count."""

    of: object


class SizedIterable(Protocol):
    """The rows of an epoch in order: a sampler, or a list."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[object]: ...


@runtime_checkable
class HasEpochs(Protocol):
    """An order that differs between epochs."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""


class RandomAccess(Protocol):
    """A data set whose rows are found by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> object: ...


Collate = Callable[[list[Any]], Mapping[str, Any] | list[Any]]


def part_of(rows: Sequence[object], rank: int, size: int) -> list[object]:
    """The contiguous part of process `rank`; parts differ by at most one row.

    >>> [part_of(range(7), rank, 3) for rank in range(3)]
    [[0, 1, 2], [3, 4], [5, 6]]
    >>> part_of("a", 1, 2)
    [Ballast(of='a')]
    """
    whole, more = divmod(len(rows), size)
    first = rank * whole + min(rank, more)
    mine = list(rows[first : first + whole + (rank < more)])
    return mine or [Ballast(rows[0])]


class SharedBatches(Sampler[list[object]]):
    """The micro-batches of one process.

    Args:
        order: the rows of an epoch in order, the same in all processes.
        batch_size: rows per process.
        peers: the job's processes.
    """

    def __init__(self, order: SizedIterable, batch_size: int, peers: Peers) -> None:
        self._order = order
        self._run = batch_size * peers.size
        self._peers = peers
        # transformers 5.23 calls `set_epoch` on this attribute, with and without batches to skip.
        self.batch_sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; transformers calls this before each one."""
        if isinstance(self._order, HasEpochs):
            self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self._order) // self._run)

    def __iter__(self) -> Iterator[list[object]]:
        for run in batched(self._order, self._run):
            yield part_of(run, self._peers.rank, self._peers.size)


class SharedRuns(Sampler[list[object]]):
    """The micro-batches of one process, of runs that are given: each is divided as in `SharedBatches`.

    Args:
        runs: the rows of each micro-batch of all processes.
        peers: the job's processes.
    """

    def __init__(self, runs: Sequence[Sequence[object]], peers: Peers) -> None:
        self._runs = runs
        self._peers = peers
        self.batch_sampler = self  # as in `SharedBatches`

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[list[object]]:
        for run in self._runs:
            yield part_of(run, self._peers.rank, self._peers.size)


class SharedRows(Dataset[object]):
    """A data set that can also return a row as ballast."""

    def __init__(self, rows: RandomAccess) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: object) -> object:
        return Ballast(self._rows[index.of]) if isinstance(index, Ballast) else self._rows[index]


class SharedCollator:
    """A collator that adds to a batch how many of its rows count (`SHARE`), and makes ballast not count.

    It empties the columns by which a loss counts tokens (`labels`, `counted`); a recipe weighs other losses itself.
    Where the collator only lists its rows, as in a recipe that generates, ballast stays marked in the list.
    """

    def __init__(self, collate: Collate) -> None:
        self._collate = collate

    def __call__(self, rows: list[Any]) -> Batch | list[Any]:
        is_ballast = isinstance(rows[0], Ballast)
        made = self._collate([row.of for row in rows] if is_ballast else rows)
        if isinstance(made, list):
            return rows
        if not is_ballast:
            return {**made, SHARE: torch.tensor(len(rows))}
        batch = dict(made)
        for name, empty in (("labels", IGNORED), ("counted", 0)):
            if name in batch:
                batch[name] = torch.full_like(batch[name], empty)
        return {**batch, SHARE: torch.tensor(0)}


def loader(
    rows: RandomAccess, batches: Sampler[list[object]], collate: Collate, args: TrainingArguments
) -> DataLoader[Batch]:
    """A loader of one process's micro-batches.

    Do not give it to accelerate, which would divide the rows again, and at an epoch's end remove from gathered values
    the rows that it takes for duplicates.

    Args:
        rows: the data set.
        batches: the micro-batches of this process.
        collate: makes a batch from rows.
        args: settings of the loader's helper processes.
    """
    return DataLoader(
        cast("Dataset[Batch]", SharedRows(rows)),  # torch types a loader by its rows
        batch_sampler=batches,
        collate_fn=SharedCollator(collate),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
    )


def counts(inputs: Mapping[str, Any] | list[Any]) -> bool:
    """Whether a batch counts: false for ballast, true for a batch that is not shared."""
    if isinstance(inputs, list):
        return not isinstance(inputs[0], Ballast)
    return SHARE not in inputs or bool(inputs[SHARE] > 0)


def pop_share(inputs: Batch) -> int | None:
    """Remove from a shared batch how many of its rows count, which is not an input of the model; None: not shared."""
    rows = inputs.pop(SHARE, None)
    return None if rows is None else int(rows)


def weights(inputs: Mapping[str, Tensor], share: int | None) -> Tensor | None:
    """A mask of the tokens that count: the attention mask, or zeros for ballast; None if all tokens count."""
    mask: Tensor | None = inputs.get("attention_mask")
    if share is None or share:
        return mask
    return torch.zeros_like(inputs["input_ids"])


def tokens(inputs: Mapping[str, Tensor]) -> float:
    """The number of a micro-batch's tokens that routers see and that count; without a mask (packed rows) all."""
    if not counts(inputs):
        return 0.0
    mask = inputs.get("attention_mask")
    return float(inputs["input_ids"].numel() if mask is None else mask.sum())


def _of_each(value: Any, change: Callable[[Tensor], Tensor]) -> object:
    """A tensor with one dimension at least, or each of a tuple or list of them, detached and changed."""
    if isinstance(value, tuple | list):
        return type(value)(_of_each(one, change) for one in value)
    return change(value.detach().reshape(-1) if value.dim() == 0 else value.detach())


@contextmanager
def as_if_alike(accelerator: Any, size: int) -> Iterator[None]:
    """Inside, accelerate's collectives return what they would if all processes had this one's values.

    So each process evaluates other numbers of rows than the others, and TRL still finds its own where it looks for
    them.

    Args:
        accelerator: accelerate's.
        size: number of processes.
    """
    if size == 1:
        yield
        return

    def gather(value: Any, **_: object) -> object:
        return _of_each(value, lambda own: torch.cat([own] * size))

    def reduce(value: Tensor, reduction: str = "sum", **_: object) -> Tensor:
        assert reduction == "sum", "TRL divides sums by counts"
        return value * size

    accelerator.gather, accelerator.gather_for_metrics, accelerator.reduce = gather, gather, reduce
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics, accelerator.reduce


@contextmanager
def local_metrics(accelerator: Any, share: int | None) -> Iterator[None]:
    """Inside, TRL gathers for its metrics only this process's values, without ballast; `step_figures` sums them later.

    accelerate can gather only tensors of one shape, and hangs or fails at an epoch's end.
    """
    if share is None:
        yield
        return

    def gather(value: Any, **_: object) -> object:
        return _of_each(value, lambda own: own[:0] if share == 0 else own)

    accelerator.gather = accelerator.gather_for_metrics = gather
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics


@contextmanager
def ungathered(accelerator: Any) -> Iterator[None]:
    """Inside, `gather` returns this process's values, of ballast too: for a figure that is left out afterwards.

    `local_metrics` gathers nothing of ballast, and TRL fails on the smallest of no rewards.
    """
    before = vars(accelerator).get("gather")
    accelerator.gather = lambda value: value
    try:
        yield
    finally:
        del accelerator.gather
        if before is not None:
            accelerator.gather = before

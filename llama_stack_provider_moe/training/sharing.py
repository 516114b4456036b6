"""A step's rows among the processes of a job: who gets which, and what one does that gets none.

`P` processes with micro-batches of `b` rows are to do what one process does with micro-batches of `P * b`: of each run
of `P * b` rows in the sampler's order, process p gets the p-th part. Where an epoch's last run is shorter its parts
differ by a row at most. accelerate's own division fills up the last run with the epoch's first rows, which would then
count twice.

Every process must take part in every micro-batch, or the others wait for its gradients for ever. One that gets no row
passes a row of another along as ballast, which counts for nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import batched
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments

from llama_stack_provider_moe.training.peers import Peers

IGNORED = -100
SHARE, OF_ALL = "rows_that_count", "rows_of_all_processes"


@dataclass(frozen=True)
class Share:
    """Rows of a micro-batch that count: in this process, and in all (0: nobody has counted)."""

    mine: int
    of_all: int


class Ballast(NamedTuple):
    """A row, or its index, that counts for nothing."""

    of: Any


def part_of(rows: Sequence[Any], rank: int, size: int) -> list[Any]:
    """The part of process `rank`, contiguous; parts differ by one row at most.

    >>> [part_of(range(7), rank, 3) for rank in range(3)]
    [[0, 1, 2], [3, 4], [5, 6]]
    >>> part_of("a", 1, 2)
    [Ballast(of='a')]
    """
    whole, more = divmod(len(rows), size)
    first = rank * whole + min(rank, more)
    mine = list(rows[first : first + whole + (rank < more)])
    return mine or [Ballast(rows[0])]


class SharedBatches(Sampler[list[Any]]):
    """The micro-batches of one process.

    Args:
        order: the rows of an epoch, in order; the same in all processes.
        batch_size: rows of one process.
        peers: the processes.
    """

    def __init__(self, order: Any, batch_size: int, peers: Peers) -> None:
        self._order = order
        self._run = batch_size * peers.size
        self._peers = peers
        # Where transformers 5.23 looks for what is to be told the epoch, with and without batches to be skipped.
        self.batch_sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers before each epoch."""
        if hasattr(self._order, "set_epoch"):
            self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self._order) // self._run)

    def __iter__(self) -> Iterator[list[Any]]:
        for run in batched(self._order, self._run):
            yield part_of(run, self._peers.rank, self._peers.size)


class SharedRows(Dataset[Any]):
    """A data set whose rows can be asked for as ballast."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return Ballast(self._rows[index.of]) if isinstance(index, Ballast) else self._rows[index]


class SharedCollator:
    """A collator whose batches also say how many of their rows count (`SHARE`); ballast is made to count for nothing.

    What a loss counts by (`labels`, `counted`) is emptied; what it does not is the recipe's to weigh.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self._collate = collate

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        if not isinstance(rows[0], Ballast):
            return {**self._collate(rows), SHARE: torch.tensor(len(rows))}
        batch = dict(self._collate([row.of for row in rows]))
        for name, empty in (("labels", IGNORED), ("counted", 0)):
            if name in batch:
                batch[name] = torch.full_like(batch[name], empty)
        return {**batch, SHARE: torch.tensor(0)}


def loader(rows: Any, order: Any, batch_size: int, collate: Any, args: TrainingArguments, peers: Peers) -> Any:
    """A loader of one process's micro-batches.

    accelerate knows nothing of it: it would divide the rows again, and cut what is gathered at an epoch's end by the
    rows that it believes to be there twice.
    """
    return DataLoader(
        SharedRows(rows),
        batch_sampler=SharedBatches(order, batch_size, peers),
        collate_fn=SharedCollator(collate),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
    )


def counts(inputs: Mapping[str, Any]) -> bool:
    """False for ballast; a batch that is not shared counts."""
    return SHARE not in inputs or bool(inputs[SHARE] > 0)


def taken(inputs: dict[str, Any]) -> Share | None:
    """What a batch says of its share, taken out of it, for the model knows no such input; None of one not shared."""
    mine, of_all = inputs.pop(SHARE, None), inputs.pop(OF_ALL, None)
    return None if mine is None else Share(int(mine), 0 if of_all is None else int(of_all))


def weights(inputs: Mapping[str, Any], share: Share | None) -> Tensor | None:
    """The attention mask by which tokens count: of ballast none does. None: all do."""
    mask: Tensor | None = inputs.get("attention_mask")
    if share is None or share.mine:
        return mask
    return torch.zeros_like(inputs["input_ids"])


@contextmanager
def gathering(accelerator: Any, share: Share | None, peers: Peers) -> Iterator[None]:
    """Inside, what TRL gathers for its metrics may be of another length in each process, and of ballast is nothing.

    accelerate's own gathers tensors of one shape alone, and hangs or fails at an epoch's end.
    """
    if share is None or share.of_all == share.mine * peers.size:  # parts differ by one row at most: none does here
        yield
        return

    def gather(value: Any, **_: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(gather(one) for one in value)
        flat = value.detach().reshape(-1) if value.dim() == 0 else value.detach()
        return _all_rows(flat[:0] if share.mine == 0 else flat, peers)

    accelerator.gather = accelerator.gather_for_metrics = gather
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics


def _all_rows(mine: Tensor, peers: Peers) -> Tensor:
    """Every process's rows, one process after the other."""
    lengths = torch.zeros(peers.size, dtype=torch.long, device=mine.device)
    lengths[peers.rank] = mine.shape[0]
    there: list[int] = peers.sum(lengths).tolist()
    rows = mine.new_zeros((sum(there), *mine.shape[1:]))
    first = sum(there[: peers.rank])
    rows[first : first + mine.shape[0]] = mine
    return peers.sum(rows)

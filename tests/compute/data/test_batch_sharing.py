"""How a step's rows are divided among processes, in one process that takes each part in turn."""

import doctest
from collections.abc import Iterator
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

from llama_stack_provider_moe.compute.data import batch_sharing
from llama_stack_provider_moe.compute.data.batch_sharing import SHARE, Ballast, SharedBatches, SharedCollator, part_of
from llama_stack_provider_moe.compute.recipes.circuit_breaker.trainer import _idle, counted, row_pairs
from llama_stack_provider_moe.compute.runtime.peers import ALONE, Peers


def test_examples() -> None:
    outcome = doctest.testmod(batch_sharing)
    assert (outcome.failed, outcome.attempted) == (0, 2)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", range(1, 12))
def test_parts_are_the_rows_in_order(count: int, size: int) -> None:
    """Together they are all rows, each once. Sizes differ by at most one; an empty part gets the first row."""
    rows = [f"row {i}" for i in range(count)]
    parts = [part_of(rows, rank, size) for rank in range(size)]
    own = [[row for row in part if not isinstance(row, Ballast)] for part in parts]
    assert list(chain(*own)) == rows
    assert max(map(len, own)) - min(map(len, own)) <= 1
    assert all(part == [Ballast("row 0")] for part, mine in zip(parts, own, strict=True) if not mine)


class Order:
    """Rows in an order that differs by epoch."""

    def __init__(self, rows: int) -> None:
        self.rows, self.epoch = rows, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        return ((i + self.epoch) % self.rows for i in range(self.rows))


@pytest.mark.parametrize(("rows", "micro_batches"), [(12, 2), (13, 3), (17, 3), (18, 3), (1, 1)])
def test_micro_batches_of_all_processes_are_those_of_one(rows: int, micro_batches: int) -> None:
    """Two processes with micro-batches of 3 rows match one with micro-batches of 6, in every epoch's order."""
    processes = [SharedBatches(Order(rows), 3, Peers(rank, 2)) for rank in (0, 1)]
    for epoch in (0, 2):
        for each in processes:
            assert each.batch_sampler is each, "transformers calls set_epoch there"
            each.batch_sampler.set_epoch(epoch)
        found = [list(each) for each in processes]
        assert [len(each) for each in processes] == [len(each) for each in found] == [micro_batches] * 2
        joined = [
            [row for row in [*first, *second] if not isinstance(row, Ballast)]
            for first, second in zip(*found, strict=True)
        ]
        order = [(i + epoch) % rows for i in range(rows)]
        assert joined == [order[i : i + 6] for i in range(0, rows, 6)]
    fixed = SharedBatches(range(rows), 3, ALONE)
    fixed.set_epoch(1)  # an evaluation's order, the same in each epoch
    assert list(chain(*fixed)) == list(range(rows))


def collate(rows: list[int]) -> dict[str, Tensor]:
    """Rows of two tokens."""
    ids = torch.tensor([[row, row + 1] for row in rows])
    return {"input_ids": ids, "labels": ids.clone(), "counted": torch.ones_like(ids), "part": torch.tensor(rows)}


def test_ballast_does_not_count() -> None:
    batches = SharedCollator(collate)
    real = batches([4, 6, 8])
    assert real.pop(SHARE) == 3
    assert {name: value.tolist() for name, value in real.items()} == {
        name: value.tolist() for name, value in collate([4, 6, 8]).items()
    }
    ballast = batches([Ballast(4)])
    assert ballast["input_ids"].tolist() == [[4, 5]]
    assert ballast["labels"].tolist() == [[-100, -100]], "cross entropy ignores it"
    assert ballast["counted"].tolist() == [[0, 0]]
    assert ballast["part"].tolist() == [4]
    assert not batch_sharing.counts(ballast)
    assert batch_sharing.tokens(ballast) == 0
    assert batch_sharing.pop_share(ballast) == 0
    assert SHARE not in ballast, "the model has no such input"
    assert "labels" not in SharedCollator(lambda rows: {"input_ids": torch.tensor(rows)})([Ballast([1])])


def test_tokens_and_weights() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    ids = torch.ones(2, 3)
    for share in (1, 2):
        padded = {"input_ids": ids, "attention_mask": mask, SHARE: torch.tensor(share)}
        assert batch_sharing.counts(padded)
        assert batch_sharing.tokens(padded) == 3
        assert batch_sharing.pop_share(padded) == share
        assert batch_sharing.weights(padded, share) is mask
    assert batch_sharing.counts({"input_ids": ids}), "a batch that is not shared"
    assert batch_sharing.tokens({"input_ids": ids}) == 6, "packed rows have no mask"
    assert batch_sharing.pop_share({"input_ids": ids}) is None
    assert batch_sharing.weights({"input_ids": ids, "attention_mask": mask}, None) is mask
    assert batch_sharing.weights({"input_ids": ids}, 2) is None
    nothing = batch_sharing.weights({"input_ids": ids, "attention_mask": mask}, 0)
    assert nothing is not None
    assert nothing.tolist() == [[0, 0, 0]] * 2


class Accelerator:
    """Its class has the method that gathers, as accelerate's has."""

    def gather(self, value: Any) -> Any:
        return f"all {value}"

    gather_for_metrics = gather


def test_a_process_gathers_only_its_own_values() -> None:
    accelerator = Accelerator()
    number, row = torch.tensor(3.0, requires_grad=True), torch.tensor([[1.0, 2.0]])
    with batch_sharing.local_metrics(accelerator, None):
        assert accelerator.gather("rows") == accelerator.gather_for_metrics("rows") == "all rows"
    with batch_sharing.local_metrics(accelerator, 1):
        flat = accelerator.gather(number)
        assert (flat.tolist(), flat.requires_grad) == ([3.0], False)
        pair = accelerator.gather_for_metrics((number, row))
        assert isinstance(pair, tuple)
        assert [one.tolist() for one in pair] == [[3.0], [[1.0, 2.0]]]
    with batch_sharing.local_metrics(accelerator, 0):
        assert accelerator.gather([number, row])[1].shape == (0, 2)
        assert accelerator.gather_for_metrics(number).shape == (0,)
    assert accelerator.gather("rows") == accelerator.gather_for_metrics("rows") == "all rows", "restored"


def test_each_process_loads_its_own_micro_batches() -> None:
    args: Any = SimpleNamespace(
        dataloader_num_workers=0, dataloader_pin_memory=False, dataloader_persistent_workers=False
    )
    assert all(hasattr(TrainingArguments, name) for name in vars(args)), "transformers' own names"
    rows = [10, 20, 30, 40, 50]
    loaders = [batch_sharing.loader(rows, SharedBatches(range(5), 2, Peers(rank, 2)), collate, args) for rank in (0, 1)]
    found = [[batch["input_ids"][:, 0].tolist() for batch in each] for each in loaders]
    assert found == [[[10, 20], [50]], [[30, 40], [50]]]
    assert [[int(batch[SHARE]) for batch in each] for each in loaders] == [[2, 1], [2, 0]]
    args.dataloader_num_workers, args.dataloader_pin_memory, args.dataloader_persistent_workers = 2, True, True
    asked = batch_sharing.loader(rows, SharedBatches(range(5), 2, ALONE), collate, args)
    assert (asked.num_workers, asked.pin_memory, asked.persistent_workers) == (2, True, True)


def breaker_batch() -> dict[str, Tensor]:
    """Three break rows, of which the second has no token that counts, and one retained row; two tokens of padding."""
    return {
        "input_ids": torch.arange(3, 23).view(4, 5),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0]] + [[1] * 5] * 3),
        "labels": torch.full((4, 5), 7),
        "counted": torch.tensor([[0, 1, 1, 0, 0], [0] * 5, [0, 0, 0, 0, 1], [1] * 5]),
        "part": torch.tensor([0, 0, 0, 1]),
    }


def test_a_breakers_rows_count_by_their_tokens() -> None:
    batch = breaker_batch()
    assert counted(batch["counted"], batch["part"]).tolist() == [3, 5, 0]
    assert int(row_pairs(batch)) == 2, "the first with the third, and the third with the first"


@pytest.mark.parametrize("part", [0, 1])
def test_a_breakers_idle_row_does_not_count(part: int) -> None:
    """The first row without its padding, for a pass that other processes wait for."""
    idle = _idle(breaker_batch(), part)
    assert {name: value.tolist() for name, value in idle.items()} == {
        "input_ids": [[3, 4, 5]], "attention_mask": [[1, 1, 1]], "labels": [[-100] * 3], "counted": [[0] * 3],
        "part": [part],
    }  # fmt: skip
    assert int(row_pairs(idle)) == 0

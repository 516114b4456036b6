"""Rows of several domains: how many of each an epoch has, in which order, and how batches tell them apart."""

from collections import Counter
from itertools import batched

import pytest

from llama_stack_provider_moe.compute.data.domains import DomainCollator, Domains, DomainSampler, runs_by_domain, spread
from llama_stack_provider_moe.compute.data.row_parts import RowParts
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.data import Data, Domain, epoch_counts, require_few_passes


def domains(rows: tuple[int, ...], epoch: tuple[int, ...]) -> Domains:
    names = tuple("abcdef"[: len(rows)])
    return Domains(names, rows, tuple(0 for _ in rows), tuple(10 * each for each in rows), epoch)


def epoch_of(sampler: DomainSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


def owner(row: int, rows: tuple[int, ...]) -> int:
    """The domain of a row's index."""
    return next(index for index in range(len(rows)) if row < sum(rows[: index + 1]))


@pytest.mark.parametrize("ratios", [(1, 1), (3, 1), (1, 7, 2), (0.29, 0.71)])
def test_an_epoch_repeats_until_every_row_was_used_or_stops_when_one_domain_ends(ratios: tuple[float, ...]) -> None:
    rows = (100, 40, 9)[: len(ratios)]
    repeated, stopped = (epoch_counts(rows, ratios, how) for how in ("repeat", "stop"))
    assert all(count >= there for count, there in zip(repeated, rows, strict=True))
    assert any(count == there for count, there in zip(repeated, rows, strict=True)), "no longer than needed"
    assert all(count <= there for count, there in zip(stopped, rows, strict=True))
    assert any(count == there for count, there in zip(stopped, rows, strict=True)), "no shorter than needed"
    for counts in (repeated, stopped):
        for count, ratio in zip(counts, ratios, strict=True):
            assert abs(count - sum(counts) * ratio / sum(ratios)) <= len(ratios), "the ratios, but for rounding"


def test_every_part_of_an_epoch_has_the_ratios() -> None:
    order = spread([60, 30, 10]).tolist()
    assert Counter(order) == {0: 60, 1: 30, 2: 10}
    for part in batched(order, 10):
        found = Counter(part)
        assert all(abs(found[index] - expected) <= 1 for index, expected in enumerate((6, 3, 1)))


def test_a_domain_is_used_evenly_over_all_epochs() -> None:
    rows, epoch = (24, 5), (24, 8)
    sampler = DomainSampler(domains(rows, epoch), 32, shuffle=True, seed=7)
    seen: Counter[int] = Counter()
    for number in range(6):
        found = epoch_of(sampler, number)
        assert Counter(owner(row, rows) for row in found) == {0: 24, 1: 8}
        seen.update(found)
    assert {seen[row] for row in range(24)} == {6}
    assert {seen[row] for row in range(24, 29)} == {9, 10}, "48 uses of 5 rows"


def test_an_epoch_depends_only_on_seed_and_number() -> None:
    made = domains((24, 5), (24, 8))
    first, again = (DomainSampler(made, 32, shuffle=True, seed=7) for _ in range(2))
    in_turn = [epoch_of(first, number) for number in range(3)]
    assert epoch_of(again, 2) == in_turn[2], "whatever ran before"
    assert in_turn[0] != in_turn[1]
    assert epoch_of(DomainSampler(made, 32, shuffle=True, seed=8), 0) != in_turn[0]


def test_without_shuffling_the_rows_come_in_order() -> None:
    sampler = DomainSampler(domains((4, 2), (4, 4)), 8, shuffle=False, seed=7)
    assert [row for row in epoch_of(sampler, 0) if row < 4] == [0, 1, 2, 3]
    assert [row for row in epoch_of(sampler, 1) if row >= 4] == [4, 5, 4, 5]


def test_a_limited_epoch_continues_where_the_last_one_ended() -> None:
    sampler = DomainSampler(domains((24, 5), (24, 8)), 8, shuffle=False, seed=7)
    assert len(sampler) == 8
    words = [[row for row in epoch_of(sampler, number) if row < 24] for number in range(4)]
    assert words == [list(range(first, first + 6)) for first in (0, 6, 12, 18)]


def test_the_plan_tells_how_often_rows_are_seen() -> None:
    words, sums = domains((24, 5), (24, 8)).as_json(most=32, epochs=2)
    assert words == {
        "name": "a", "rows": 24, "tokens": 240, "held_out_rows": 0, "rows_an_epoch": 24, "share": 0.75,
        "times_seen": 2.0,
    }  # fmt: skip
    assert (sums["rows_an_epoch"], sums["times_seen"]) == (8, 3.2)


def test_a_domain_that_would_repeat_thousands_of_times_is_refused() -> None:
    blocks = [Domain(name="large", dataset_id="a"), Domain(name="tiny", dataset_id="b", ratio=2)]
    data = Data(domains=blocks)
    require_few_passes(data, {"large": 1000, "tiny": 2})
    with pytest.raises(InvalidInput, match=r"data\.domains\.1\.ratio: 2\.0 .* the 2 row\(s\) of 'tiny' at most 1,000"):
        require_few_passes(data, {"large": 1002, "tiny": 2})
    require_few_passes(Data(domains=blocks, exhausted="stop"), {"large": 1002, "tiny": 2})


def test_a_batch_knows_its_domains_and_held_out_batches_have_one() -> None:
    collate = DomainCollator(lambda rows: {"ids": [row["ids"] for row in rows], "columns": [*rows[0]]})
    batch = collate([{"ids": 1, "domain": 1}, {"ids": 2, "domain": 0}])
    assert (batch["ids"], batch["columns"], batch["domain"].tolist()) == ([1, 2], ["ids"], [1, 0])
    assert runs_by_domain([5, 0, 2], 3) == [(0, 1, 2), (3, 4), (5, 6)]


def test_parts_of_rows_are_a_byte_each() -> None:
    parts = RowParts(("train-a", "train-b", "validation-a"), bytes([0, 1, 2, 0]))
    assert dict(parts) == {0: "train-a", 1: "train-b", 2: "validation-a", 3: "train-a"}
    assert (len(parts), 3 in parts, 4 in parts, -1 in parts) == (4, True, False, False)
    some = parts.within(range(1, 3))
    assert dict(some) == {1: "train-b", 2: "validation-a"}
    assert dict(some.within(range(2, 3))) == {2: "validation-a"}
    with pytest.raises(KeyError):
        some[0]

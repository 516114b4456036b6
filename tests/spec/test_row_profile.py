"""Laws of a profile without tokens: it counts what a job would read, refuse and repeat."""

import io
import json

import pytest

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.rows.profiling import RowsProfiler, Tally

GOOD = {"prompt": "2+2?", "completion": "4"}
CHAT = {"messages": [{"role": "user", "content": "héllo"}, {"role": "assistant", "content": "hi"}]}


def test_rows_are_counted_by_what_a_job_would_do_with_them() -> None:
    profiler, valid = RowsProfiler("sft", "auto", None, "data.columns"), io.BytesIO()
    rows = [{**GOOD, "id": 1}, CHAT, {"prompt": "only"}, {**GOOD, "id": 2}, {"prompt": "\ud83d", "completion": "x"}]
    profiler.add_all(rows, valid)
    for row in (CHAT, {"prompt": "new", "completion": "x"}, {}):
        profiler.add_held_out(row)
    found = profiler.profile()
    assert (found.rows, found.formats) == (5, {"prompt_completion": 2, "messages": 1})
    assert found.columns_not_read == {"id": 2}
    assert [each.row for each in found.refused_rows] == [3, 5, 3]
    assert "half of a surrogate pair" in found.refused_rows[1].reason
    assert found.refused_rows[2].reason.startswith("(held-out file)")
    assert [(each.row, each.same_as) for each in found.duplicate_rows] == [(4, 1)]
    assert (found.held_out_rows, found.overlap) == (3, 1)
    assert [(each.row, each.same_as) for each in found.overlap_rows] == [(1, 2)]
    assert found.characters is not None
    assert (found.characters.total, found.characters.smallest, found.characters.largest) == (5 + 7 + 5, 5, 7)
    assert [json.loads(line)[0] for line in valid.getvalue().splitlines()] == [1, 2, 4]
    assert not found.is_ready()


def test_a_wrong_column_name_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="columns"):
        RowsProfiler("sft", "auto", {"question": "q"}, "data.columns")
    profiler = RowsProfiler("sft", "auto", {"prompt": "q"}, "data.columns")
    profiler.add(GOOD)
    with pytest.raises(InvalidInput, match="'q'"):
        profiler.profile()


@pytest.mark.parametrize(
    ("values", "median", "p95"),
    [([7], 7, 7), ([1, 2, 3, 4], 2, 4), (list(range(1, 101)), 50, 95), ([0, 0, 9], 0, 9)],
)
def test_lengths(values: list[int], median: int, p95: int) -> None:
    tally = Tally()
    for value in reversed(values):
        tally.add(value)
    found = tally.lengths()
    assert found is not None
    assert (found.median, found.p95, found.total) == (median, p95, sum(values))
    assert sum(bucket.rows for bucket in found.histogram) == len(values)
    for bucket in found.histogram:
        assert sum(bucket.least <= value <= bucket.most for value in values) == bucket.rows


def test_no_row_has_no_lengths() -> None:
    assert Tally().lengths() is None

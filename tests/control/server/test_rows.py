"""Tests reading rows from the host into a job's folder: pages, problems, memory."""

import asyncio
import io
import json
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llama_stack_api import DatasetNotFoundError

from llama_stack_provider_moe.control.server import compat
from llama_stack_provider_moe.control.server.rows import ROWS_PER_PAGE, copy_rows
from llama_stack_provider_moe.errors import InvalidInput, InvalidRows, NotFound, Unavailable
from llama_stack_provider_moe.spec import JOB_SPEC
from llama_stack_provider_moe.spec.rows import RowsReport

ROW = {"prompt": "What is it?", "completion": "An answer."}


class Host:
    """Data sets as 0.6.1 serves them; a provider that we do not know serves them only through iterrows."""

    def __init__(self, **sources: SimpleNamespace) -> None:
        self.sources = sources
        self.pages: list[tuple[int, int]] = []

    @property
    def deps(self) -> dict[Any, Any]:
        return {compat.Api.datasets: self, compat.Api.datasetio: self}

    async def get_dataset(self, request: Any) -> SimpleNamespace:
        if request.dataset_id not in self.sources:
            raise DatasetNotFoundError(request.dataset_id)
        return self.sources[request.dataset_id]

    async def iterrows(self, request: Any) -> SimpleNamespace:
        self.pages.append((request.start_index, request.limit))
        make = self.sources[request.dataset_id].make
        data, has_more = make(request.start_index, request.limit)
        return SimpleNamespace(data=data, has_more=has_more)


def rows_source(rows: list[Any]) -> SimpleNamespace:
    return SimpleNamespace(provider_id="localfs", source=SimpleNamespace(type="rows", rows=rows))


def csv_source(path: Path) -> SimpleNamespace:
    return SimpleNamespace(provider_id="localfs", source=SimpleNamespace(type="uri", uri=f"file://{path}"))


def paged_source(total: int) -> SimpleNamespace:
    def make(start: int, limit: int) -> tuple[list[Any], bool]:
        end = min(start + limit, total)
        return [{**ROW, "completion": f"answer {number}"} for number in range(start, end)], end < total

    source = SimpleNamespace(type="uri", uri="warehouse://rows")
    return SimpleNamespace(provider_id="warehouse", source=source, make=make)


def reported(host: Host, dataset_id: str, recipe: Any = "sft", out: Any = None, **more: Any) -> RowsReport:
    rows = copy_rows(host.deps, dataset_id, "data.dataset_id", recipe, "auto", out, max_rows=10_000_000, **more)
    return asyncio.run(rows)


def copy(host: Host, dataset_id: str, recipe: Any = "sft", out: Any = None) -> int:
    return reported(host, dataset_id, recipe, out).rows


def written(out: io.BytesIO) -> Iterator[Any]:
    return map(json.loads, out.getvalue().splitlines())


def test_rows_come_in_pages_and_keep_their_order() -> None:
    total = 2 * ROWS_PER_PAGE + 7
    host, out = Host(paged=paged_source(total)), io.BytesIO()
    assert copy(host, "paged", out=out) == total
    assert host.pages == [(start, ROWS_PER_PAGE) for start in (0, ROWS_PER_PAGE, 2 * ROWS_PER_PAGE)]
    answers = [row["messages"][-1]["content"] for row in written(out)]
    assert answers == [f"answer {number}" for number in range(total)]


def test_a_source_that_claims_more_but_gives_none_ends() -> None:
    source = paged_source(0)
    source.make = lambda start, limit: ([ROW] if start == 0 else [], True)
    assert copy(Host(paged=source), "paged") == 1


def test_a_csv_is_read_as_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    lines = ["prompt,completion"] + [f'"Nr. {number}, please",{number}' for number in range(ROWS_PER_PAGE + 1)]
    path.write_text("\n".join([*lines, "None of it?,None"]) + "\n")
    out = io.BytesIO()
    assert copy(Host(csv=csv_source(path)), "csv", out=out) == ROWS_PER_PAGE + 2
    turns = [[message["content"] for message in row["messages"]] for row in written(out)]
    assert turns[0] == ["Nr. 0, please", "0"]
    assert turns[-1] == ["None of it?", "None"]


def test_a_csv_with_an_empty_cell(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\na,b\nc,\n")
    with pytest.raises(InvalidRows, match="row 2: completion: is missing beside 'prompt'"):
        copy(Host(csv=csv_source(path)), "csv")


@pytest.mark.parametrize(
    "content", [b"", b"prompt,completion\na,b\nc,d,e,f\n", b"prompt,completion\n\xff\xfe,b\n", None]
)
def test_a_csv_that_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"data\.dataset_id: 'csv' is not valid; expected a data set that the se"):
        copy(Host(csv=csv_source(path)), "csv")


def test_no_such_data_set_and_no_rows() -> None:
    with pytest.raises(NotFound, match="no data set 'gone' is registered"):
        copy(Host(), "gone")
    with pytest.raises(InvalidInput, match="'empty' is not valid; expected a data set with rows"):
        copy(Host(empty=rows_source([])), "empty")


def test_a_source_that_does_not_answer_reveals_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "FILE_LIMIT_S", 0.05)
    goes_on = threading.Event()
    uri = "https://ann:hunter2@files.internal/rows.jsonl"
    host = Host(slow=SimpleNamespace(provider_id="other", source=SimpleNamespace(type="uri", uri=uri)))

    async def first_page() -> None:
        async for _ in compat.dataset_pages(host.deps, "slow", 10, "data.dataset_id", lambda _: bool(goes_on.wait())):
            pass

    try:
        with pytest.raises(Unavailable, match=r"https://ann:\*\*\*@files.internal/rows.jsonl does not answer within"):
            asyncio.run(first_page())
    finally:
        goes_on.set()


def test_all_bad_rows_are_counted_and_the_first_named() -> None:
    rows = [dict(ROW) for _ in range(3 * ROWS_PER_PAGE)]
    bad = [17, *range(500, 520), 2500]  # numbers from 1, on the first page and on the last
    for number in bad:
        del rows[number - 1]["completion"]
    out = io.BytesIO()
    with pytest.raises(InvalidRows) as caught:
        copy(Host(rows=rows_source(rows)), "rows", out=out)
    error = caught.value
    assert [problem.row for problem in error.problems] == bad[:20]
    assert (error.count, error.total_rows) == (len(bad), len(rows))
    assert "row 17: completion: is missing beside 'prompt'" in str(error)
    assert str(error).endswith("; and 2 more")


def test_bad_rows_of_every_kind_are_found() -> None:
    half = "\ud83d"
    rows = ["text", None, 7, {}, {"prompt": "a", "completion": float("nan")}, {**ROW, "completion": half}, ROW]
    with pytest.raises(InvalidRows) as caught:
        copy(Host(rows=rows_source(rows)), "rows")
    assert [problem.row for problem in caught.value.problems] == [1, 2, 3, 4, 5, 6]
    assert caught.value.problems[-1].reason.startswith("contains half of a surrogate pair")


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    def peak(pages: int) -> int:
        host = Host(paged=paged_source(pages * ROWS_PER_PAGE))
        with (tmp_path / f"{pages}.jsonl").open("wb") as out:
            tracemalloc.start()
            copy(host, "paged", out=out)
            size: int = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return size

    peak(1)  # a first run makes the caches and the thread pool
    assert peak(9) < 1.5 * peak(3)


def test_formats_and_columns_are_counted_over_all_pages() -> None:
    rows = [{**ROW, "source": "s"} for _ in range(ROWS_PER_PAGE)] + [{"text": "Rivers run."}]
    report, out = reported(Host(rows=rows_source(rows)), "rows"), io.BytesIO()
    assert report.formats == {"prompt_completion": ROWS_PER_PAGE, "text": 1}
    assert report.not_read == {"source": ROWS_PER_PAGE}
    assert reported(Host(rows=rows_source(rows[-1:])), "rows", out=out).rows == 1
    assert [*written(out)] == [{"text": "Rivers run."}]


def test_other_names_of_columns() -> None:
    rows = [{"question": "What is it?", "answer": "An answer."}, {"question": "What is it?", "answer": "Another."}]
    columns = {"prompt": "question", "completion": "answer"}
    out = io.BytesIO()
    assert reported(Host(rows=rows_source(rows)), "rows", out=out, columns=columns).read == {"question": 2, "answer": 2}
    assert [row["messages"][1]["content"] for row in written(out)] == ["An answer.", "Another."]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"prompt": "query", "completion": "answer"}, "data.columns.prompt: 'query' is not valid; expected a column of "
         "the data set, whose columns are: answer, question"),
        ({"question": "prompt"}, "data.columns: 'question' is not valid; expected a column of the formats of recipe"),
    ],
)  # fmt: skip
def test_columns_that_are_not_there(columns: dict[str, str], told: str) -> None:
    rows = [{"question": "What is it?", "answer": "An answer."}, {"question": "What is it?"}]
    with pytest.raises(InvalidInput) as caught:
        reported(Host(rows=rows_source(rows)), "rows", columns=columns)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize(
    ("recipe", "kind"), [("dpo", "recipe"), ("circuit_breaker", "recipe"), ("sft", "conversation")]
)
def test_texts_are_for_sft_alone(recipe: str, kind: str) -> None:
    with pytest.raises(InvalidRows):
        reported(Host(rows=rows_source([{"text": "Rivers run."}])), "rows", recipe, kind=kind)


def test_rows_with_tools_keep_them() -> None:
    tools = [{"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}]
    call = {"type": "function", "id": "c1", "function": {"name": "tide", "arguments": {"port": "Brest"}}}
    row = {
        "messages": [{"role": "user", "content": "Tide?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    }
    out = io.BytesIO()
    report = reported(Host(rows=rows_source([{**row, "tools": tools, "parallel_tool_calls": False}])), "rows", out=out)
    assert [*written(out)] == [{**row, "tools": tools, "chat_template_kwargs": {"parallel_tool_calls": False}}]
    assert report.notes == {"tool calls": 1, "tools": 1}


def test_rows_without_what_graders_read_are_counted_and_named() -> None:
    grader = {"type": "math", "name": "right"}
    body = {"recipe": "grpo", "model": "m", "data": {"dataset_id": "mixed"}, "reward": [{"grader": grader}]}
    (source,) = JOB_SPEC.validate_python(body).row_sources()
    rows = [ROW, {"prompt": "only"}, {"prompt": "with", "gold": "1"}, {"prompt": "only too"}]
    with pytest.raises(InvalidRows, match=r"'mixed'.*row 2: gold: is missing; grader 'right'") as problem:
        reported(Host(mixed=rows_source(rows)), "mixed", "grpo", answered=source.answered, needs=source.needs)
    assert "row 4: gold" in str(problem.value)
    assert "2 problem(s) in 4 row(s)" in str(problem.value)

"""Rows of a data set, page by page, checked and made canonical on their way into a job's folder.

No more than one page is in memory here, however many rows there are.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, BinaryIO, NamedTuple

from llama_stack_provider_moe.datarows import canonical
from llama_stack_provider_moe.errors import InvalidInput, InvalidRows, RowProblem
from llama_stack_provider_moe.host import compat
from llama_stack_provider_moe.spec import Recipe, RowFormat, RowKind
from llama_stack_provider_moe.spec.evaluation_rows import canonical_own

ROWS_PER_PAGE = 1000


class _Checked(NamedTuple):
    lines: bytes
    problems: list[RowProblem]  # the first of them, as many as an error shows
    problem_count: int


async def copy_rows(
    deps: dict[Any, Any],
    dataset_id: str,
    field: str,
    recipe: Recipe,
    row_format: RowFormat,
    out: BinaryIO | None,
    max_rows: int,
    answered: bool = True,
    kind: RowKind = "recipe",
) -> int:
    """Check every row of a data set, and write each in its canonical form as a line of JSON.

    Args:
        deps: the host's APIs.
        dataset_id: the data set.
        field: the caller's name for `dataset_id`, for an error's text.
        recipe: decides what a row must have.
        row_format: what the job says its rows are.
        out: where the lines go; None only checks.
        max_rows: `ProviderConfig.max_rows`; no row beyond is asked for.
        answered: must a conversation end with the assistant's turn.
        kind: of its rows.

    Returns:
        The number of rows, at least 1.

    Raises:
        NotFound: no such data set.
        InvalidInput: it can't be read, has no rows, or more than `max_rows`.
        InvalidRows: some of its rows can't be trained on; all of them were looked at.
    """
    pages: AsyncIterator[list[Any]] = compat.dataset_pages(deps, dataset_id, ROWS_PER_PAGE, field)
    total, count = 0, 0
    problems: list[RowProblem] = []
    async for page in pages:
        if total + len(page) > max_rows:
            raise InvalidInput(
                field, dataset_id, f"a data set of at most {max_rows:,} rows (`max_rows` of this server)"
            )
        checked = await asyncio.to_thread(_check, page, total + 1, recipe, row_format, answered, kind)
        total += len(page)
        count += checked.problem_count
        problems += checked.problems[: InvalidRows.SHOWN - len(problems)]
        if out is not None and not count:
            await asyncio.to_thread(out.write, checked.lines)
    if count:
        raise InvalidRows(dataset_id, problems, count, total)
    if not total:
        raise InvalidInput(field, dataset_id, "a data set with rows; this one is empty")
    return total


def _check(
    page: list[Any], first: int, recipe: Recipe, row_format: RowFormat, answered: bool, kind: RowKind
) -> _Checked:
    lines: list[bytes] = []
    problems: list[RowProblem] = []
    for number, row in enumerate(page, first):
        if kind in ("scenario", "judged"):
            found: dict[str, Any] | RowProblem = canonical_own(row, number, kind)
        else:
            found = canonical(row, number, recipe if kind == "recipe" else "sft", row_format, answered)
        if not isinstance(found, RowProblem):
            try:
                lines.append(json.dumps(found, ensure_ascii=False).encode() + b"\n")
                continue
            except UnicodeEncodeError:
                # JSON may spell half a surrogate pair ("\ud83d"); no tokenizer takes it.
                found = RowProblem(number, "row", "holds half of a surrogate pair, which is not text")
        problems.append(found)
    return _Checked(b"".join(lines), problems[: InvalidRows.SHOWN], len(problems))

"""Reads the rows of a data set page by page, checks them, and writes their canonical form into a job's folder.

Memory holds at most one page, whatever the number of rows.
"""

import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import BinaryIO, NamedTuple

from llama_stack_provider_moe.control.server import compat
from llama_stack_provider_moe.control.server.pools import Pool
from llama_stack_provider_moe.control.server.row_sample import RowSample
from llama_stack_provider_moe.errors import InvalidInput, InvalidRows, RowProblem
from llama_stack_provider_moe.spec import Recipe, RowFormat, RowKind
from llama_stack_provider_moe.spec.evaluation_rows import canonical_own
from llama_stack_provider_moe.spec.row_domains import RowDomains
from llama_stack_provider_moe.spec.row_needs import RowNeeds
from llama_stack_provider_moe.spec.rows import RowsReport, canonical, check_columns, check_found, conversation
from llama_stack_provider_moe.spec.rows.image_parts import ImageDoor
from llama_stack_provider_moe.spec.rows.report import MOST_NAMES
from llama_stack_provider_moe.spec.rows.values import HALF_A_PAIR, BadRow

type PagesOf = Callable[[compat.Deps, str, int, str, Callable[[str], None]], AsyncIterator[list[object]]]

ROWS_PER_PAGE = 1000
_checking = Pool("moe-rows", 2, 256, "rows of data sets")


class RowReading(NamedTuple):
    """How to read the rows of a data set.

    Attributes:
        recipe: decides which fields a row needs.
        format: of the rows, as the job states it.
        answered: whether a conversation must end with the assistant's turn.
        kind: of the rows.
        columns: the data's names of columns by the formats' names.
        domains: finds the domain of each row in a column; None: there is no such column.
        needs: what graders read of each row; None: there are no graders.
        images: takes the images of each row; None: no row can have any.
    """

    recipe: Recipe
    format: RowFormat
    answered: bool = True
    kind: RowKind = "recipe"
    columns: Mapping[str, str] | None = None
    domains: RowDomains | None = None
    needs: RowNeeds | None = None
    images: ImageDoor | None = None


class DomainFile(NamedTuple):
    """Where the domains of rows are found and written.

    Attributes:
        found: finds and counts them.
        out: gets one byte for each row; None only checks the rows.
    """

    found: RowDomains
    out: BinaryIO | None


class _Checked(NamedTuple):
    lines: bytes
    problems: list[RowProblem]  # the first ones, as many as an error shows
    problem_count: int
    seen: set[str]  # columns of any row, if some have other names
    domains: bytes  # the number of each row's domain, if a column names it


async def copy_rows(
    deps: compat.Deps,
    dataset_id: str,
    field: str,
    recipe: Recipe,
    row_format: RowFormat,
    out: BinaryIO | None,
    max_rows: int,
    answered: bool = True,
    kind: RowKind = "recipe",
    admit: Callable[[str], None] = lambda _uri: None,
    columns: Mapping[str, str] | None = None,
    columns_field: str = "data.columns",
    pages_of: PagesOf = compat.dataset_pages,
    sample: RowSample | None = None,
    domains: DomainFile | None = None,
    needs: RowNeeds | None = None,
    images: ImageDoor | None = None,
) -> RowsReport:
    """Check every row of a data set, and write each in its canonical form as a line of JSON.

    Args:
        deps: the host's APIs.
        dataset_id: the data set.
        field: the caller's name for `dataset_id`, for error texts.
        recipe: decides which fields a row needs.
        row_format: the format of the rows, as the job states it.
        out: the file for the lines; None only checks the rows.
        max_rows: `ProviderConfig.max_rows`; reading stops beyond it.
        answered: whether a conversation must end with the assistant's turn.
        kind: the kind of the rows.
        admit: raises where the caller may not read the URI (`compat.dataset_pages`).
        columns: the data's names of columns by the formats' names.
        columns_field: the caller's name for `columns`, for error texts.
        pages_of: reads the data set.
        sample: keeps some of the rows.
        domains: finds the domain of each row in a column; None: there is no such column.
        needs: what graders read of each row; None: there are no graders.
        images: takes the images of each row; None: no row can have any.

    Returns:
        The number of rows, at least 1, with their formats and columns.

    Raises:
        NotFound: no such data set.
        InvalidInput: the data set can't be read, has no rows, or more than `max_rows`; or `columns` names a column
            that the formats or all rows lack.
        InvalidRows: some rows can't be trained on; the error counts them all.
    """
    named = None if domains is None else domains.found
    reading = RowReading(recipe, row_format, answered, kind, columns, named, needs, images)
    report = RowsReport()
    if columns:
        check_columns(columns, recipe, row_format, columns_field)
    total, count = 0, 0
    problems: list[RowProblem] = []
    seen: set[str] = set()
    async for page in pages_of(deps, dataset_id, ROWS_PER_PAGE, field, admit):
        if total + len(page) > max_rows:
            most = f"a data set of at most {max_rows:,} rows (`max_rows` of this server)"
            raise InvalidInput(field, dataset_id, most)
        checked = await _checking.run(_check, page, total + 1, reading, report, sample)
        total += len(page)
        count += checked.problem_count
        problems += checked.problems[: InvalidRows.SHOWN - len(problems)]
        # Names of columns for an error's text, and in any case those that the job names.
        seen |= checked.seen if len(seen) < MOST_NAMES else checked.seen.intersection((columns or {}).values())
        if out is not None and not count:
            await _checking.run(out.write, checked.lines)
            if domains is not None and domains.out is not None:
                await _checking.run(domains.out.write, checked.domains)
    if columns and total:
        check_found(columns, seen, columns_field)
    if count:
        raise InvalidRows(dataset_id, problems, count, total)
    if not total:
        raise InvalidInput(field, dataset_id, "a data set with rows; this one is empty")
    if domains is not None:
        domains.found.require_enough()
    return report


def _check(
    page: list[object], first: int, reading: RowReading, report: RowsReport, sample: RowSample | None
) -> _Checked:
    lines: list[bytes] = []
    problems: list[RowProblem] = []
    seen: set[str] = set()
    numbers = bytearray()
    for number, given in enumerate(page, first):
        row = given
        if reading.domains is not None:
            row, domain = reading.domains.without(given), reading.domains.add(given, number)
            if isinstance(domain, RowProblem):
                problems.append(domain)
                continue
            numbers.append(domain)  # whoever writes it stops at the first problem
        if reading.columns and isinstance(row, Mapping):
            seen.update(key for key in row if isinstance(key, str))
        found = _canonical(row, number, reading, report)
        if isinstance(found, RowProblem):
            problems.append(found)
            continue
        try:
            lines.append(json.dumps(found, ensure_ascii=False).encode() + b"\n")
        except UnicodeEncodeError:
            # JSON allows half a surrogate pair ("\ud83d"); no tokenizer accepts it.
            problems.append(RowProblem(number, "row", HALF_A_PAIR))
            continue
        if sample is not None:
            sample.offer(number, found, len(lines[-1]))
    return _Checked(b"".join(lines), problems[: InvalidRows.SHOWN], len(problems), seen, bytes(numbers))


def _canonical(row: object, number: int, reading: RowReading, report: RowsReport) -> Mapping[str, object] | RowProblem:
    if isinstance(row, Mapping) and reading.images is not None:
        try:
            row = reading.images.whole(row)
        except BadRow as bad:
            return RowProblem(number, bad.field, bad.reason)
    if reading.kind in ("scenario", "judged"):
        own = canonical_own(row, number, reading.kind)
        if not isinstance(own, RowProblem):
            report.add(reading.kind, (), (), ())
        return own
    if reading.kind == "conversation":
        return conversation(row, number, reading.format, reading.answered, reading.columns, report)
    return canonical(
        row, number, reading.recipe, reading.format, reading.answered, reading.columns, report, reading.needs
    )

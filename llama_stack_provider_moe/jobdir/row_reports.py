"""`data/report.json` in a job's folder: what the server found in the rows of each of the job's data sets."""

import json
from collections.abc import Mapping

from llama_stack_provider_moe.ground.small_files import read_small
from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic
from llama_stack_provider_moe.jobdir.reading import why_unreadable
from llama_stack_provider_moe.spec.rows import RowsReport

LARGEST = 16 << 20  # bytes


def write_reports(folder: JobFolder, reports: Mapping[str, RowsReport], mode: int) -> None:
    """Write the reports.

    Args:
        folder: the job's.
        reports: by the part of the job's rows (`RowSource.part`).
        mode: of the file.
    """
    text = json.dumps({part: report.as_json() for part, report in reports.items()}, indent=2)
    write_atomic(folder.row_reports, text, mode)


def read_reports(folder: JobFolder) -> dict[str, RowsReport]:
    """The reports by part; none if an earlier version of this package created the job.

    Raises:
        OSError: the file can't be read.
        ValueError: it is damaged.
    """
    try:
        found = json.loads(read_small(folder.row_reports, LARGEST))
    except FileNotFoundError:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{folder.row_reports.name}: not an object")
    return {part: RowsReport.from_json(each) for part, each in found.items()}


def report_lines(folder: JobFolder) -> list[str]:
    """What a person reads of the reports: a line for each part, or one that says why they can't be read."""
    try:
        reports = read_reports(folder)
    except (OSError, ValueError) as error:
        return [f"{folder.row_reports.name} can't be read ({why_unreadable(error)})"]
    return [f"{part}: {'; '.join(report.lines())}" for part, report in reports.items()]

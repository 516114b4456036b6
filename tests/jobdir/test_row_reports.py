"""The report of a job's rows in its folder."""

from pathlib import Path

from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.row_reports import read_reports, report_lines, write_reports
from llama_stack_provider_moe.spec.rows import RowsReport


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    folder.data.mkdir()
    assert report_lines(folder) == []  # of an earlier version
    train, held_out = RowsReport(), RowsReport()
    train.add("messages", ["messages"], ["id"], ["tools"])
    train.add("text", ["text"], [], [])
    held_out.add("messages", ["messages"], [], [])
    write_reports(folder, {"train": train, "validation": held_out}, 0o640)
    found = read_reports(folder)
    assert {part: report.as_json() for part, report in found.items()} == {
        "train": train.as_json(), "validation": held_out.as_json(),
    }  # fmt: skip
    assert report_lines(folder) == [
        "train: 2 rows: messages (1), text (1); columns not read: id (1); with tools (1)",
        "validation: 1 rows: messages",
    ]


def test_a_damaged_one_is_told_and_stops_no_job(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    folder.data.mkdir()
    for damaged in ("{", "[]", '{"train": {"rows": "many"}}'):
        folder.row_reports.write_text(damaged, encoding="utf-8")
        (line,) = report_lines(folder)
        assert line.startswith("report.json can't be read (")

"""What a report of rows counts, and that it stays small."""

import json
from typing import Any

import pytest

from llama_stack_provider_moe.errors import RowProblem
from llama_stack_provider_moe.spec.rows import RowsReport
from tests.spec.test_rows_formats import read, said, user


def test_the_report() -> None:
    report, other = RowsReport(), RowsReport()
    thought = {"messages": [user("7 x 8?"), said("56", thinking="56, I think.", id="m1")], "source": "s"}
    assert not isinstance(read(thought, report=report), RowProblem)
    assert isinstance(read({"messages": []}, report=report), RowProblem)
    for _ in range(1200):
        read({"prompt": "7 x 8?", "completion": "56", "source": "s"}, report=other)
    report.merge(other)
    assert report.as_json() == {
        "rows": 1201,
        "formats": {"messages": 1, "prompt_completion": 1200},
        "read": {"messages": 1, "prompt": 1200, "completion": 1200},
        "not_read": {"source": 1201, "messages[].id": 1},
        "notes": {"reasoning": 1},
    }
    assert RowsReport.from_json(json.loads(json.dumps(report.as_json()))).as_json() == report.as_json()
    assert report.lines() == [
        "1,201 rows: prompt_completion (1,200), messages (1)",
        "columns not read: source, messages[].id (1)",
        "with reasoning (1)",
    ]


def test_a_report_keeps_few_names() -> None:
    report = RowsReport()
    for number in range(1000):
        read({"text": "Rivers run.", f"column {number}": 1}, report=report)
    assert len(report.not_read) == 201
    assert sum(report.not_read.values()) == 1000


@pytest.mark.parametrize("damaged", [[], {}, {"rows": -1}, {"rows": True}, {"rows": 1, "formats": {"text": "1"}}])
def test_a_damaged_report(damaged: Any) -> None:
    with pytest.raises(ValueError, match="a report of rows"):
        RowsReport.from_json(damaged)

"""What a job says before its first step."""

import pytest

from llama_stack_provider_moe.jobdir.row_reports import write_reports
from llama_stack_provider_moe.spec.rows import RowsReport
from tests.support.training_support import Run, Workshop, workshop

__all__ = ["workshop"]


def warnings(workshop: Workshop, warmup: int) -> list[str]:
    optimizer = {"lr": 0.02, "num_warmup_steps": warmup}
    run = workshop.run("sft", "granitemoe", training={"n_epochs": 3}, optimizer=optimizer)
    steps = run.resolved["total_steps"]
    assert steps > 2
    return [event.text for event in run.events("message") if event.level == "warning"]


def test_a_warm_up_as_long_as_the_job_is_reported(workshop: Workshop) -> None:
    """Such a job completes and has learnt next to nothing."""
    (told,) = warnings(workshop, 100)
    assert told.startswith("optimizer.num_warmup_steps: 100 is not below the ")
    assert "learning rate reaches only " in told
    assert warnings(workshop, 1) == []


def test_the_plan_names_formats_and_columns_that_were_not_read(
    workshop: Workshop, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = workshop.job("sft", "granitemoe", training={"max_steps_per_epoch": 1})
    report = RowsReport()
    for _ in range(16):
        report.add("sharegpt", ["conversations"], ["id"], [])
    write_reports(folder, {"train": report}, 0o640)
    workshop.again(Run(folder, 0))
    assert "rows      train: 16 rows: sharegpt; columns not read: id\n" in capfd.readouterr().out

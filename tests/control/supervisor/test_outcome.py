"""What a stopped job reports as left is what is on the disk, whenever the signal came."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.control.supervisor.executors import Exit
from llama_stack_provider_moe.control.supervisor.outcome import outcome
from llama_stack_provider_moe.jobdir.attempt import ATTEMPT_FILE, SUPERSEDED
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support.jobs_support import submit

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
AGAIN = "it saved no checkpoint, so it starts from the beginning when it is resumed"


@pytest.fixture
def job(store: JobStore, root: Path) -> Job:
    return replace(submit(store, "job"), folder=str(root / "job"), state=JobState.IN_PROGRESS)


def tell(job: Job, *told: str) -> None:
    """Write events: `started`, `step 4`, `saved 4`, `cancelled 4`; a second apart."""
    folder = JobFolder(Path(job.folder))
    folder.root.mkdir()
    lines = []
    for number, each in enumerate(told):
        kind, _, at = each.partition(" ")
        step = int(at or 0)
        event: dict[str, Any] = {"time": (BEGAN + timedelta(seconds=number)).isoformat(), "type": kind}
        if kind == "started":
            event |= {"pid": 1, "versions": {}}
        elif kind == "saved":
            path = folder.root / "checkpoints" / f"step-{step}"
            path.mkdir(parents=True)
            event["artifact"] = {
                "identifier": f"job/step-{step}", "kind": "checkpoint", "path": str(path), "epoch": 0, "step": step,
                "created_at": event["time"], "bytes": 0, "metrics": None,
            }  # fmt: skip
        elif kind == "step":
            event |= {"step": step, "max_steps": 9, "epoch": 0.5, "metrics": {}, "eta_s": 0.0}
        else:
            event["step"] = step
        lines.append(json.dumps(event, separators=(",", ":")) + "\n")
    folder.events.write_text("".join(lines))


@pytest.mark.parametrize(
    ("told", "where"),
    [
        (["started", "cancelled 0"], f"before the first step; {AGAIN}"),
        (["started"], f"before the first step; {AGAIN}"),
        ([], f"before the first step; {AGAIN}"),
        (["started", "step 4", "saved 4", "cancelled 4"], "at step 4, after saving a checkpoint"),
        (["started", "step 4", "saved 4"], "at step 4, after saving a checkpoint"),
        (["started", "step 4"], f"at step 4; {AGAIN}"),
        (["started", "step 2", "saved 2", "step 4"], "at step 4; its last checkpoint is from step 2"),
        (
            ["started", "step 4", "saved 4", "cancelled 4", "started", "cancelled 0"],
            "before the first step since it was resumed; its last checkpoint is from step 4",
        ),
        (
            ["started", "step 4", "saved 4", "cancelled 4", "started"],
            "before the first step since it was resumed; its last checkpoint is from step 4",
        ),
        (["started", "step 4", "started", "cancelled 0"], f"before the first step; {AGAIN}"),
    ],
)
def test_the_reason_says_what_was_saved(job: Job, told: list[str], where: str) -> None:
    tell(job, *told)
    cancelled = replace(job, cancel_requested_at=BEGAN)
    assert outcome(cancelled, Exit(3), 3).reason == f"cancelled {where}"
    if any(each.startswith("cancelled") for each in told[-1:]):  # by whoever shuts the machine down
        reason = str(outcome(job, Exit(3), 1).reason)
        assert reason.startswith("the training process was stopped by a signal that this server did not send: ")
        assert f"it ended {where} (1 of at most 1 starts lost)" in reason


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("export", "cancelled during the export; a resumed export keeps the completed steps"),
        (
            "routing_analysis",
            "cancelled before the report was written; a resumed analysis starts from the beginning",
        ),
    ],
)
def test_what_trains_nothing_saves_no_checkpoint(job: Job, recipe: str, reason: str) -> None:
    tell(job, "started", "step 4", "cancelled 0")
    cancelled = replace(job, recipe=recipe, cancel_requested_at=BEGAN)
    assert outcome(cancelled, Exit(3), 3).reason == reason


def test_a_reason_has_the_last_lines_that_tell_something(job: Job) -> None:
    tell(job, "started")
    warning = (
        "/usr/lib/python3.12/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to "
        "be 1 leaked semaphore objects to clean up at shutdown\n  warnings.warn('resource_tracker: There appear to be "
        "%d '\n"
    )
    printed = "".join(f"{{'loss': {step}}}\n" for step in range(9))
    JobFolder(Path(job.folder)).output.write_text(printed + "\n" + warning)
    reason = str(outcome(job, Exit(-9), 3).reason)
    assert reason.endswith("; last output: {'loss': 6}\n{'loss': 7}\n{'loss': 8}")
    JobFolder(Path(job.folder)).output.write_text("x" * 3000)
    assert str(outcome(job, Exit(1), 3).reason).endswith("; last output: " + "x" * 500)


@pytest.mark.parametrize(
    ("attempt", "told"),
    [
        (None, "because its folder was replaced, emptied or deleted while it ran: there is no attempt.json in "),
        ("2@later", "because another attempt replaced it: attempt.json in "),
        ("{", "attempt.json in its folder can't be read"),
    ],
)
def test_a_process_that_ended_itself_says_what_became_of_its_folder(job: Job, attempt: str | None, told: str) -> None:
    folder = Path(job.folder)
    folder.mkdir()
    if attempt is not None:
        content = attempt if attempt == "{" else json.dumps({"number": 2, "name": attempt})
        (folder / ATTEMPT_FILE).write_text(content)
    found = outcome(job, Exit(SUPERSEDED), 3)
    assert found.state is JobState.FAILED
    assert str(found.reason).startswith(f"the training process ended itself{':' if attempt == '{' else ','} {told}")


def test_an_exit_code_of_its_own_stays_one(job: Job) -> None:
    folder = Path(job.folder)
    folder.mkdir()
    (folder / ATTEMPT_FILE).write_text(json.dumps({"number": job.attempts, "name": job.attempt}))
    assert outcome(job, Exit(SUPERSEDED), 3).reason == "the training process ended with exit code 4; it printed nothing"

"""The law of the watchdog: a slow stage that works completes, and one that hangs is stopped.

The tests use a supervisor and its child processes. The first ones report like a training process does, without the
libraries; the last one trains.
"""

import sys
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.control.server.progress import progress
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.executors.local import LocalExecutor
from llama_stack_provider_moe.jobdir.events import read
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.jobs_support import new_supervisor, wait_for
from tests.support.training_support import Workshop, dpo_rows, workshop

__all__ = ["workshop"]

ROOT = Path(__file__).resolve().parents[3]
STALL_S = 3.0
# Until the stage begins, a process imports libraries: how long that takes on a busy machine is not what is tested.
START_S = 600.0
# A child whose one stage has `ROWS` rows of 0.1 s, and hangs at row `HANGS_AT`.
CHILD = """
import sys, time
from contextlib import closing
from pathlib import Path
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.events import EventLog, Started
from llama_stack_provider_moe.jobdir.folder import JobFolder, Manifest, write_atomic
from llama_stack_provider_moe.compute.runtime.reporting import reported_to

liveness.EVERY_S = 0.5
folder, rows, hangs_at = JobFolder(Path(sys.argv[1])), ROWS, HANGS_AT
with closing(EventLog(folder.events)) as events, reported_to(events, leads=True):
    events.append(Started(pid=1, versions={}))
    for row in liveness.counted("evaluating", range(rows), rows, "rows"):
        if row == hangs_at:
            time.sleep(1000)
        time.sleep(0.1)
write_atomic(folder.manifest, Manifest(job_uuid=folder.root.name, artifacts=[], summary={}))
"""
# A training process whose evaluation takes `SLOW_S` seconds a batch, and whose first checkpoint is never written.
TRAINING = """
import sys, time
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.compute.runtime import reporting
from llama_stack_provider_moe.compute.worker import main

liveness.EVERY_S = 1.0
run = main.run

def slow_run(session):
    with reporting.imports_counted():
        from llama_stack_provider_moe.compute.train.trainer import RecordingTrainer
    plain = RecordingTrainer.prediction_step

    def prediction_step(*arguments, **keywords):
        time.sleep(SLOW_S)
        return plain(*arguments, **keywords)

    RecordingTrainer.prediction_step = prediction_step
    RecordingTrainer._save_optimizer_and_scheduler = lambda *_: time.sleep(1000)
    return run(session)

main.run = slow_run
sys.exit(main.main(sys.argv[1:]))
"""


def configured(root: Path, script: str) -> ProviderConfig:
    """A provider whose training processes run `script` with the job's folder, and may be silent for `START_S`."""
    (root / "child.py").write_text(script)
    python = root / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{root / "child.py"}" "$3"\n')
    python.chmod(0o755)
    times: dict[str, Any] = {
        "poll_s": 0.05, "lease_s": 30, "cancel_grace_s": 1, "warm": False, "stall_s": START_S
    }  # fmt: skip
    return ProviderConfig.model_validate(
        {"state_dir": root, "training_python": str(python), "supervisor": times, "child_env": {"PYTHONPATH": str(ROOT)}}
    )


def settled(store: JobStore, config: ProviderConfig, folder: Path, stall_s: float) -> tuple[Any, set[str]]:
    """Return the job in `folder` once it has ended, and all stages that its status named until then.

    When it begins to evaluate, the next supervisor adopts it, whose limit is `stall_s`.
    """
    store.submit(folder.name, "ann", "sft", "some/model", str(folder), None)
    executor = LocalExecutor(config)
    supervisors, seen = [new_supervisor(store, config, executor)], set()
    times = config.supervisor.model_copy(update={"stall_s": stall_s})
    strict = config.model_copy(update={"supervisor": times})

    def has_ended() -> bool:
        supervisors[-1].step()
        job = store.get(folder.name, None)
        seen.add(progress(job, JobFolder(folder))["stage"])
        if "evaluating" in seen and len(supervisors) == 1:
            supervisors.append(new_supervisor(store, strict, executor))
        return job.state.ended

    wait_for(has_ended, 800)
    return store.get(folder.name, None), seen


@pytest.mark.parametrize("hangs_at", [None, 10])
def test_a_stage_of_three_times_the_limit_completes_and_one_that_hangs_is_stopped(
    store: JobStore, root: Path, hangs_at: int | None
) -> None:
    rows = int(3 * STALL_S / 0.1)
    script = CHILD.replace("ROWS", str(rows)).replace("HANGS_AT", str(hangs_at))
    config = configured(root, script)
    folder = config.jobs_dir / "job"
    folder.mkdir(parents=True)
    job, seen = settled(store, config, folder, STALL_S)
    assert "evaluating" in seen
    told = [event for event in read(JobFolder(folder).events).events if event.type == "progress"]
    if hangs_at is None:
        assert (job.state, job.reason) == (JobState.COMPLETED, None)
        assert told[-1].done == told[-1].total == rows
        assert len(told) < rows, "not a line a row"
    else:
        assert (job.state, job.attempts) == (JobState.FAILED, 1)
        assert str(job.reason).startswith(f"no sign of life for {STALL_S / 60:.3g} minutes (`supervisor.stall_s`)")
        assert told[-1].done <= hangs_at


def test_a_slow_evaluation_before_the_first_step_is_no_stall_and_a_save_that_hangs_is(
    store: JobStore, root: Path, workshop: Workshop
) -> None:
    """A DPO job: 12 batches of held-out pairs take three times the limit, then its checkpoint is never written."""
    stall_s = 12.0
    job_folder = workshop.job("dpo", "granitemoe", validation=dpo_rows(24, first=100), training={"batch_size": 2})
    script = TRAINING.replace("SLOW_S", str(3 * stall_s / 12))
    job, seen = settled(store, configured(root, script), job_folder.root, stall_s)
    events = read(job_folder.events).events
    evaluated = [event for event in events if event.type == "evaluation"]
    took_s = [event.time for event in events if event.type == "progress" and event.stage == "evaluating"]
    assert evaluated, job.reason
    assert (took_s[-1] - took_s[0]).total_seconds() > 2.5 * stall_s
    assert (job.state, job.attempts) == (JobState.FAILED, 1)
    assert str(job.reason).startswith("no sign of life for 0.2 minutes (`supervisor.stall_s`)"), job.reason
    assert {"evaluating", "saving a checkpoint"} <= seen

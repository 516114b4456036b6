"""Laws for export jobs: none exists without its parent, none is lost, and neither job undoes the other."""

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.store.store import JobStore, NewJob
from llama_stack_provider_moe.control.supervisor.removal import Retention, remove
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor
from llama_stack_provider_moe.errors import Conflict, NotFound
from llama_stack_provider_moe.jobdir.events import now
from llama_stack_provider_moe.jobdir.export_steps import ExportStep, ExportSteps, StepState, steps_of
from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec import JOB_SPEC, ExportSpec
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.jobs_support import ended, new_job, new_supervisor, submit, tiny_config

BODY = {
    "recipe": "sft", "model": "some/model", "data": {"dataset_id": "d"}, "adapter": {"rank": 2},
    "export": {"merged": True, "shard_size": "1GB"},
}  # fmt: skip


@pytest.fixture
def shared(url: str) -> JobStore:
    """A store on either database."""
    return JobStore(url)


def export(of: str, job_id: str = "export") -> NewJob:
    return NewJob(job_id, "ann", "export", "some/model", f"/jobs/{job_id}", parent=of)


def completed(store: JobStore, job_id: str = "parent") -> None:
    submit(store, job_id)
    store.move(job_id, JobState.IN_PROGRESS)
    store.move(job_id, JobState.COMPLETED)


# The store.


def test_an_export_is_of_a_completed_job(shared: JobStore) -> None:
    with pytest.raises(NotFound):
        shared.add(export("parent"))
    submit(shared, "parent")
    for state in (JobState.SCHEDULED, JobState.IN_PROGRESS):
        with pytest.raises(Conflict, match=f"'parent' is {state.value}; only completed jobs can be exported"):
            shared.add(export("parent"))
        if state is JobState.SCHEDULED:
            shared.move("parent", JobState.IN_PROGRESS)
    shared.move("parent", JobState.COMPLETED)
    first, second = (shared.add(export("parent", name)) for name in ("first", "second"))
    assert (first.parent, first.state, first.recipe) == ("parent", JobState.SCHEDULED, "export")
    assert [job.id for job in shared.exports("parent")] == ["second", "first"]
    assert shared.exports("first") == []
    assert shared.get("parent", None).parent is None
    assert shared.get("second", "ann") == second
    shared.close()


def test_a_job_completes_together_with_its_export_or_not_at_all(shared: JobStore) -> None:
    for job_id in ("parent", "export"):
        submit(shared, job_id)
    shared.move("parent", JobState.IN_PROGRESS)
    with pytest.raises(Conflict, match="the name of its export was just taken"):
        shared.move("parent", JobState.COMPLETED, export=export("parent"))
    assert shared.get("parent", None).state is JobState.IN_PROGRESS
    shared.move("parent", JobState.COMPLETED, export=export("parent", "other"))
    assert [job.id for job in shared.exports("parent")] == ["other"]
    assert shared.queue_position("other") == 2, "the last in its owner's queue"
    with pytest.raises(Conflict):
        shared.move("parent", JobState.COMPLETED, export=export("parent", "twice"))
    assert len(shared.exports("parent")) == 1
    shared.close()


def test_a_parent_goes_with_its_exports_and_never_under_one_that_runs(shared: JobStore) -> None:
    completed(shared)
    completed(shared, "stranger")
    shared.add(export("parent", "waits"))
    shared.add(export("parent", "ended"))
    shared.add(export("stranger", "strangers"))
    shared.request_cancel("ended", None)
    gone: list[str] = []
    with pytest.raises(Conflict, match="'parent' is being exported: job 'waits' is scheduled"):
        shared.delete("parent", None, lambda job: gone.append(job.id))
    shared.move("waits", JobState.IN_PROGRESS)
    with pytest.raises(Conflict, match="'waits' is in_progress"):
        shared.delete("parent", None)
    assert gone == []
    shared.move("waits", JobState.FAILED)
    assert [job.id for job in shared.delete("parent", "ann", lambda job: gone.append(job.id))] == [
        "parent", "ended", "waits",
    ]  # fmt: skip
    assert gone == ["waits", "ended", "parent"], "the parent last: while its row is there, it can be deleted again"
    assert {job.id for job in shared.list(None)} == {"stranger", "strangers"}
    shared.close()


def test_an_export_can_go_alone_and_be_resumed(shared: JobStore) -> None:
    completed(shared)
    shared.add(export("parent"))
    shared.request_cancel("export", None)
    assert shared.resume("export", "ann").parent == "parent"
    shared.request_cancel("export", None)
    shared.delete("export", None)
    assert [job.id for job in shared.list(None)] == ["parent"]
    shared.close()


def test_a_job_is_as_old_as_its_youngest_export(shared: JobStore) -> None:
    completed(shared)
    before = now()
    shared.add(export("parent"))
    assert shared.ended_before(now()) == [], "its export waits"
    shared.request_cancel("export", None)
    assert shared.ended_before(before) == []
    assert {job.id for job in shared.ended_before(now() + timedelta(seconds=1))} == {"parent", "export"}
    shared.close()


# The supervisor.


def asking(config: ProviderConfig, store: JobStore, job_id: str, **plan: object) -> JobFolder:
    """A job that asks for exports; its tiny child follows `plan`."""
    folder = JobFolder(new_job(store, config, job_id, **plan))
    write_atomic(folder.spec, JOB_SPEC.validate_python(BODY | {"job_uuid": job_id}))
    return folder


def test_a_completed_job_hands_over_to_its_export_which_fails_for_itself(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor
) -> None:
    asking(config, store, "parent")
    job = ended(store, supervisor, "parent")
    assert (job.state, job.reason) == (JobState.COMPLETED, None)
    (made,) = store.exports("parent")
    assert (made.owner, made.model, made.folder) == ("ann", "some/model", str(config.jobs_dir / made.id))
    # Its tiny child finds no plan there, and ends with an exit code.
    assert (made.state, made.attempts) == (JobState.FAILED, 1)
    spec = JobFolder(Path(made.folder)).read_spec()
    assert isinstance(spec, ExportSpec)
    assert (spec.of, spec.model, spec.job_uuid, spec.export.shard_size) == ("parent", "some/model", made.id, "1GB")
    assert store.get("parent", None) == job


@pytest.mark.parametrize("plan", [{"end": "failed"}, {"end": 3}])
def test_what_did_not_complete_is_not_exported(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor, plan: dict[str, object]
) -> None:
    asking(config, store, "parent", **plan)
    assert ended(store, supervisor, "parent").state is JobState.FAILED
    assert [job.id for job in store.list(None)] == ["parent"]


class Died(BaseException):
    """The supervisor's process has died."""


@pytest.mark.parametrize("after", [False, True], ids=["before the transaction", "after it"])
def test_a_supervisor_that_dies_in_between_loses_no_export_and_makes_no_second(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    asking(config, store, "parent")
    move: Callable[..., object] = store.move

    def dies(job_id: str, *rest: object) -> None:
        if after:
            move(job_id, *rest)
        raise Died

    with monkeypatch.context() as during:
        during.setattr(store, "move", dies)
        with pytest.raises(Died):
            ended(store, supervisor, "parent")
    assert len(list(config.jobs_dir.iterdir())) == 1 + after, "the folder comes with its row"
    successor = new_supervisor(store, config)
    successor.id = supervisor.id  # of the same process: the child is its own
    assert ended(store, successor, "parent").state is JobState.COMPLETED
    assert len(store.exports("parent")) == 1
    assert {path.name for path in config.jobs_dir.iterdir()} == {job.id for job in store.list(None)}


def test_a_name_that_is_taken_is_not_taken_away(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor
) -> None:
    asking(config, store, "parent")
    first = ended(store, supervisor, "parent") and store.exports("parent")[0]
    remove(store, config, "parent", None)
    mine = JobFolder(new_job(store, config, first.id))  # the name that the next such export would get
    store.request_cancel(first.id, None)
    asking(config, store, "parent")
    assert ended(store, supervisor, "parent").state is JobState.COMPLETED
    assert store.exports("parent")[0].id != first.id
    assert json.loads((mine.root / "child.json").read_text()) == {}


def test_a_damaged_spec_does_not_undo_the_training(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor
) -> None:
    folder = asking(config, store, "parent")
    folder.spec.write_text('{"recipe": "sft"')
    job = ended(store, supervisor, "parent")
    assert job.state is JobState.COMPLETED
    assert "completed, but not exported: " in str(job.reason)


def test_folders_of_exports_go_with_the_parents(store: JobStore, root: Path, supervisor: Supervisor) -> None:
    config = tiny_config(root, retention_days=1e-9)
    asking(config, store, "parent")
    ended(store, supervisor, "parent")
    assert len(list(config.jobs_dir.iterdir())) == 2
    assert len(Retention(store, config).remove_older()) == 2
    assert list(config.jobs_dir.iterdir()) == []
    assert store.list(None) == []


# Steps.

TWO = [ExportStep(name="merged", state=StepState.IN_PROGRESS, started_at=now()), ExportStep(name="next")]


@pytest.mark.parametrize(
    ("state", "seen"),
    [
        (JobState.IN_PROGRESS, [("in_progress", None), ("scheduled", None)]),
        (JobState.SCHEDULED, [("scheduled", None), ("scheduled", None)]),
        (JobState.CANCELLED, [("cancelled", None), ("cancelled", None)]),
        (JobState.FAILED, [("failed", "killed"), ("skipped", "the job ended before this step")]),
    ],
)
def test_a_step_is_never_in_progress_when_nobody_works_at_it(
    tmp_path: Path, state: JobState, seen: list[tuple[str, str | None]]
) -> None:
    folder = JobFolder(tmp_path)
    assert steps_of(folder, state, "killed") == []
    write_atomic(folder.exports, ExportSteps(steps=TWO))
    assert [(step.state, step.reason) for step in steps_of(folder, state, "killed")] == seen
    folder.exports.write_text("{")
    assert [step.state for step in steps_of(folder, state, "killed")] == [StepState.UNREADABLE]

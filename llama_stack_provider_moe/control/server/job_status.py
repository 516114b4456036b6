"""The status of a job, from its row in the store, its folder and its exports."""

from datetime import datetime
from typing import TypedDict

from llama_stack_provider_moe.control.server import exports, playgrounds, views
from llama_stack_provider_moe.control.server.progress import progress
from llama_stack_provider_moe.control.server.wire import (
    Checkpoint,
    JobDetail,
    Notification,
    PostTrainingJobStatusResponse,
)
from llama_stack_provider_moe.control.store.outbox import Delivery, Message
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.jobdir.reading import why_unreadable
from llama_stack_provider_moe.jobdir.row_sources import SOURCES_FILE, read_sources
from llama_stack_provider_moe.jobdir.state import JobState


class _Status(TypedDict):
    job_uuid: str
    status: JobState
    scheduled_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    resources_allocated: dict[str, object]
    checkpoints: list[Checkpoint]


def status(job: Job, store: JobStore) -> PostTrainingJobStatusResponse:
    """Return the status of a job."""
    return PostTrainingJobStatusResponse(**_status(job, store))


def detail(job: Job, store: JobStore) -> JobDetail:
    """Return all details of a job."""
    folder = views.folder_of(job)
    facts = _status(job, store)
    resources = facts["resources_allocated"]
    manifest = None
    sources = None
    problems = [job.unreadable]
    try:
        manifest = folder.read_manifest()
    except (OSError, ValueError) as error:
        problems.append(f"{folder.manifest.name}: {why_unreadable(error)}")
    try:
        sources = read_sources(folder)
    except (OSError, ValueError) as error:
        problems.append(f"{SOURCES_FILE}: {why_unreadable(error)}")
    if any(problems):
        resources["unreadable"] = "; ".join(filter(None, problems))
    resources["disk_bytes"] = views.disk_bytes(job)
    why = resources.get("reason")
    return JobDetail(
        **facts,
        recipe=job.recipe,
        model=job.model,
        parent=job.parent,
        owner=job.owner,
        labels=store.labels([job.id]).get(job.id, {}),
        note=job.note,
        sweep=job.sweep,
        pipeline=job.pipeline,
        waits_for=_waits_for(job, store),
        notifications=[_notification(message) for message in store.outbox.of(job.id)],
        cancel_requested_at=job.cancel_requested_at,
        attempts=job.attempts,
        reason=why if isinstance(why, str) else None,
        folder=job.folder,
        spec=views.json_of(folder.spec),
        rows=views.json_of(folder.row_reports),
        resolved=views.json_of(folder.resolved),
        summary=manifest.summary if manifest else None,
        sources=sources,
    )


def _notification(message: Message) -> Notification:
    return Notification(
        id=message.id,
        event=message.event,
        url=message.url,
        state=message.state,
        attempts=message.attempts,
        next_attempt_at=message.due_at if message.state is Delivery.WAITING else None,
        told=message.told,
    )


def reason(job: Job) -> str | None:
    """Return why a job failed, was cancelled or waits to start again; while it runs again, why the last start ended."""
    if job.reason is None or job.state is not JobState.IN_PROGRESS:
        return job.reason
    return f"last start: {job.reason}"


def _waits_for(job: Job, store: JobStore) -> list[str]:
    return store.waits.of_jobs([job.id]).get(job.id, []) if job.state is JobState.SCHEDULED else []


def _status(job: Job, store: JobStore) -> _Status:
    reached = progress(job, views.folder_of(job))
    resources: dict[str, object] = dict(reached)
    if job.state is JobState.SCHEDULED:
        resources["queue_position"] = store.queue_position(job.id)
        resources["waits_for"] = _waits_for(job, store)
        reached["reason"] = reached["reason"] or playgrounds.in_the_way(store)
    resources |= {
        "attempts": job.attempts,
        "lost": job.lost,
        "devices": job.devices,
        "stopped_by": job.stopped_by,
        "run": job.run,
    }
    if job.unreadable is not None:
        resources["unreadable"] = job.unreadable
    if why := "; ".join(filter(None, (reached["reason"], reason(job)))):
        resources["reason"] = why
    else:
        del resources["reason"]
    exported = exports.exports_of(job, store)
    if exported:
        resources["exports"] = [each.model_dump(mode="json") for each in exported]
    return {
        "job_uuid": job.id,
        "status": job.state,
        "scheduled_at": job.scheduled_at,
        "started_at": job.started_at,
        "completed_at": job.ended_at,
        "resources_allocated": resources,
        "checkpoints": exports.checkpoints(job, store),
    }

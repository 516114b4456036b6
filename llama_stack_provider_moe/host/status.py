"""How a job stands, of all that is known of it: the store's row, its folder, its exports. Reads only."""

from contextlib import suppress
from typing import Any

from llama_stack_provider_moe.host import exports, views
from llama_stack_provider_moe.host.wire import JobDetail, PostTrainingJobStatusResponse
from llama_stack_provider_moe.jobs.progress import progress
from llama_stack_provider_moe.jobs.state import JobState
from llama_stack_provider_moe.jobs.store import Job, JobStore


def status(job: Job, store: JobStore) -> PostTrainingJobStatusResponse:
    """How a job stands."""
    return PostTrainingJobStatusResponse(**_status(job, store))


def detail(job: Job, store: JobStore) -> JobDetail:
    """A job whole."""
    folder = views.folder_of(job)
    manifest = None
    with suppress(ValueError):  # a damaged one; a job that ended so has failed, and `reason` says why
        manifest = folder.read_manifest()
    facts = _status(job, store)
    facts["resources_allocated"]["disk_bytes"] = views.disk_bytes(job)
    return JobDetail(
        **facts,
        recipe=job.recipe,
        model=job.model,
        parent=job.parent,
        cancel_requested_at=job.cancel_requested_at,
        attempts=job.attempts,
        reason=job.reason,
        folder=job.folder,
        spec=views.json_of(folder.spec),
        resolved=views.json_of(folder.resolved),
        summary=manifest.summary if manifest else None,
    )


def _status(job: Job, store: JobStore) -> dict[str, Any]:
    resources = progress(job, views.folder_of(job))
    if job.state is JobState.SCHEDULED:
        resources["queue_position"] = store.queue_position(job.id)
    resources |= {"lost": job.lost, "devices": job.devices, "stopped_by": job.stopped_by, "run": job.run}
    if job.reason is not None:
        resources["reason"] = job.reason
    exported = exports.standing(job, store)
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

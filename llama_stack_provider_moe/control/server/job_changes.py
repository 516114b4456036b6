"""Resuming and deleting a job, in a thread: what the store does, and what belongs to it on disk."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

from llama_stack_provider_moe.control.server import playgrounds, resumable, serving, submissions, views, wire
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.control.supervisor import removal
from llama_stack_provider_moe.errors import Conflict, NotFound
from llama_stack_provider_moe.jobdir.experts_backend import write_override
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.moe import ExpertsBackend
from llama_stack_provider_moe.spec.server_config import ProviderConfig

log = logging.getLogger(__name__)


def must_be_free(store: JobStore, job_id: str) -> None:
    """Raise `Conflict` if there is a job of this name, whoever owns it."""
    try:
        store.get(job_id, None)
    except NotFound:
        return
    raise Conflict(f"job_uuid: {job_id!r} is taken; leave it out, or choose another name")


def resume(
    store: JobStore, config: ProviderConfig, job_id: str, whose: str | None, backend: ExpertsBackend | None = None
) -> submissions.ResumedJob:
    """Put a cancelled or failed job back into the queue.

    Args:
        store: the store.
        config: the server's configuration.
        job_id: the job.
        whose: the owner whose jobs the caller may use; None for every owner's.
        backend: what computes the experts from now on; None leaves that as it is.

    Raises:
        InvalidBody: the job is not valid with this backend.
        InvalidInput: the job has no experts to compute.
    """
    job = store.get(job_id, whose)
    first: Callable[[], None] | None = None
    found: submissions.Resumes = "from_beginning"
    if job.state in (JobState.FAILED, JobState.CANCELLED):  # `store.resume` refuses the other states
        found = must_be_resumable(store, config, job)
        if backend is not None:
            resumable.must_be_valid_with(job, backend)
            reason = f"asked for when the job was resumed at {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
            first = partial(write_override, views.folder_of(job), backend, reason)
    store.resume(job_id, whose, config.limits, first)
    return submissions.ResumedJob(job_uuid=job_id, resumes=found)


def must_be_resumable(store: JobStore, config: ProviderConfig, job: Job) -> submissions.Resumes:
    """Return where a job that failed or was cancelled resumes from; raise `Conflict` where it can't be resumed."""
    found = resumable.must_be_resumable(job)
    resumable.must_find_its_sources(job, store, config.jobs_dir)
    if job.recipe == playgrounds.RECIPE:
        playgrounds.must_be_alone(store, job.owner, but=job.id)
    return found


def delete(store: JobStore, config: ProviderConfig, job_id: str, whose: str | None, force: bool) -> wire.DeletedJob:
    """Delete a job that has ended, and its exports.

    Args:
        store: the store.
        config: the server's configuration.
        job_id: the job.
        whose: as in `resume`.
        force: delete it even if other jobs need its files.
    """
    job = store.get(job_id, whose)
    elsewhere = views.places(job)[1:]
    served = [model for each in (job, *store.exports(job_id)) if (model := serving.model_id_of(each)) is not None]
    removed = removal.remove(store, config, job_id, whose, force)
    exports, broken = [job.id for job in removed.exports], removal.broken_by(removed)
    log.info("deleted: job %s%s", " ".join([job_id, *exports]), f"; breaks {'; '.join(broken)}" if broken else "")
    kept = [str(path) for path in elsewhere if path.exists()]
    if any(removal.are_left(config, each) for each in (job_id, *exports)):
        served = []  # it is withdrawn later
    return wire.DeletedJob(
        job_uuid=job_id, kept=kept, exports=exports, broken=broken, withdrawn=served[0] if served else None
    )

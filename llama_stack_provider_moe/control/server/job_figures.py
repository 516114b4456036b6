"""How many jobs there are and how each stands, for the callers who may read them."""

from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from os import stat
from pathlib import Path

from llama_stack_provider_moe.control.server import views
from llama_stack_provider_moe.control.server.job_status import reason
from llama_stack_provider_moe.control.server.progress import JobProgress, progress
from llama_stack_provider_moe.control.server.wire_overview import JobFigures, ListJobFigures, Overview
from llama_stack_provider_moe.control.store.owners import is_one_user
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.errors import Forbidden, NotFound
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.recipes import RECIPES

_KEPT = 4096  # jobs whose figures are remembered: those of a job that has ended never change
_TRAIN_LOSS = (
    "ce",
    "preference_loss",
    "breaker_loss",
    "divergence",
    "loss",
)  # a recipe's own, without balance terms, is first


def overview(store: JobStore, whose: str | None) -> Overview:
    """Return what the caller may see of this server."""
    return Overview(
        jobs=store.counts(whose),
        recipes=list(RECIPES),
        reads_every_owner=not is_one_user(whose),
        version=version("llama-stack-provider-moe"),
    )


def figures(store: JobStore, whose: str | None, names: Sequence[str]) -> ListJobFigures:
    """Return how the named jobs stand; jobs that the caller may not read are left out, as if there were none."""
    found = []
    for name in names:
        try:
            job = store.get(name, whose)
        except NotFound:
            continue
        waits = job.state is JobState.SCHEDULED
        found.append(_figures(job, store.queue_position(job.id) if waits else None))
    return ListJobFigures(data=found)


def _figures(job: Job, queue_position: int | None) -> JobFigures:
    try:
        folder = views.folder_of(job)
        reached = _progress(job, folder)
    except Forbidden as error:  # a link in the job's folder: this job alone is unreadable
        return _unknown(job, queue_position, str(error))
    metrics, evaluation = reached["metrics"] or {}, reached["evaluation"]
    held_out = evaluation["last"]["metrics"].get("validation_loss") if evaluation is not None else None
    return JobFigures(
        job_uuid=job.id,
        status=job.state,
        stage=reached["stage"],
        step=reached["step"],
        max_steps=reached["max_steps"],
        percent=reached["percent"],
        eta_s=reached["eta_s"],
        loss=next((metrics[name] for name in _TRAIN_LOSS if name in metrics), None),
        held_out_loss=held_out,
        queue_position=queue_position,
        devices=job.devices,
        reason="; ".join(filter(None, (reached["reason"], reason(job)))) or None,
    )


def _unknown(job: Job, queue_position: int | None, why: str) -> JobFigures:
    return JobFigures(
        job_uuid=job.id, status=job.state, stage=None, step=None, max_steps=None, percent=None, eta_s=None, loss=None,
        held_out_loss=None, queue_position=queue_position, devices=job.devices, reason=why,
    )  # fmt: skip


def _progress(job: Job, folder: JobFolder) -> JobProgress:
    """The progress of a job; a list is asked for again every few seconds, and most of its jobs have ended."""
    if not job.state.ended:
        return progress(job, folder)
    try:
        size_bytes = stat(folder.events).st_size
    except OSError:
        size_bytes = 0
    return _of_ended(_Ended(job, size_bytes))


class _Ended:
    """A job that has ended, with the size of its events; equal to another look at the same job."""

    def __init__(self, job: Job, size_bytes: int) -> None:
        self.job = job
        self._key = (job.id, job.folder, job.state, job.attempts, job.ended_at, size_bytes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Ended) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@lru_cache(_KEPT)
def _of_ended(ended: _Ended) -> JobProgress:
    return progress(ended.job, JobFolder(Path(ended.job.folder)))

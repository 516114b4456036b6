"""Builds the API's answers about pipelines."""

from contextlib import suppress

from llama_stack_provider_moe.control.server import job_status, views
from llama_stack_provider_moe.control.server.progress import progress
from llama_stack_provider_moe.control.server.wire import JsonObject
from llama_stack_provider_moe.control.server.wire_pipelines import (
    ListPipelinesResponse,
    Part,
    PartExport,
    Pipeline,
    PipelineLine,
)
from llama_stack_provider_moe.control.store import part_rows
from llama_stack_provider_moe.control.store.pipeline_ends import PipelineState
from llama_stack_provider_moe.control.store.pipeline_rows import PipelineDetail
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.errors import Forbidden
from llama_stack_provider_moe.jobdir.state import JobState


def page(store: JobStore, whose: str | None, limit: int, after: str | None) -> ListPipelinesResponse:
    """Return a page of pipelines, newest first.

    Args:
        store: the store.
        whose: the owner of the pipelines; None for all owners.
        limit: largest number of pipelines.
        after: the last pipeline of the previous page.
    """
    found = store.pipelines.list(whose, limit + 1, after)
    return ListPipelinesResponse(data=[line(each) for each in found[:limit]], has_more=len(found) > limit)


def line(found: PipelineState) -> PipelineLine:
    """Return a pipeline as an entry of a list."""
    return PipelineLine.model_validate(_line(found))


def detail(found: PipelineDetail) -> Pipeline:
    """Return a pipeline with its parts and their progress."""
    parts = [_part(part, found) for part in found.parts if part.job in found.jobs]
    return Pipeline.model_validate(_line(found.found) | {"parts": parts, "lost": list(found.found.lost)})


def state_of(job: Job, exports: list[Job]) -> JobState:
    """Return the state of a part: a part whose export goes on has not completed.

    Args:
        job: its job.
        exports: the exports of that job within the pipeline, oldest first.
    """
    if job.state is not JobState.COMPLETED or not exports:
        return job.state
    states = [export.state for export in exports]
    if not all(state.ended for state in states):
        return JobState.IN_PROGRESS
    return next((state for state in states if state is not JobState.COMPLETED), JobState.COMPLETED)


def _line(found: PipelineState) -> JsonObject:
    pipeline = found.pipeline
    return {
        "pipeline_uuid": pipeline.id,
        "status": found.state,
        "owner": pipeline.owner,
        "created_at": pipeline.created_at,
        "cancel_requested_at": pipeline.cancel_requested_at,
        "jobs": found.counts,
    }


def _part(part: part_rows.Part, found: PipelineDetail) -> Part:
    job, exports = found.jobs[part.job], found.exports_of(part.job)
    state = state_of(job, exports)
    shown = next((each for each in exports if not each.state.ended), job)  # what works now
    reached = None
    with suppress(Forbidden):  # a file of it is a link; the other parts are still shown
        reached = progress(shown, views.folder_of(shown))
    reasons = [job_status.reason(job), *(job_status.reason(each) for each in exports if each.state.ended)]
    return Part(
        name=part.name,
        job_uuid=job.id,
        recipe=job.recipe,
        model=job.model,
        status=state,
        waits_for=found.waits.get(job.id, []) if job.state is JobState.SCHEDULED else [],
        stage="unreadable" if reached is None else reached["stage"],
        step=None if reached is None else reached["step"],
        max_steps=None if reached is None else reached["max_steps"],
        eta_s=None if reached is None else reached["eta_s"],
        attempts=job.attempts,
        started_at=job.started_at,
        completed_at=job.ended_at if not exports else exports[-1].ended_at,
        reason="; ".join(filter(None, reasons)) or None,
        exports=[PartExport(job_uuid=each.id, status=each.state, reason=each.reason) for each in exports],
    )

"""The list of jobs with its filters, and the labels and notes that jobs are found by.

GET   jobs                    `?state=`, `recipe`, `model`, `label`, `owner`, `sweep`, `pipeline`, `text`
PATCH jobs/{id}               labels and note
"""

from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import APIRouter, Body, Query, Request
from pydantic import WrapValidator

from llama_stack_provider_moe.control.server import callers, views, wire, wire_requests
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.job_filter import JobFilter
from llama_stack_provider_moe.control.store.labels import LabelChange, LabelledJob
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.labels import MAX_LABELS
from llama_stack_provider_moe.spec.validation_errors import validated

MAX_JOBS = 1000
MAX_TEXT = 256
# Not `JobState` itself: it takes any other text for a state of another version.
StateName = Literal["scheduled", "in_progress", "completed", "failed", "cancelled", "unreadable"]
if TYPE_CHECKING:
    ChangeBody = object
else:  # a thread validates it; the document has the real type
    ChangeBody = Annotated[wire_requests.JobChange, WrapValidator(lambda body, _: body), Body()]


def add_list(router: APIRouter, impl: PostTrainingService) -> None:
    """Add the list of jobs to the router of `impl`, and the route that labels one."""

    @router.get("/jobs", summary="Get training jobs, newest first: all, or those that fit every filter.")
    async def jobs(
        limit: Annotated[int, Query(ge=1, le=MAX_JOBS)] = MAX_JOBS,
        after: Annotated[str | None, Query(description="The last job of the previous page.")] = None,
        state: Annotated[
            list[StateName] | None, Query(description="State of the jobs; repeat it for one of several.")
        ] = None,
        recipe: Annotated[str | None, Query(description="Recipe of the jobs.", max_length=64)] = None,
        model: Annotated[str | None, Query(description="Model of the jobs, as the list shows it.")] = None,
        label: Annotated[
            list[str] | None,
            Query(
                description="A label of the jobs, `KEY=VALUE`, or `KEY` with any value; repeat it for several.",
                max_length=MAX_LABELS,
            ),
        ] = None,
        owner: Annotated[
            str | None, Query(description="Owner of the jobs, as the list shows it; for administrators.")
        ] = None,
        sweep: Annotated[str | None, Query(description="Sweep that the jobs belong to.")] = None,
        pipeline: Annotated[str | None, Query(description="Pipeline that the jobs belong to.")] = None,
        text: Annotated[
            str | None,
            Query(description="A part of name, model, note or a label's value, in any case.", max_length=MAX_TEXT),
        ] = None,
    ) -> wire.ListPostTrainingJobsResponse:
        chosen = JobFilter(
            states=tuple(map(JobState, state or ())),
            recipe=recipe,
            model=model,
            labels=tuple(map(_label, label or ())),
            owner=owner,
            sweep=sweep,
            pipeline=pipeline,
            text=text or None,
        )
        return await impl.seen(lambda store, whose: page(store, whose, limit, after, chosen))

    @router.patch("/jobs/{job_uuid}", summary="Change the labels and the note of a job, in any state.")
    async def change(job_uuid: str, request: Request, body: ChangeBody | None = None) -> wire.JobLabels:
        # Access is checked first, so that errors of the body reveal nothing to others.
        await impl.changed(lambda store, whose: store.get(job_uuid, whose))
        size_bytes = len(await request.body())
        asked = await impl.guard.bodies.run(size_bytes, validated, wire_requests.JobChange, body)
        wanted = LabelChange(asked.labels, asked.note, "note" in asked.model_fields_set)

        def changed(store: JobStore, whose: str | None) -> LabelledJob:
            return store.label(job_uuid, whose, wanted)

        found = await impl.changed(changed)
        impl.audit.note(callers.owner(), "label", job=job_uuid)
        return wire.JobLabels(job_uuid=job_uuid, labels=found.labels, note=found.job.note)


def page(
    store: JobStore, whose: str | None, limit: int, after: str | None, chosen: JobFilter
) -> wire.ListPostTrainingJobsResponse:
    """Return a page of jobs, newest first.

    Args:
        store: the store.
        whose: the owner of the jobs; None for all owners.
        limit: largest number of jobs.
        after: the last job of the previous page, which the filter need not choose.
        chosen: the filter.
    """
    found = store.list(whose, limit + 1, after, chosen)
    shown = found[:limit]
    labels = store.labels(job.id for job in shown)
    waits = store.waits.of_jobs([job.id for job in shown if job.state is JobState.SCHEDULED])
    return wire.ListPostTrainingJobsResponse(
        data=[views.line(job, labels.get(job.id, {}), waits.get(job.id, [])) for job in shown],
        has_more=len(found) > limit,
    )


def _label(text: str) -> tuple[str, str | None]:
    key, equals, value = text.partition("=")
    if not key:
        raise InvalidInput("label", text, "KEY=VALUE, or KEY")
    return key, value if equals else None

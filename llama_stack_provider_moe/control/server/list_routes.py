"""The list of jobs with its filters.

GET   jobs                    `?state=`, `recipe`, `text`
"""

from typing import Annotated, Literal

from fastapi import APIRouter, Query

from llama_stack_provider_moe.control.server import views, wire
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.job_filter import JobFilter
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.jobdir.state import JobState

MAX_JOBS = 1000
MAX_TEXT = 256
# Not `JobState`, which takes any text: a row in the store may have a state of a later version.
State = Literal["scheduled", "in_progress", "completed", "failed", "cancelled"]


def add_list(router: APIRouter, impl: PostTrainingService) -> None:
    """Add the list of jobs to the router of `impl`."""

    @router.get("/jobs", summary="Get training jobs, newest first: all, or those that fit every filter.")
    async def jobs(
        limit: Annotated[int, Query(ge=1, le=MAX_JOBS)] = MAX_JOBS,
        after: Annotated[str | None, Query(description="The last job of the previous page.")] = None,
        state: Annotated[
            list[State] | None, Query(description="State of the jobs; repeat it for one of several.")
        ] = None,
        recipe: Annotated[str | None, Query(description="Recipe of the jobs.", max_length=64)] = None,
        text: Annotated[
            str | None, Query(description="A part of the job's name or the model's, in any case.", max_length=MAX_TEXT)
        ] = None,
    ) -> wire.ListPostTrainingJobsResponse:
        chosen = JobFilter(states=tuple(map(JobState, state or ())), recipe=recipe, text=text or None)
        return await impl.seen(lambda store, whose: page(store, whose, limit, after, chosen))


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
    return wire.ListPostTrainingJobsResponse(
        data=[views.line(job) for job in found[:limit]], has_more=len(found) > limit
    )

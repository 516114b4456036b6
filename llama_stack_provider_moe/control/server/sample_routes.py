"""Route for the answers that a job generated.

GET  jobs/{id}/samples   the newest answers with their rewards, or those of a step
"""

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from llama_stack_provider_moe.control.server import views
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.jobdir import samples
from llama_stack_provider_moe.jobdir.samples import GeneratedSample

MOST = 500
STEPS_SHOWN = 6  # in an error


class ListSamples(BaseModel):
    """Answers that a job generated, with their rewards."""

    job_uuid: str
    steps: list[int] = Field(description="Steps whose answers the job still has, in ascending order.")
    data: list[GeneratedSample] = Field(description="Answers, of the newest step first, and of a step in their order.")


def add_samples(router: APIRouter, impl: PostTrainingService) -> None:
    """Add this route to the router of `impl`."""

    @router.get("/jobs/{job_uuid}/samples", summary="Get answers that a job generated, with their rewards.")
    async def samples_of(
        job_uuid: str,
        step: Annotated[
            int | None, Query(ge=1, le=10**9, description="Step that learns from them first; left out: the newest.")
        ] = None,
        limit: Annotated[int, Query(ge=1, le=MOST, description="Largest number of answers.")] = 50,
    ) -> ListSamples:
        def view(store: JobStore, whose: str | None) -> ListSamples:
            job = store.get(job_uuid, whose)
            folder = views.folder_of(job).samples
            there = samples.steps(folder)
            if step is not None and step not in there:
                raise InvalidInput("step", step, f"a step whose answers the job still has: {_listed(there)}")
            found: list[GeneratedSample] = []
            for each in reversed(there) if step is None else [step]:
                found += samples.read(folder, each, limit - len(found))
                if len(found) == limit:
                    break
            return ListSamples(job_uuid=job.id, steps=there, data=found)

        return await impl.seen(view)


def _listed(steps: list[int]) -> str:
    if not steps:
        return "none, because the job keeps no answers"
    shown = list(map(str, steps))
    return ", ".join(shown if len(shown) <= STEPS_SHOWN else [*shown[: STEPS_SHOWN - 2], "...", shown[-1]])

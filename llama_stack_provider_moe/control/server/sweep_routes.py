"""The routes for sweeps.

POST   sweeps                 one job, and the values of its settings to try
GET    sweeps, sweeps/{id}    with its jobs ranked
POST   sweeps/{id}/cancel
DELETE sweeps/{id}            with all its jobs
"""

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Body, Query, Request
from pydantic import WrapValidator

from llama_stack_provider_moe.control.server import sweep_views, wire_sweeps
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.spec.sweeps import SweepSpec

MAX_SWEEPS = 1000
if TYPE_CHECKING:
    SweepBody = object
else:  # a thread validates it; the document has the real type
    SweepBody = Annotated[SweepSpec, WrapValidator(lambda body, _: body), Body()]


def add_sweeps(router: APIRouter, impl: PostTrainingService) -> None:
    """Add the routes for sweeps to the router of `impl`."""

    @router.post("/sweeps", summary="Run a job with every combination of some settings, and rank the results.")
    async def create(body: SweepBody, request: Request) -> wire_sweeps.SubmittedSweep:
        return await impl.sweeps.create(body, len(await request.body()))

    @router.get("/sweeps", summary="Get all sweeps, newest first.")
    async def sweeps(
        limit: Annotated[int, Query(ge=1, le=MAX_SWEEPS)] = MAX_SWEEPS,
        after: Annotated[str | None, Query(description="The last sweep of the previous page.")] = None,
    ) -> wire_sweeps.ListSweepsResponse:
        return await impl.seen(lambda store, whose: sweep_views.page(store, whose, limit, after))

    @router.get("/sweeps/{sweep_uuid}", summary="Get a sweep and its jobs, the best first.")
    async def sweep(sweep_uuid: str) -> wire_sweeps.Sweep:
        return await impl.seen(lambda store, whose: sweep_views.detail(store.sweeps.get(sweep_uuid, whose)))

    @router.post("/sweeps/{sweep_uuid}/cancel", summary="Cancel all jobs of a sweep that wait or run.")
    async def cancel(sweep_uuid: str) -> wire_sweeps.SweepLine:
        return sweep_views.line((await impl.sweeps.cancel(sweep_uuid)).found)

    @router.delete("/sweeps/{sweep_uuid}", summary="Delete a sweep that has ended, its jobs and their folders.")
    async def delete(
        sweep_uuid: str,
        force: Annotated[
            bool, Query(description="Delete its jobs even if other jobs need their files; the answer lists those.")
        ] = False,
    ) -> wire_sweeps.DeletedSweep:
        return await impl.sweeps.delete(sweep_uuid, force)

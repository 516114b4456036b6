"""Routes for pages that show many jobs, and for those that make one.

GET  overview                 counts of the caller's jobs; what the server is
GET  figures?jobs=a,b         how these jobs stand, in a few figures each
GET  jobs/{id}/routing        balance of the experts over the steps
GET  jobs/{id}/routing/shares   share of every expert over the last steps
GET  templates, schema        job files of this package; the JSON schema of a job
POST jobs/plan                whether a job fits into memory, and how long it will train, before it is sent
"""

import json
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Body, Query, Request
from fastapi.responses import JSONResponse
from pydantic import SkipValidation

from llama_stack_provider_moe.control.server import (
    allowed_paths,
    callers,
    job_figures,
    job_plans,
    routing_series,
    routing_shares,
    views,
    wire_overview,
)
from llama_stack_provider_moe.control.server.api_requests import Draft
from llama_stack_provider_moe.control.server.measured_time import measured
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.server.wire import JsonObject
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec import JOB_SPEC, JobSpec, TrainingSpec
from llama_stack_provider_moe.spec.job_templates import job_templates, summary
from llama_stack_provider_moe.spec.run_time import rows_in_epoch

if TYPE_CHECKING:
    JobBody = object
else:
    JobBody = Annotated[SkipValidation[JobSpec], Body()]
MAX_FIGURES = 100
MAX_COLUMNS = 1000
LEAST_BYTES, MOST_BYTES = 10**8, 10**13  # memory of a device


def add_overview(router: APIRouter, impl: PostTrainingService) -> None:
    """Add these routes to the router of `impl`."""

    @router.get("/overview", summary="Get the number of the caller's jobs in each state, and what the server is.")
    async def overview() -> wire_overview.Overview:
        return await impl.seen(job_figures.overview)

    @router.get("/figures", summary="Get how several jobs stand, in a few figures each.")
    async def figures(
        jobs: Annotated[str, Query(description=f"Names of at most {MAX_FIGURES} jobs, `a,b`.", max_length=4096)],
    ) -> wire_overview.ListJobFigures:
        names = list(dict.fromkeys(filter(None, jobs.split(","))))
        if len(names) > MAX_FIGURES:
            raise InvalidInput("jobs", f"{len(names)} names", f"at most {MAX_FIGURES} names")
        return await impl.seen(partial(job_figures.figures, names=names))

    @router.get("/jobs/{job_uuid}/routing", summary="Get how a job's routers used their experts over its steps.")
    async def routing(
        job_uuid: str,
        layer: Annotated[
            int | None, Query(ge=0, le=10_000, description="Layer whose experts are shown; left out: the first one.")
        ] = None,
        limit: Annotated[
            int, Query(ge=1, le=MAX_COLUMNS, description="Largest number of steps; more are thinned evenly.")
        ] = 200,
    ) -> wire_overview.RoutingSeries:
        def view(store: JobStore, whose: str | None) -> wire_overview.RoutingSeries:
            job = store.get(job_uuid, whose)
            return routing_series.series(job.id, views.folder_of(job).events, layer, limit)

        return await impl.seen(view)

    @router.get("/jobs/{job_uuid}/routing/shares", summary="Get the share of every expert over a job's last steps.")
    async def routing_of_all_layers(job_uuid: str) -> wire_overview.RoutingShares:
        def view(store: JobStore, whose: str | None) -> wire_overview.RoutingShares:
            job = store.get(job_uuid, whose)
            return routing_shares.shares(job.id, views.folder_of(job).events)

        return await impl.seen(view)

    @router.get("/templates", summary="Get the job files of this package, to start a job from.")
    async def templates() -> wire_overview.ListJobTemplates:
        return await impl.guard.in_state_dir(_templates)

    @router.get("/schema", summary="Get the JSON schema of a job.", response_model=JsonObject)
    async def schema() -> JSONResponse:
        return JSONResponse(await impl.guard.in_state_dir(_schema))

    @router.post("/jobs/plan", summary="Get whether a job fits into memory, what would help, and how long it trains.")
    async def plan(
        body: JobBody,
        request: Request,
        memory_bytes: Annotated[
            int,
            Query(
                ge=LEAST_BYTES, le=MOST_BYTES, description="Memory of each GPU; for a job on the CPU, of the machine."
            ),
        ] = 80 * 10**9,
    ) -> JsonObject:
        spec = await impl.checked(Draft(body, may_wait=False), len(await request.body()))
        rows = images = None
        if isinstance(spec, TrainingSpec):
            owner = callers.owner()
            counts = [await impl.datasets.row_count(owner, each) for each in spec.data.training_ids]
            rows = rows_in_epoch(spec, counts)
            with_images = [await impl.datasets.has_images(owner, each) for each in spec.data.training_ids]
            images = 0 if all(each is False for each in with_images) else None
        document = await job_plans.plan(spec, memory_bytes, impl.config, rows, images)
        model = allowed_paths.model_of(spec, impl.config)
        time = await impl.guard.run(measured, spec, model, impl.store, callers.owner(), rows)
        return document if time is None else document | {"time": time}


@lru_cache(1)
def _templates() -> wire_overview.ListJobTemplates:
    found = job_templates().items()
    return wire_overview.ListJobTemplates(
        data=[
            wire_overview.JobTemplate(name=name, summary=summary(file), job=json.loads(file.read_bytes()))
            for name, file in found
        ]
    )


@lru_cache(1)
def _schema() -> JsonObject:
    return JOB_SPEC.json_schema()

"""Every route of the post-training API: the six of llama-stack 0.6.1, the older family, and ours.

    POST supervised-fine-tune, preference-optimize            0.6.1
    GET  jobs/{id}/status, artifacts; POST jobs/{id}/cancel
    GET  job/status, job/artifacts; POST job/cancel           clients up to 0.6.1: the id is `?job_uuid=`
    POST jobs, jobs/validate                                  a whole JobSpec
    GET  jobs/{id}, jobs/{id}/logs, events, metrics; health
    GET  jobs/{id}/artifacts/{name}, artifacts/{name}/{path}  files
    POST, GET jobs/{id}/exports
    POST jobs/{id}/resume; DELETE jobs/{id}
    GET  jobs; PATCH jobs/{id}                                see `list_routes`
    POST, GET, DELETE sweeps                                  see `sweep_routes`
    POST, GET, DELETE pipelines                               see `pipeline_routes`
    POST, GET, DELETE jobs/{id}/prompts                       see `playground_routes`
    PUT, GET, DELETE datasets                                 see `dataset_routes`
    GET  activity                                             see `activity`
    GET  quota, quotas                                        the caller's limits; every owner's
    GET  metrics                                              for Prometheus, if the server's `prometheus` is on
    /v1/fine_tuning/...                                       OpenAI's fine-tuning API, see `openai.routes`
    GET  jobs/{id}/report                                     one HTML file about a job, see `job_reports`
    overview, figures, templates, schema, POST jobs/plan      for pages, see `overview_routes`
    /moe/...                                                  the dashboard, see `control.dashboard`

Ours are served under `/v1alpha/post-training`, and again under `/v1/post-training` for older SDKs.
Errors always have the form `{"error": {"message": ...}}`, see `answers`; OpenAI's have more fields.
"""

from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, TypedDict

from fastapi import APIRouter, Body, Header, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import SkipValidation, WrapValidator

from llama_stack_provider_moe.control.dashboard import routes as dashboard
from llama_stack_provider_moe.control.server import (
    callers,
    compat,
    prometheus,
    stream,
    submissions,
    wire,
    wire_quota,
    wire_requests,
)
from llama_stack_provider_moe.control.server.activity import add_activity
from llama_stack_provider_moe.control.server.answers import answers_of
from llama_stack_provider_moe.control.server.dataset_routes import add_datasets
from llama_stack_provider_moe.control.server.event_routes import Offset, add_events
from llama_stack_provider_moe.control.server.files import download
from llama_stack_provider_moe.control.server.grader_routes import add_graders
from llama_stack_provider_moe.control.server.job_reports import add_reports
from llama_stack_provider_moe.control.server.list_routes import add_list
from llama_stack_provider_moe.control.server.openai import routes as openai_routes
from llama_stack_provider_moe.control.server.overview_routes import add_overview
from llama_stack_provider_moe.control.server.pipeline_routes import add_pipelines
from llama_stack_provider_moe.control.server.playground_routes import add_playground
from llama_stack_provider_moe.control.server.sample_routes import add_samples
from llama_stack_provider_moe.control.server.schemas import documented_refusals
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.server.sweep_routes import add_sweeps
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec import Exports, JobSpec
from llama_stack_provider_moe.spec.validation_errors import validated

PREFIX = "/v1alpha/post-training"
# Python SDKs 0.2 and npm SDKs 0.2 and 0.3 call the API here. The OpenAPI document leaves it out as a repetition.
OLDER_PREFIX = "/v1/post-training"


class _RouteOptions(TypedDict):
    response_model_exclude_defaults: bool


NOTES_IF_ANY: _RouteOptions = {"response_model_exclude_defaults": True}
MAX_LINES = 10_000
MAX_POINTS = 10_000

# The OpenAPI document has the real types. The service validates bodies in a thread, and a job after it has added the
# server's defaults.
if TYPE_CHECKING:
    JobBody = object
    ExportBody = object
    SFTBody = object
    DPOBody = object
    CancelBody = object
    ResumeBody = object
else:
    # Unlike SkipValidation, this keeps a named schema in the document.
    _AS_IT_CAME = WrapValidator(lambda body, _: body)
    SFTBody = Annotated[wire_requests.SupervisedFineTuneRequest, _AS_IT_CAME, Body()]
    DPOBody = Annotated[wire_requests.PreferenceOptimizeRequest, _AS_IT_CAME, Body()]
    CancelBody = Annotated[wire_requests.CancelTrainingJobRequest, _AS_IT_CAME, Body()]
    ResumeBody = Annotated[wire_requests.Resumption, _AS_IT_CAME, Body()]
    JobBody = Annotated[SkipValidation[JobSpec], Body()]
    ExportBody = Annotated[SkipValidation[Exports], Body()]  # without one, the service refuses it once it has the job
REFUSALS = documented_refusals(wire.Error, (
        HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND,
        HTTPStatus.CONFLICT, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.INSUFFICIENT_STORAGE,
))  # fmt: skip
JobUuid = Annotated[str | None, Query(description="Name of the job; newer routes have it in the path.")]


def create_router(impl: PostTrainingService) -> APIRouter:
    """Return a router with all routes of `impl`: ours under both prefixes, OpenAI's, and the dashboard's."""
    both = APIRouter()
    for prefix in (PREFIX, OLDER_PREFIX):
        # Flat: llama-stack 0.6.1 and 0.7.3 look for routes at the top level only, to find out which are public.
        both.routes.extend(_routes(impl, prefix).routes)
    both.routes.extend(openai_routes.create_router(impl).routes)
    pages = dashboard.create_router(answers_of(impl), compat.PUBLIC_ROUTE_KEY, impl.guard.in_state_dir)
    both.routes.extend(pages.routes)
    return both


def _routes(impl: PostTrainingService, prefix: str) -> APIRouter:
    router = APIRouter(
        prefix=prefix, tags=["Post Training"], route_class=answers_of(impl, knows_query=True), responses=REFUSALS,
        include_in_schema=prefix == PREFIX,
    )  # fmt: skip
    _add_creation(router, impl)
    add_list(router, impl)
    _add_jobs(router, impl)
    _add_artifacts(router, impl)
    _add_exports(router, impl)
    _add_observation(router, impl)
    add_events(router, impl)
    add_reports(router, impl)
    add_overview(router, impl)
    add_samples(router, impl)
    add_playground(router, impl)
    _add_old_family(router, impl)
    add_datasets(router, impl)
    add_sweeps(router, impl)
    add_pipelines(router, impl)
    add_activity(router, impl)
    add_graders(router, impl)
    _add_quotas(router, impl)

    @router.get(
        "/health",
        summary="Get whether the server can accept and run jobs.",
        response_model=wire.Health,
        responses={HTTPStatus.SERVICE_UNAVAILABLE: {"model": wire.Health, "description": "The store does not answer."}},
        openapi_extra={compat.PUBLIC_ROUTE_KEY: True},
    )
    async def health() -> Response:
        found = await impl.health()
        status = HTTPStatus.OK if found.status != "error" else HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse(found.model_dump(mode="json"), status_code=status)

    if impl.config.prometheus:

        @router.get("/metrics", summary="Get the store's figures for Prometheus.", response_class=PlainTextResponse)
        async def metrics() -> PlainTextResponse:
            return PlainTextResponse(await impl.prometheus(), media_type=prometheus.MEDIA_TYPE)

    return router


def _add_creation(router: APIRouter, impl: PostTrainingService) -> None:
    @router.post("/supervised-fine-tune", summary="Run supervised fine-tuning of a model.", **NOTES_IF_ANY)
    async def supervised_fine_tune(body: SFTBody, request: Request) -> submissions.SubmittedJob:
        return await impl.supervised_fine_tune(body, await _size_bytes(request))

    @router.post("/preference-optimize", summary="Run preference optimization of a model.", **NOTES_IF_ANY)
    async def preference_optimize(body: DPOBody, request: Request) -> submissions.SubmittedJob:
        return await impl.preference_optimize(body, await _size_bytes(request))

    @router.post("/jobs", summary="Run a job of any recipe, given as a complete JobSpec.", **NOTES_IF_ANY)
    async def submit(body: JobBody, request: Request) -> submissions.SubmittedJob:
        return await impl.submit(body, await _size_bytes(request))

    @router.post("/jobs/validate", summary="Check a job like a submission, without creating it.")
    async def validate(body: JobBody, request: Request) -> submissions.Validated:
        return await impl.validate(body, await _size_bytes(request))


def _add_jobs(router: APIRouter, impl: PostTrainingService) -> None:
    @router.get("/jobs/{job_uuid}", summary="Get all details of a job.")
    async def detail(job_uuid: str) -> wire.JobDetail:
        return await impl.detail(job_uuid)

    @router.get("/jobs/{job_uuid}/status", summary="Get the status of a training job.")
    async def status(job_uuid: str) -> wire.PostTrainingJobStatusResponse:
        return await impl.status(job_uuid)

    @router.post("/jobs/{job_uuid}/cancel", summary="Cancel a training job.")
    async def cancel(job_uuid: str) -> None:
        await impl.cancel(job_uuid)

    @router.post(
        "/jobs/{job_uuid}/resume",
        summary="Resume a cancelled or failed job from its last complete checkpoint, or from the beginning.",
    )
    async def resume(job_uuid: str, request: Request, body: ResumeBody | None = None) -> submissions.ResumedJob:
        return await impl.resume(job_uuid, body, await _size_bytes(request))

    @router.delete("/jobs/{job_uuid}", summary="Delete a training job that has ended, and its folder.")
    async def delete(
        job_uuid: str,
        force: Annotated[
            bool, Query(description="Delete the job even if other jobs need its files; the answer lists them.")
        ] = False,
    ) -> wire.DeletedJob:
        return await impl.delete(job_uuid, force)


def _add_artifacts(router: APIRouter, impl: PostTrainingService) -> None:
    @router.get("/jobs/{job_uuid}/artifacts", summary="Get the artifacts of a training job.")
    async def artifacts(job_uuid: str) -> wire.PostTrainingJobArtifactsResponse:
        return await impl.artifacts(job_uuid)

    @router.get("/jobs/{job_uuid}/artifacts/{name}", summary="Get the files of an artifact, with their checksums.")
    async def files(job_uuid: str, name: str) -> wire.ArtifactFiles:
        return await impl.artifact(job_uuid, name)

    @router.get(
        "/jobs/{job_uuid}/artifacts/{name}/{path:path}",
        summary="Download a file of an artifact.",
        response_class=FileResponse,
        responses={
            HTTPStatus.OK: {"content": {"application/octet-stream": {}}},
            HTTPStatus.PARTIAL_CONTENT: {"content": {"application/octet-stream": {}}, "description": "The range."},
            HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE: {"description": "The range begins beyond the end of the file."},
        },
    )
    async def file(
        job_uuid: str,
        name: str,
        path: str,
        wanted: Annotated[str | None, Header(alias="Range", description="One range of bytes.")] = None,
        if_range: Annotated[str | None, Header(description="The ETag of the file that the range belongs to.")] = None,
    ) -> FileResponse:
        return download(await impl.artifact_file(job_uuid, name, path), wanted, if_range)


def _add_exports(router: APIRouter, impl: PostTrainingService) -> None:
    @router.post(
        "/jobs/{job_uuid}/exports",
        summary="Export the model of a completed job for serving.",
        **NOTES_IF_ANY,
    )
    async def export(job_uuid: str, request: Request, body: ExportBody | None = None) -> submissions.SubmittedJob:
        return await impl.export(job_uuid, body, await _size_bytes(request))

    @router.get("/jobs/{job_uuid}/exports", summary="Get the exports of a job, and the progress of their steps.")
    async def exports(job_uuid: str) -> wire.ListExportsResponse:
        return await impl.exports(job_uuid)


def _add_observation(router: APIRouter, impl: PostTrainingService) -> None:
    @router.get(
        "/jobs/{job_uuid}/logs",
        summary="Get lines of a training job's output, or follow it.",
        response_model=wire.PostTrainingJobLogStream,
        responses={HTTPStatus.OK: {"content": {stream.MEDIA_TYPE: {}}}},
    )
    async def logs(
        job_uuid: str,
        tail: Annotated[
            int, Query(ge=1, le=MAX_LINES, description="Number of last lines; has no effect with `offset`.")
        ] = 200,
        offset: Annotated[
            Offset | None, Query(description="Byte to continue from: `next_offset` of the previous answer.")
        ] = None,
        follow: Annotated[bool, Query(description="Stream server-sent events until the job has ended.")] = False,
        last_event_id: Annotated[
            Offset | None,
            Header(description="With `follow`: the `id` of the last event received; takes precedence over `offset`."),
        ] = None,
    ) -> wire.PostTrainingJobLogStream | Response:
        if not follow:
            return await impl.logs(job_uuid, tail, offset)
        lines = await impl.follow(job_uuid, tail, offset if last_event_id is None else last_event_id)
        return StreamingResponse(lines, media_type=stream.MEDIA_TYPE, headers=stream.HEADERS)

    @router.get("/jobs/{job_uuid}/metrics", summary="Get the metrics of a training job as time series.")
    async def metrics(
        job_uuid: str,
        names: Annotated[str | None, Query(description="Metrics to return, `a,b`; by default all.")] = None,
        since_step: Annotated[int | None, Query(ge=0, description="Return only points after this step.")] = None,
        limit: Annotated[
            int, Query(ge=1, le=MAX_POINTS, description="Largest number of points; more are thinned evenly.")
        ] = 1000,
    ) -> wire.MetricSeries:
        chosen = None if names is None else {name.strip() for name in names.split(",")}
        return await impl.metrics(job_uuid, chosen, since_step, limit)


def _add_quotas(router: APIRouter, impl: PostTrainingService) -> None:
    @router.get("/quota", summary="Get what the caller uses of this server, and what is left.")
    async def quota() -> wire_quota.Quota:
        return await impl.guard.run(impl.quotas.of, callers.owner())

    @router.get("/quotas", summary="Get what every owner uses of this server; only for administrators.")
    async def quotas() -> wire_quota.ListQuotasResponse:
        impl.must_read_every_job("quotas name every owner")
        return await impl.guard.run(impl.quotas.all)


def _add_old_family(router: APIRouter, impl: PostTrainingService) -> None:
    @router.get("/job/status", summary="Get the status of a training job (old route).")
    async def status(job_uuid: JobUuid = None) -> wire.PostTrainingJobStatusResponse:
        return await impl.status(_named(job_uuid))

    @router.get("/job/artifacts", summary="Get the artifacts of a training job (old route).")
    async def artifacts(job_uuid: JobUuid = None) -> wire.PostTrainingJobArtifactsResponse:
        return await impl.artifacts(_named(job_uuid))

    @router.post("/job/cancel", summary="Cancel a training job (old route).")
    async def cancel(request: Request, body: CancelBody | None = None, job_uuid: JobUuid = None) -> None:
        if body is not None:
            size_bytes = await _size_bytes(request)
            job_uuid = (
                await impl.guard.bodies.run(size_bytes, validated, wire_requests.CancelTrainingJobRequest, body)
            ).job_uuid
        await impl.cancel(_named(job_uuid))


async def _size_bytes(request: Request) -> int:
    return len(await request.body())  # FastAPI has read and kept it


def _named(job_uuid: str | None) -> str:
    if job_uuid is None:
        # llama-stack-client 0.5 to 0.6.1 call these routes without the parameter.
        raise InvalidInput("job_uuid", None, "the job's name; with llama-stack-client up to 0.6.1, pass "
                           "extra_query={'job_uuid': ...}")  # fmt: skip
    return job_uuid

"""Every route of the post-training API: the six of llama-stack 0.6.1, the older family, and ours.

    POST supervised-fine-tune, preference-optimize            0.6.1
    GET  jobs; jobs/{id}/status, artifacts; POST jobs/{id}/cancel
    GET  job/status, job/artifacts; POST job/cancel           clients up to 0.6.1: the id is `?job_uuid=`
    POST jobs, jobs/validate                                  a whole JobSpec
    GET  jobs/{id}, jobs/{id}/logs, events, metrics; health
    GET  jobs/{id}/artifacts/{name}, artifacts/{name}/{path}  files
    POST, GET jobs/{id}/exports
    POST jobs/{id}/resume; DELETE jobs/{id}
    GET  metrics                                              for Prometheus, where the server's `prometheus` says so

An error is always `{"error": {"message": ...}}`; none reaches the host's own handler, for after that one 0.6.1
drops the connection.
"""

import inspect
import logging
from collections.abc import Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from fastapi import APIRouter, Body, Header, Query, Request, Response
from fastapi import HTTPException as FastAPIError
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field, SkipValidation
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from llama_stack_provider_moe.errors import InvalidInput, MoeError
from llama_stack_provider_moe.host import compat, exposition, stream, wire
from llama_stack_provider_moe.host.download import download
from llama_stack_provider_moe.host.explain import invalid_body
from llama_stack_provider_moe.host.safe_json import made_safe
from llama_stack_provider_moe.host.service import PostTrainingService
from llama_stack_provider_moe.spec import Exports, JobSpec

PREFIX = "/v1alpha/post-training"
MAX_JOBS = 1000
MAX_LINES = 10_000
MAX_EVENTS = 10_000
MAX_POINTS = 10_000
MAX_ERROR = 500  # characters of an error that is not ours
log = logging.getLogger(__name__)

# Documented as a JobSpec; validated in the service, when the server's defaults lie beneath it.
if TYPE_CHECKING:
    JobBody = dict[str, Any]
    ExportBody = dict[str, Any]
else:
    JobBody = Annotated[SkipValidation[JobSpec], Body()]
    ExportBody = Annotated[SkipValidation[Exports], Body()]  # left out: refused by the service, after the job is found
# Not the host's `standard_responses`: in the document that 0.6.1 serves their references lead nowhere.
REFUSALS: dict[int | str, dict[str, Any]] = {
    status.value: {"model": wire.Error, "description": status.phrase}
    for status in (
        HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND,
        HTTPStatus.CONFLICT, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.INTERNAL_SERVER_ERROR,
    )
}  # fmt: skip
# What no file exceeds, and `seek` takes.
Offset = Annotated[int, Field(ge=0, lt=2**63)]
JobUuid = Annotated[str | None, Query(description="The job; the newer routes have it in their path.")]


class Answers(APIRoute):
    """A route whose exceptions are answers, and whose answers are safe to show.

    Attributes:
        impl: the service that is asked; it knows the limits, and counts refusals.
    """

    impl: ClassVar[PostTrainingService]

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of every request to this route."""
        handle = super().get_route_handler()
        limit_bytes = self.impl.config.max_body_bytes

        async def checked(request: Request) -> Response:
            try:
                return await handle(Request(request.scope, _bounded(request.receive, limit_bytes)))
            except MoeError as error:
                return _error(error.status, str(error))
            except RequestValidationError as error:
                return _error(HTTPStatus.BAD_REQUEST, str(invalid_body(error.errors(), self._body_model())))
            except HTTPException as error:  # Starlette's: FastAPI raises it itself, as well as its own subclass
                why = f" ({error.__cause__})" if error.__cause__ else ""
                return _error(error.status_code, f"{error.detail}{why}"[:MAX_ERROR], error.headers)
            except Exception:
                # %r: a path may hold what the terminal of the log's reader would obey.
                log.exception("%s %r failed", request.method, request.url.path)
                return _error(HTTPStatus.INTERNAL_SERVER_ERROR, "something went wrong on the server; its log says what")

        async def answer(request: Request) -> Response:
            response = await checked(request)
            if response.status_code >= HTTPStatus.BAD_REQUEST:
                self.impl.refused(request.method, self.path_format, response.status_code)
            return made_safe(response)

        return answer

    def _body_model(self) -> type[BaseModel] | None:
        annotations = [each.annotation for each in inspect.signature(self.endpoint).parameters.values()]
        return next((each for each in annotations if isinstance(each, type) and issubclass(each, BaseModel)), None)


def _answers_of(service: PostTrainingService) -> type[Answers]:
    class Bound(Answers):
        impl = service

    return Bound


def _bounded(receive: Receive, limit_bytes: int) -> Receive:
    """`receive` of a request whose body may have `limit_bytes`; no more than these are ever held."""
    came = 0

    async def bounded() -> Message:
        nonlocal came
        message = await receive()
        came += len(message.get("body", b""))
        if came > limit_bytes:
            raise FastAPIError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the body has more than {limit_bytes} bytes (`max_body_bytes` of this server); rows belong into a "
                "data set, not into a job",
            )
        return message

    return bounded


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    # A path or key of the caller's may hold what UTF-8 can't encode.
    text = message.encode("utf-8", "backslashreplace").decode()
    return JSONResponse({"error": {"message": text}}, status_code=status, headers=headers)


def create_router(impl: PostTrainingService) -> APIRouter:
    """All routes of `impl`."""
    router = APIRouter(prefix=PREFIX, tags=["Post Training"], route_class=_answers_of(impl), responses=REFUSALS)
    _add_creation(router, impl)
    _add_jobs(router, impl)
    _add_artifacts(router, impl)
    _add_exports(router, impl)
    _add_observation(router, impl)
    _add_old_family(router, impl)

    @router.get("/health", summary="Whether jobs can be taken and run.", openapi_extra={compat.PUBLIC_ROUTE_KEY: True})
    async def health(response: Response) -> wire.Health:
        found = await impl.health()
        if found.status != "ok":
            response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
        return found

    if impl.config.prometheus:

        @router.get("/metrics", summary="The store's figures for Prometheus.", response_class=PlainTextResponse)
        async def metrics() -> PlainTextResponse:
            return PlainTextResponse(await impl.exposition(), media_type=exposition.MEDIA_TYPE)

    return router


def _add_creation(router: APIRouter, impl: PostTrainingService) -> None:
    @router.post("/supervised-fine-tune", summary="Run supervised fine-tuning of a model.")
    async def supervised_fine_tune(request: wire.SupervisedFineTuneRequest) -> wire.PostTrainingJob:
        return await impl.supervised_fine_tune(request)

    @router.post("/preference-optimize", summary="Run preference optimization of a model.")
    async def preference_optimize(request: wire.PreferenceOptimizeRequest) -> wire.PostTrainingJob:
        return await impl.preference_optimize(request)

    @router.post("/jobs", summary="Run a job given whole, of any recipe.")
    async def submit(body: JobBody) -> wire.PostTrainingJob:
        return await impl.submit(body)

    @router.post("/jobs/validate", summary="Check a job as its submission would, and create nothing.")
    async def validate(body: JobBody) -> wire.Validated:
        return await impl.validate(body)


def _add_jobs(router: APIRouter, impl: PostTrainingService) -> None:
    @router.get("/jobs", summary="Get all training jobs, newest first.")
    async def jobs(
        limit: Annotated[int, Query(ge=1, le=MAX_JOBS)] = MAX_JOBS,
        after: Annotated[str | None, Query(description="The last job of the page before.")] = None,
    ) -> wire.ListPostTrainingJobsResponse:
        return await impl.jobs(limit, after)

    @router.get("/jobs/{job_uuid}", summary="Get a job whole.")
    async def detail(job_uuid: str) -> wire.JobDetail:
        return await impl.detail(job_uuid)

    @router.get("/jobs/{job_uuid}/status", summary="Get the status of a training job.")
    async def status(job_uuid: str) -> wire.PostTrainingJobStatusResponse:
        return await impl.status(job_uuid)

    @router.post("/jobs/{job_uuid}/cancel", summary="Cancel a training job.")
    async def cancel(job_uuid: str) -> None:
        await impl.cancel(job_uuid)

    @router.post(
        "/jobs/{job_uuid}/resume", summary="Let a cancelled or failed job go on from its last valid checkpoint."
    )
    async def resume(job_uuid: str) -> wire.PostTrainingJob:
        return await impl.resume(job_uuid)

    @router.delete("/jobs/{job_uuid}", summary="Delete a training job that has ended, with its folder.")
    async def delete(job_uuid: str) -> wire.DeletedJob:
        return await impl.delete(job_uuid)


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
            HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE: {"description": "The range begins beyond the end."},
        },
    )
    async def file(
        job_uuid: str,
        name: str,
        path: str,
        wanted: Annotated[str | None, Header(alias="Range", description="One range of bytes.")] = None,
        if_range: Annotated[str | None, Header(description="The ETag that a range is of.")] = None,
    ) -> FileResponse:
        return download(await impl.artifact_file(job_uuid, name, path), wanted, if_range)


def _add_exports(router: APIRouter, impl: PostTrainingService) -> None:
    @router.post("/jobs/{job_uuid}/exports", summary="Make of what a completed job has trained what can be served.")
    async def export(job_uuid: str, body: ExportBody | None = None) -> wire.PostTrainingJob:
        return await impl.export(job_uuid, body)

    @router.get("/jobs/{job_uuid}/exports", summary="Get the exports of a job, and how their steps stand.")
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
        tail: Annotated[int, Query(ge=1, le=MAX_LINES, description="Last lines; not with `offset`.")] = 200,
        offset: Annotated[Offset | None, Query(description="Byte to go on from: `next_offset`.")] = None,
        follow: Annotated[bool, Query(description="Server-sent events until the job has ended.")] = False,
        last_event_id: Annotated[
            Offset | None, Header(description="With `follow`: the `id` of the last event seen; before `offset`.")
        ] = None,
    ) -> wire.PostTrainingJobLogStream | Response:
        if not follow:
            return await impl.logs(job_uuid, tail, offset)
        lines = await impl.follow(job_uuid, tail, offset if last_event_id is None else last_event_id)
        return StreamingResponse(lines, media_type=stream.MEDIA_TYPE, headers=stream.HEADERS)

    @router.get("/jobs/{job_uuid}/events", summary="Get a page of a training job's events.")
    async def events(
        job_uuid: str,
        cursor: Annotated[Offset, Query(description="Byte to go on from: `cursor` of the page before.")] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_EVENTS, description="Most events.")] = 1000,
    ) -> wire.Events:
        return await impl.events(job_uuid, cursor, limit)

    @router.get("/jobs/{job_uuid}/metrics", summary="Get what a training job's steps measured, as time series.")
    async def metrics(
        job_uuid: str,
        names: Annotated[str | None, Query(description="Metrics to give, `a,b`; left out: all.")] = None,
        since_step: Annotated[int | None, Query(ge=0, description="Give what came after this step alone.")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_POINTS, description="Most points; more are thinned evenly.")] = 1000,
    ) -> wire.MetricSeries:
        chosen = None if names is None else {name.strip() for name in names.split(",")}
        return await impl.metrics(job_uuid, chosen, since_step, limit)


def _add_old_family(router: APIRouter, impl: PostTrainingService) -> None:
    @router.get("/job/status", summary="Get the status of a training job (old route).")
    async def status(job_uuid: JobUuid = None) -> wire.PostTrainingJobStatusResponse:
        return await impl.status(_named(job_uuid))

    @router.get("/job/artifacts", summary="Get the artifacts of a training job (old route).")
    async def artifacts(job_uuid: JobUuid = None) -> wire.PostTrainingJobArtifactsResponse:
        return await impl.artifacts(_named(job_uuid))

    @router.post("/job/cancel", summary="Cancel a training job (old route).")
    async def cancel(body: wire.CancelTrainingJobRequest | None = None, job_uuid: JobUuid = None) -> None:
        await impl.cancel(_named(body.job_uuid if body else job_uuid))


def _named(job_uuid: str | None) -> str:
    if job_uuid is None:
        # llama-stack-client 0.5 to 0.6.1 call these routes and have lost the parameter.
        raise InvalidInput("job_uuid", None, "the job's name; with llama-stack-client up to 0.6.1, pass "
                           "extra_query={'job_uuid': ...}")  # fmt: skip
    return job_uuid

"""The routes of OpenAI's fine-tuning API.

    POST, GET fine_tuning/jobs
    GET  fine_tuning/jobs/{id}; POST .../cancel, pause, resume
    GET  fine_tuning/jobs/{id}/events, checkpoints
    GET  fine_tuning/files/{id}, files/{id}/content           result files
    POST fine_tuning/alpha/graders/validate, run              tries of graders

Each job of the post-training API that trains is a fine-tuning job, and the other way round.
"""

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Body, Path, Query, Request, Response
from pydantic import WrapValidator

from llama_stack_provider_moe.control.server import serving
from llama_stack_provider_moe.control.server.answers import Answers
from llama_stack_provider_moe.control.server.grader_routes import add_graders
from llama_stack_provider_moe.control.server.openai import events, ids, jobs, objects, refusals, requests, results
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.errors import InvalidRows

PREFIX = "/v1/fine_tuning"
MAX_ITEMS = 1000
CSV = "text/csv; charset=utf-8"

if TYPE_CHECKING:
    RequestBody = object
else:  # a thread validates it; the document has the real type
    RequestBody = Annotated[requests.FineTuningRequest, WrapValidator(lambda body, _: body), Body()]
JobId = Annotated[str, Path(description="Id of the fine-tuning job: `ftjob-` and the name of the job.")]
FileId = Annotated[str, Path(description="Id of a result file, from `result_files` of a job.")]
Limit = Annotated[int, Query(ge=1, le=MAX_ITEMS, description="Largest number in the page.")]
After = Annotated[str | None, Query(description="Id of the last one of the previous page.")]
REFUSALS: dict[int | str, dict[str, Any]] = {
    status.value: {"model": objects.OpenAIError, "description": status.phrase}
    for status in (
        HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND,
        HTTPStatus.CONFLICT, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.INTERNAL_SERVER_ERROR,
        HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.INSUFFICIENT_STORAGE,
    )
}  # fmt: skip
_METADATA_KEY = re.compile(r"metadata\[(.*)\]", re.DOTALL)
_METADATA: dict[str, Any] = {
    "parameters": [
        {
            "name": "metadata", "in": "query", "required": False, "style": "deepObject", "explode": True,
            "schema": {"type": "object", "additionalProperties": {"type": "string"}},
            "description": "Pairs that the jobs have, `metadata[KEY]=VALUE`; `metadata=null`: jobs without any.",
        }
    ]
}  # fmt: skip


class _OpenAIAnswers(Answers):
    @staticmethod
    def describe(status: int, message: str, error: Exception | None) -> Mapping[str, object]:
        return refusals.described(status, message, error)


def create_router(impl: PostTrainingService) -> APIRouter:
    """Return a router with the fine-tuning routes of `impl`, each with its whole path."""

    class Bound(_OpenAIAnswers):
        pass

    Bound.impl = impl
    router = APIRouter(prefix=PREFIX, tags=["Fine Tuning"], route_class=Bound, responses=REFUSALS)
    _add_jobs(router, impl)
    _add_changes(router, impl)
    _add_observation(router, impl)
    _add_files(router, impl)
    add_graders(router, impl, "/alpha")
    return router


def _add_jobs(router: APIRouter, impl: PostTrainingService) -> None:
    @router.post("/jobs", summary="Create a fine-tuning job.")
    async def create(body: RequestBody, request: Request) -> objects.FineTuningJob:
        size_bytes = len(await request.body())
        asked, draft = await impl.guard.bodies.run(size_bytes, requests.drafted, body, impl.config)
        try:
            made = await impl.submit(draft, size_bytes)
        except InvalidRows as error:
            in_training = error.dataset_id == asked.training_file
            error.field = "training_file" if in_training else "validation_file"
            raise
        return await _retrieved(impl, made.job_uuid)

    @router.get("/jobs", summary="Get the fine-tuning jobs, newest first.", openapi_extra=_METADATA)
    async def listed(request: Request, limit: Limit = 20, after: After = None) -> objects.FineTuningJobs:
        wanted, last = _wanted(request), None if after is None else ids.job_of(after)
        return await impl.seen(lambda store, whose: jobs.page(store, whose, impl.config, limit, last, wanted))

    @router.get("/jobs/{fine_tuning_job_id}", summary="Get a fine-tuning job.")
    async def retrieve(fine_tuning_job_id: JobId) -> objects.FineTuningJob:
        return await _retrieved(impl, ids.job_of(fine_tuning_job_id))


def _add_changes(router: APIRouter, impl: PostTrainingService) -> None:
    async def stopped(fine_tuning_job_id: str) -> objects.FineTuningJob:
        job_id = ids.job_of(fine_tuning_job_id)
        await _retrieved(impl, job_id)  # otherwise this could stop a job that is not a fine-tuning job
        await impl.cancel(job_id)
        return await _retrieved(impl, job_id)

    @router.post("/jobs/{fine_tuning_job_id}/cancel", summary="Cancel a fine-tuning job; it can be resumed.")
    async def cancel(fine_tuning_job_id: JobId) -> objects.FineTuningJob:
        return await stopped(fine_tuning_job_id)

    @router.post("/jobs/{fine_tuning_job_id}/pause", summary="Stop a fine-tuning job like cancel, with a checkpoint.")
    async def pause(fine_tuning_job_id: JobId) -> objects.FineTuningJob:
        return await stopped(fine_tuning_job_id)

    @router.post(
        "/jobs/{fine_tuning_job_id}/resume",
        summary="Resume a cancelled or failed fine-tuning job from its last checkpoint.",
    )
    async def resume(fine_tuning_job_id: JobId) -> objects.FineTuningJob:
        job_id = ids.job_of(fine_tuning_job_id)
        await _retrieved(impl, job_id)
        await impl.resume(job_id)
        return await _retrieved(impl, job_id)


def _add_observation(router: APIRouter, impl: PostTrainingService) -> None:
    @router.get("/jobs/{fine_tuning_job_id}/events", summary="Get the events of a fine-tuning job, newest first.")
    async def listed(fine_tuning_job_id: JobId, limit: Limit = 20, after: After = None) -> objects.FineTuningEvents:
        job_id = ids.job_of(fine_tuning_job_id)

        def page(store: JobStore, whose: str | None) -> objects.FineTuningEvents:
            job = jobs.training_job(store, whose, job_id)
            return events.page(job, serving.of(job, store, impl.config), limit, after)

        return await impl.seen(page)

    @router.get(
        "/jobs/{fine_tuning_job_id}/checkpoints", summary="Get the checkpoints of a fine-tuning job, newest first."
    )
    async def checkpoints(
        fine_tuning_job_id: JobId, limit: Limit = 10, after: After = None
    ) -> objects.FineTuningCheckpoints:
        job_id = ids.job_of(fine_tuning_job_id)
        return await impl.seen(
            lambda store, whose: jobs.checkpoints(jobs.training_job(store, whose, job_id), limit, after)
        )


def _add_files(router: APIRouter, impl: PostTrainingService) -> None:
    @router.get("/files/{file_id}", summary="Get the description of a result file.")
    async def described(file_id: FileId) -> objects.ResultFile:
        job_id = ids.job_of_file(file_id)
        return await impl.seen(lambda store, whose: results.described(jobs.training_job(store, whose, job_id)))

    @router.get(
        "/files/{file_id}/content",
        summary="Get a result file: the figures of each step of a job, as CSV.",
        response_class=Response,
        responses={HTTPStatus.OK: {"content": {"text/csv": {}}}},
    )
    async def content(file_id: FileId) -> Response:
        job_id = ids.job_of_file(file_id)
        found = await impl.seen(lambda store, whose: results.content(jobs.training_job(store, whose, job_id)))
        return Response(found, media_type=CSV)


async def _retrieved(impl: PostTrainingService, job_id: str) -> objects.FineTuningJob:
    def found(store: JobStore, whose: str | None) -> tuple[objects.FineTuningJob, str | None, str]:
        job = jobs.training_job(store, whose, job_id)
        served = serving.of(job, store, impl.config)
        return jobs.described(job, served), None if served is None else served.model, job.owner

    described, model, owner = await impl.seen(found)
    if model is not None:
        await impl.offers.registered(model, owner)
    return described


def _wanted(request: Request) -> jobs.Wanted:
    """The metadata that a list is filtered by: `metadata[KEY]=VALUE`, or `metadata=null`."""
    pairs = {}
    for name, value in request.query_params.items():
        if name == "metadata" and value in ("null", ""):
            return {}
        if found := _METADATA_KEY.fullmatch(name):
            pairs[found[1]] = value
    return pairs or None

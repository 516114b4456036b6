"""The routes for pipelines.

POST   pipelines                    jobs, of which later ones take what earlier ones leave
POST   pipelines/validate           its checks alone
GET    pipelines, pipelines/{id}    with its parts
POST   pipelines/{id}/cancel, resume
DELETE pipelines/{id}               with all its jobs
"""

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Body, Query, Request
from pydantic import WrapValidator

from llama_stack_provider_moe.control.server import pipeline_views, wire_pipelines
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.spec.pipelines import PipelineSpec

MAX_PIPELINES = 1000
if TYPE_CHECKING:
    PipelineBody = object
else:  # a thread validates it; the document has the real type
    PipelineBody = Annotated[PipelineSpec, WrapValidator(lambda body, _: body), Body()]


def add_pipelines(router: APIRouter, impl: PostTrainingService) -> None:
    """Add the routes for pipelines to the router of `impl`."""

    @router.post("/pipelines", summary="Run jobs of which later ones take what earlier ones leave.")
    async def create(body: PipelineBody, request: Request) -> wire_pipelines.SubmittedPipeline:
        return await impl.pipelines.create(body, len(await request.body()))

    @router.post("/pipelines/validate", summary="Check a pipeline like a submission, without creating it.")
    async def validate(body: PipelineBody, request: Request) -> wire_pipelines.ValidatedPipeline:
        return await impl.pipelines.validate(body, len(await request.body()))

    @router.get("/pipelines", summary="Get all pipelines, newest first.")
    async def pipelines(
        limit: Annotated[int, Query(ge=1, le=MAX_PIPELINES)] = MAX_PIPELINES,
        after: Annotated[str | None, Query(description="The last pipeline of the previous page.")] = None,
    ) -> wire_pipelines.ListPipelinesResponse:
        return await impl.seen(lambda store, whose: pipeline_views.page(store, whose, limit, after))

    @router.get("/pipelines/{pipeline_uuid}", summary="Get a pipeline and its parts, with their progress.")
    async def pipeline(pipeline_uuid: str) -> wire_pipelines.Pipeline:
        return await impl.seen(lambda store, whose: pipeline_views.detail(store.pipelines.get(pipeline_uuid, whose)))

    @router.post("/pipelines/{pipeline_uuid}/cancel", summary="Cancel all jobs of a pipeline that wait or run.")
    async def cancel(pipeline_uuid: str) -> wire_pipelines.PipelineLine:
        return pipeline_views.line((await impl.pipelines.cancel(pipeline_uuid)).found)

    @router.post(
        "/pipelines/{pipeline_uuid}/resume",
        summary="Resume the jobs of a pipeline that failed or were cancelled; completed ones don't run again.",
    )
    async def resume(pipeline_uuid: str) -> wire_pipelines.ResumedPipeline:
        return await impl.pipelines.resume(pipeline_uuid)

    @router.delete("/pipelines/{pipeline_uuid}", summary="Delete a pipeline that has ended, its jobs and folders.")
    async def delete(
        pipeline_uuid: str,
        force: Annotated[
            bool, Query(description="Delete its jobs even if other jobs need their files; the answer lists those.")
        ] = False,
    ) -> wire_pipelines.DeletedPipeline:
        return await impl.pipelines.delete(pipeline_uuid, force)

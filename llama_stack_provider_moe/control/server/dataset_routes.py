"""The routes for data sets that owners upload, so that a job needs no data set of the host.

    PUT    datasets/{name}     the rows: JSON Lines or CSV, gzipped or not; any size up to the server's limits
    GET    datasets            the caller's data sets
    GET    datasets/{name}     one, with its versions
    GET    datasets/{name}/profile    what a job would make of it
    GET    datasets/{name}/rows       its rows, in pages
    DELETE datasets/{name}     one, or one version of it
    GET, POST, DELETE feedback        conversations that shields flagged: their number; a data set of them; delete them

Each caller sees only their own; a name that another owner uses is free.
"""

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Body, Header, Path, Query, Request
from pydantic import WrapValidator

from llama_stack_provider_moe.control.server import callers, uploads, wire_datasets
from llama_stack_provider_moe.control.server.answers import streaming_answers_of
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.spec.training_jobs import TrainingRecipe
from llama_stack_provider_moe.spec.validation_errors import validated

if TYPE_CHECKING:
    FeedbackBody = object
else:  # a thread validates it; the document has the real type
    FeedbackBody = Annotated[wire_datasets.FeedbackBody, WrapValidator(lambda body, _: body), Body()]
MAX_DATASETS = 1000
MAX_ROWS = 200
Name = Annotated[str, Path(description="Name of the data set.")]
_TEXT: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_BODY = {
    "requestBody": {
        "required": True,
        "description": "Without a media type: JSON Lines. With `Content-Encoding: gzip`, any of them gzipped.",
        "content": dict.fromkeys(("application/jsonl", "application/x-ndjson", "text/csv", "application/gzip"), _TEXT),
    }
}


def add_datasets(router: APIRouter, impl: PostTrainingService) -> None:
    """Add the routes for data sets to the router of `impl`."""

    @router.get("/datasets", summary="Get the caller's uploaded data sets, by name.")
    async def datasets(
        limit: Annotated[int, Query(ge=1, le=MAX_DATASETS)] = MAX_DATASETS,
        after: Annotated[str | None, Query(description="The last data set of the previous page.")] = None,
    ) -> wire_datasets.ListDatasetsResponse:
        return await impl.datasets.list(callers.owner(), limit, after)

    _add_upload(router, impl)
    _add_feedback(router, impl)

    @router.get("/datasets/{name}", summary="Get an uploaded data set and its versions, the current one first.")
    async def dataset(
        name: Name,
        limit: Annotated[int, Query(ge=1, le=MAX_DATASETS, description="Largest number of versions.")] = 100,
    ) -> wire_datasets.Dataset:
        return await impl.datasets.get(callers.owner(), name, limit)

    @router.get(
        "/datasets/{name}/profile",
        summary="Get what a job would make of a data set: formats, lengths, refused rows, learnt tokens, steps.",
    )
    async def profile(
        name: Name,
        model: Annotated[
            str | None, Query(description="Model as in a job; left out: no token is counted.", max_length=1024)
        ] = None,
        recipe: Annotated[TrainingRecipe, Query(description="Recipe of the job.")] = "sft",
        max_length: Annotated[int | None, Query(description="`options.max_length` of the job.")] = None,
        max_completion_length: Annotated[
            int | None,
            Query(
                description="`rl.max_completion_length` of a job of recipe grpo, or `generation.max_completion_length` "
                "of one of recipe distill."
            ),
        ] = None,
        version: Annotated[str | None, Query(description="Beginning of the SHA-256 of a version.")] = None,
    ) -> wire_datasets.DatasetProfile:
        return await impl.dataset_profile(name, version, model, recipe, max_length, max_completion_length)

    @router.get("/datasets/{name}/rows", summary="Get a page of the rows of a data set.")
    async def rows(
        name: Name,
        version: Annotated[str | None, Query(description="Beginning of the SHA-256 of a version.")] = None,
        cursor: Annotated[
            int, Query(ge=0, lt=2**63, description="Byte to continue from: `cursor` of the previous page.")
        ] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_ROWS, description="Largest number of rows.")] = 20,
    ) -> wire_datasets.DatasetRows:
        return await impl.datasets.rows(callers.owner(), name, version, cursor, limit)

    @router.delete("/datasets/{name}", summary="Delete an uploaded data set, or one version; jobs keep their rows.")
    async def delete(
        name: Name,
        version: Annotated[
            str | None, Query(description="Beginning of the SHA-256 of the version to delete; left out: all versions.")
        ] = None,
    ) -> wire_datasets.DeletedDataset:
        return await impl.datasets.delete(callers.owner(), name, version)


def _add_upload(router: APIRouter, impl: PostTrainingService) -> None:
    async def put(
        name: Name,
        request: Request,
        sha256: Annotated[str | None, Query(description="SHA-256 that the body must have, as it is sent.")] = None,
        content_type: Annotated[str | None, Header(description="Left out: JSON Lines.")] = None,
        content_encoding: Annotated[str | None, Header(description="`gzip`, or left out.")] = None,
    ) -> wire_datasets.PushedDataset:
        form = uploads.form_of(content_type, content_encoding)
        return await impl.datasets.put(callers.owner(), name, form, request.stream(), sha256)

    router.add_api_route(
        "/datasets/{name}", put, methods=["PUT"], summary="Upload rows as the current version of a data set.",
        openapi_extra=_BODY,
        # The other routes hold a body in memory, and limit it to `max_body_bytes`.
        route_class_override=streaming_answers_of(impl),
    )  # fmt: skip


def _add_feedback(router: APIRouter, impl: PostTrainingService) -> None:
    @router.get("/feedback", summary="Get the number of the caller's conversations that shields flagged.")
    async def feedback() -> wire_datasets.KeptFeedback:
        return await impl.datasets.flagged.kept(callers.owner())

    @router.post("/feedback", summary="Make conversations that shields flagged the current version of a data set.")
    async def make(body: FeedbackBody, request: Request) -> wire_datasets.PushedDataset:
        size_bytes = len(await request.body())
        asked = await impl.guard.bodies.run(size_bytes, validated, wire_datasets.FeedbackBody, body)
        return await impl.datasets.put_flagged(callers.owner(), impl.whose("read"), asked)

    @router.delete("/feedback", summary="Delete the caller's conversations that shields flagged; data sets stay.")
    async def erase() -> wire_datasets.ErasedFeedback:
        return await impl.datasets.erase_flagged(callers.owner())

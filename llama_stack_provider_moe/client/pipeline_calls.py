"""Requests about pipelines; see `calls`."""

from collections.abc import Mapping
from urllib.parse import quote

from llama_stack_provider_moe.client.calls import Call
from llama_stack_provider_moe.client.pipeline_documents import (
    CreatedPipeline,
    DeletedPipeline,
    Pipeline,
    PipelineLine,
    PipelineList,
    ResumedPipeline,
    ValidatedPipeline,
)
from llama_stack_provider_moe.errors import InvalidInput


def create(body: Mapping[str, object]) -> Call[CreatedPipeline]:
    """Create a pipeline."""
    return Call(CreatedPipeline, "POST", "/pipelines", body=body)


def validate(body: Mapping[str, object]) -> Call[ValidatedPipeline]:
    """Check a pipeline."""
    return Call(ValidatedPipeline, "POST", "/pipelines/validate", body=body)


def page(limit: int, after: str | None) -> Call[PipelineList]:
    """List pipelines, newest first."""
    return Call(PipelineList, "GET", "/pipelines", {"limit": limit, "after": after})


def get(pipeline_id: str) -> Call[Pipeline]:
    """Ask for a pipeline and its parts."""
    return Call(Pipeline, "GET", path_of(pipeline_id))


def cancel(pipeline_id: str) -> Call[PipelineLine]:
    """Cancel a pipeline."""
    return Call(PipelineLine, "POST", path_of(pipeline_id, "/cancel"))


def resume(pipeline_id: str) -> Call[ResumedPipeline]:
    """Resume a pipeline."""
    return Call(ResumedPipeline, "POST", path_of(pipeline_id, "/resume"))


def delete(pipeline_id: str, force: bool) -> Call[DeletedPipeline]:
    """Delete a pipeline and its jobs."""
    return Call(DeletedPipeline, "DELETE", path_of(pipeline_id), {"force": "true" if force else None})


def path_of(pipeline_id: str, view: str = "") -> str:
    """Return the path of a pipeline's route."""
    if not pipeline_id or "/" in pipeline_id or pipeline_id.startswith("."):  # would lead to another route
        raise InvalidInput("PIPELINE", pipeline_id, "a pipeline's name; `moe-train pipelines` lists them")
    return f"/pipelines/{quote(pipeline_id, safe='')}{view}"

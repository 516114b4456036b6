"""Documents of the server's API about pipelines; see `documents`."""

from typing import NotRequired, TypedDict

from llama_stack_provider_moe.client.documents import Figure, Validated


class CreatedPipeline(TypedDict):
    """A pipeline that was created, and the job of each part."""

    pipeline_uuid: str
    jobs: dict[str, str]
    notes: list[str]


class ValidatedPipeline(TypedDict):
    """The jobs that a pipeline would have, by part."""

    parts: dict[str, Validated]


class PipelineLine(TypedDict):
    """A pipeline in a list."""

    pipeline_uuid: str
    status: str
    created_at: str
    cancel_requested_at: str | None
    jobs: dict[str, int]


class PipelineList(TypedDict):
    """Pipelines, newest first."""

    data: list[PipelineLine]
    has_more: bool


class PartExport(TypedDict):
    """An export that a part's job made."""

    job_uuid: str
    status: str
    reason: str | None


class Part(TypedDict):
    """A part of a pipeline."""

    name: str
    job_uuid: str
    recipe: str
    model: str
    status: str
    waits_for: list[str]
    stage: str
    step: int | None
    max_steps: int | None
    eta_s: NotRequired[Figure | None]
    attempts: int
    started_at: str | None
    completed_at: str | None
    reason: str | None
    exports: list[PartExport]


class Pipeline(PipelineLine):
    """A pipeline and its parts, in their order."""

    parts: list[Part]
    lost: list[str]  # parts whose jobs were deleted before they had completed


class ResumedPart(TypedDict):
    """A job of a pipeline that was scheduled again."""

    job_uuid: str
    resumes: str


class ResumedPipeline(TypedDict):
    """A pipeline that was resumed, and the jobs that run again."""

    pipeline_uuid: str
    jobs: list[ResumedPart]


class DeletedPipeline(TypedDict):
    """A deleted pipeline, and what remains of its jobs."""

    pipeline_uuid: str
    jobs: list[str]
    kept: list[str]
    broken: list[str]

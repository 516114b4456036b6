"""Answers about pipelines; what a pipeline is asked to do is `spec.pipelines`."""

from datetime import datetime

from pydantic import BaseModel, Field

from llama_stack_provider_moe.control.server.submissions import Resumes, Validated
from llama_stack_provider_moe.control.server.wire import Figure
from llama_stack_provider_moe.jobdir.state import JobState

_NOTES = "How the server resolved the names in the jobs, what they wait for, and what it could not check."


class SubmittedPipeline(BaseModel):
    """An accepted pipeline."""

    pipeline_uuid: str
    jobs: dict[str, str] = Field(description="Name of each part's job, by the part.")
    notes: list[str] = Field(description=_NOTES)


class ValidatedPipeline(BaseModel):
    """The jobs that a pipeline would have."""

    parts: dict[str, Validated] = Field(description="Each part's job, by the part.")


class PipelineLine(BaseModel):
    """A pipeline in a list of pipelines."""

    pipeline_uuid: str
    status: JobState = Field(description="State that follows from its jobs: `completed` if all of them completed.")
    owner: str = Field(description="The owner as the store names them: a hash, or `anonymous`.")
    created_at: datetime
    cancel_requested_at: datetime | None
    jobs: dict[JobState, int] = Field(description="Number of its jobs in each state: parts, and their exports.")


class ListPipelinesResponse(BaseModel):
    """The caller's pipelines, newest first."""

    data: list[PipelineLine]
    has_more: bool


class PartExport(BaseModel):
    """An export that a part's job made when it completed."""

    job_uuid: str
    status: JobState
    reason: str | None


class Part(BaseModel):
    """A part of a pipeline."""

    name: str
    job_uuid: str
    recipe: str
    model: str
    status: JobState = Field(description="State of the part: of its job, then of its export if it has one.")
    waits_for: list[str] = Field(description="Jobs that must complete before it starts, and have not yet.")
    stage: str = Field(description="What it does now.")
    step: int | None = Field(description="Optimiser steps taken; null without training.")
    max_steps: int | None
    eta_s: Figure | str | None = Field(description="Estimated seconds until its training ends; null if unknown.")
    attempts: int = Field(description="How often its job was started.")
    started_at: datetime | None
    completed_at: datetime | None
    reason: str | None = Field(description="Reason for its failure, cancellation or new attempt.")
    exports: list[PartExport]


class Pipeline(PipelineLine):
    """A pipeline and its parts, in their order."""

    parts: list[Part]
    lost: list[str] = Field(
        description="Parts whose jobs were deleted before they had completed: the pipeline can't be resumed."
    )


class ResumedPart(BaseModel):
    """A job of a pipeline that was scheduled again."""

    job_uuid: str
    resumes: Resumes = Field(description="Where it resumes.")


class ResumedPipeline(BaseModel):
    """A pipeline that was resumed."""

    pipeline_uuid: str
    jobs: list[ResumedPart] = Field(description="Jobs that failed or were cancelled, and are scheduled again.")


class DeletedPipeline(BaseModel):
    """A deleted pipeline."""

    pipeline_uuid: str
    jobs: list[str] = Field(description="Jobs that were deleted with it.")
    kept: list[str] = Field(description="Folders that were not deleted: checkpoints in a `checkpoint_dir`.")
    broken: list[str] = Field(description="With `force`: jobs that needed their files, and what they can't do now.")

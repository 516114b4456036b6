"""Answers to requests that create, resume or check a job."""

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, Field

from llama_stack_provider_moe.control.server.wire import JsonObject, PostTrainingJob
from llama_stack_provider_moe.jobdir.row_sources import DataSource
from llama_stack_provider_moe.spec import JobSpec, TrainingSpec

Resumes = Literal["from_checkpoint", "from_completed_steps", "from_beginning"]
_NOTES = "How the server resolved the names in the job, and what it could not check."


class SubmittedJob(PostTrainingJob):
    """An accepted job; all fields but the name are extensions of this provider."""

    notes: list[str] = Field(default_factory=list, description=_NOTES)


class Validated(BaseModel):
    """The job that a submission would create."""

    spec: JsonObject = Field(description="The complete job, with defaults filled in and names resolved.")
    model: str = Field(description="The job's model as lists of jobs show it.")
    train_rows: int = Field(description="Number of training rows; 0 for a job without training.")
    validation_rows: int | None = Field(
        description="Number of held-out rows; null where the job splits them off the training rows, or trains nothing."
    )
    rows: dict[str, int] = Field(
        description="Number of rows in each data set, by the name of its file in the job's folder."
    )
    sources: dict[str, DataSource] = Field(
        description="The data set that each part of the rows came from, and its version."
    )
    notes: list[str] = Field(default_factory=list, description=_NOTES)

    @classmethod
    def of(
        cls, spec: JobSpec, model: str, counted: dict[str, int], sources: Mapping[str, DataSource], notes: list[str]
    ) -> "Validated":
        """Return the answer about a job.

        Args:
            spec: the complete job.
            model: its model, as lists show it.
            counted: number of rows by part.
            sources: where the rows came from, by part.
            notes: remarks for the caller.
        """
        held_out, train_rows = None, 0
        if isinstance(spec, TrainingSpec):
            parts = spec.data.parts("validation")
            split = spec.options.validation_split > 0 and not spec.data.has_validation_sets
            held_out = None if split else sum(counted.get(part, 0) for part in parts)
            train_rows = sum(counted[part] for part in spec.data.parts("train"))
        return cls(
            spec=spec.model_dump(mode="json"), model=model, train_rows=train_rows, validation_rows=held_out,
            rows=counted, sources=dict(sources), notes=notes,
        )  # fmt: skip


class ResumedJob(PostTrainingJob):
    """A job that was scheduled again."""

    resumes: Resumes = Field(
        description="Extension: where the job resumes; `from_completed_steps` applies to exports only."
    )

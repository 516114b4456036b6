"""Answers of the post-training API; its requests are in `wire_requests`.

The models have the fields of llama-stack-api 0.6.1, the last release with this API (a test compares them), and serve
every host.
"""

import math
from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, Field, PlainSerializer

from llama_stack_provider_moe.control.store.outbox import Delivery
from llama_stack_provider_moe.jobdir.export_steps import ExportStep
from llama_stack_provider_moe.jobdir.folder import Metrics
from llama_stack_provider_moe.jobdir.row_sources import DataSource
from llama_stack_provider_moe.jobdir.state import JobState

_PARENT = "For an export: the job that it exports."
_LABELS = "Labels, a text by key."
_NOTE = "Its owner's own words about it."
_SWEEP = "The sweep that it belongs to."
_PIPELINE = "The pipeline that it belongs to."
_WAITS_FOR = "Jobs that must complete before this one starts, and have not yet; of a scheduled job."
JsonObject = dict[str, object]


def _json_number(value: float) -> float | str:
    """`value` for JSON, which has no NaN and infinity: they become text, so that a diverged loss stays visible."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


Figure = Annotated[float, PlainSerializer(_json_number, return_type=float | Literal["NaN", "Infinity", "-Infinity"])]


class ErrorMessage(BaseModel):
    """The text of an error."""

    message: str = Field(description="Text for a person: the field, its value, and the expected value.")


class Error(BaseModel):
    """The answer to every request that was refused or failed."""

    error: ErrorMessage


class PostTrainingJob(BaseModel):
    """A job, by name."""

    job_uuid: str


class JobLine(PostTrainingJob):
    """A job in a list of jobs; all fields but the name are extensions of this provider."""

    status: JobState
    recipe: str
    parent: str | None = Field(description=_PARENT)
    model: str
    scheduled_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    owner: str = Field(description="The owner as the store names them: a hash, or `anonymous`.")
    labels: dict[str, str] = Field(description=_LABELS)
    note: str | None = Field(description=_NOTE)
    sweep: str | None = Field(description=_SWEEP)
    pipeline: str | None = Field(description=_PIPELINE)
    waits_for: list[str] = Field(description=_WAITS_FOR)
    unreadable: str | None = Field(
        default=None,
        description="Parts of the job's row that this server can't read, because another version wrote them or they "
        "are damaged; null if all of it is readable.",
    )


class JobLabels(PostTrainingJob):
    """The labels and the note of a job after a change."""

    labels: dict[str, str] = Field(description=_LABELS)
    note: str | None = Field(description=_NOTE)


class ListPostTrainingJobsResponse(BaseModel):
    """The caller's jobs, newest first."""

    data: list[JobLine]
    has_more: bool


class Checkpoint(BaseModel):
    """A checkpoint or a final artifact of a job; the fields from `kind` on are extensions of this provider."""

    identifier: str
    created_at: datetime
    epoch: int
    post_training_job_id: str
    path: str
    training_metrics: Metrics | None = None
    kind: str
    step: int
    bytes: int
    name: str = Field(description="Name of the artifact, at the end of the URL of its files.")
    sha256: str | None = Field(
        description="Checksum of the GGUF file; for an artifact with many files, of its checksums.json."
    )
    verification: JsonObject | None = Field(
        description="Comparisons that it passed before it was listed, with figures."
    )


class ExportJob(PostTrainingJob):
    """An export of a job, and its steps."""

    status: JobState
    reason: str | None = Field(description="Reason for its failure or cancellation.")
    scheduled_at: datetime
    completed_at: datetime | None
    steps: list[ExportStep] = Field(description="Steps of the export; empty until it has begun.")
    served_as: str | None = Field(
        default=None, description="Id of the model in the server's inference, once it has answered there."
    )


class ListExportsResponse(BaseModel):
    """A job's exports, newest first."""

    data: list[ExportJob]


class PostTrainingJobStatusResponse(BaseModel):
    """The status of a job; `resources_allocated` has its progress."""

    job_uuid: str
    status: JobState
    scheduled_at: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = Field(default=None, description="Time at which it ended, in whatever state.")
    resources_allocated: JsonObject | None = None
    checkpoints: list[Checkpoint] = Field(default_factory=list)


class PostTrainingJobArtifactsResponse(BaseModel):
    """The artifacts of a job so far."""

    job_uuid: str
    checkpoints: list[Checkpoint] = Field(default_factory=list)
    report: str = Field(
        description="Path below the API's prefix of the job's report: one HTML file, made when it is asked for."
    )


class ArtifactFile(BaseModel):
    """One file of an artifact."""

    path: str = Field(description="Path in the artifact, with `/`; the end of the file's URL.")
    bytes: int
    sha256: str = Field(description="Checksum of the file as the job wrote it.")


class ArtifactFiles(BaseModel):
    """The files of an artifact."""

    identifier: str
    kind: str
    bytes: int
    files: list[ArtifactFile]


class PostTrainingJobLogStream(BaseModel):
    """Lines of a job's output; `next_offset` is the `offset` of the next request."""

    job_uuid: str
    log_lines: list[str]
    next_offset: int = Field(description="Number of bytes of the output up to here.")


class Events(BaseModel):
    """A page of a job's events, as its training processes wrote them; oldest first."""

    job_uuid: str
    events: list[JsonObject] = Field(
        description="Events, each with `type` and `time`; those of a resumed job include all attempts."
    )
    cursor: int = Field(description="Parameter `cursor` of the next page; unchanged if there is nothing new.")
    unreadable: int = Field(description="Number of lines that are not events, such as one that a full disk cut short.")


class EvaluationPoint(BaseModel):
    """Figures on the held-out rows after a step; step 0 is before training."""

    step: int
    epoch: Figure
    metrics: dict[str, Figure]


class MetricSeries(BaseModel):
    """The metrics of a job's steps, as columns of equal length, without steps that a resumption has undone."""

    job_uuid: str
    steps: list[int] = Field(description="Optimiser steps, in ascending order.")
    epoch: list[Figure]
    metrics: dict[str, list[Figure | None]] = Field(
        description="Values of each metric by its name; null for a step without that metric."
    )
    evaluations: list[EvaluationPoint]
    cursor: int = Field(description="`cursor` with which `events` continues after these figures.")


class Notification(BaseModel):
    """A message about the end of a job, see `notify` of the job."""

    id: str = Field(description="Header `webhook-id` of the message.")
    event: str
    url: str
    state: Delivery
    attempts: int = Field(description="How often it was sent.")
    next_attempt_at: datetime | None = Field(description="When it is sent next; null unless it waits.")
    told: str | None = Field(description="What went wrong at the last attempt.")


class JobDetail(PostTrainingJobStatusResponse):
    """All details of a job."""

    recipe: str
    model: str
    parent: str | None = Field(description=_PARENT)
    owner: str = Field(description="The owner as the store names them: a hash, or `anonymous`.")
    labels: dict[str, str] = Field(description=_LABELS)
    note: str | None = Field(description=_NOTE)
    sweep: str | None = Field(description=_SWEEP)
    pipeline: str | None = Field(description=_PIPELINE)
    waits_for: list[str] = Field(description=_WAITS_FOR)
    notifications: list[Notification] = Field(description="Messages about its ends, oldest first.")
    cancel_requested_at: datetime | None
    attempts: int
    reason: str | None = Field(
        description="Reason for its failure, cancellation or new attempt; while the job runs again, `last start: ` and "
        "the reason why that start ended."
    )
    folder: str
    spec: JsonObject | None = Field(
        description="The complete job with defaults filled in; for a damaged file, `unreadable` with the problem."
    )
    rows: JsonObject | None = Field(
        description="Formats of the rows of each of the job's data sets, and columns read and not read, with counts; "
        "null if an earlier version of this package created the job."
    )
    resolved: JsonObject | None = Field(description="Settings that depend on the model, once it is loaded.")
    summary: dict[str, float] | None = Field(description="Final figures of a completed job.")
    sources: dict[str, DataSource] | None = Field(
        description="The data set that each part of the job's rows was copied from, and its version; null if an "
        "earlier version of this package created the job."
    )


class DeletedJob(PostTrainingJob):
    """A deleted job."""

    kept: list[str] = Field(description="Folders that were not deleted: checkpoints in a `checkpoint_dir`.")
    exports: list[str] = Field(description="Exports of the job that were deleted with it.")
    broken: list[str] = Field(description="With `force`: jobs that needed its files, and what they can no longer do.")
    withdrawn: str | None = Field(default=None, description="Id of the model that the server's inference had of it.")


class Health(BaseModel):
    """Whether the server can accept and run jobs."""

    status: Literal["ok", "degraded", "error"] = Field(
        description="State of the server. `degraded`: the disk of the state folder is full, so the server shows, "
        "cancels and deletes jobs, but accepts and starts none until there is room."
    )
    store: Literal["ok", "unreachable", "replaced"]
    supervisor: Literal["alive", "none"]
    jobs: dict[JobState, int]
    reason: str | None = Field(default=None, description="The problem, and how to fix it.")

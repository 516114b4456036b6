"""Answers about sweeps; what a sweep is asked to do is `spec.sweeps`."""

from datetime import datetime

from pydantic import BaseModel, Field

from llama_stack_provider_moe.control.server.wire import Figure, JsonObject
from llama_stack_provider_moe.jobdir.state import JobState


class SubmittedSweep(BaseModel):
    """An accepted sweep."""

    sweep_uuid: str
    jobs: list[str] = Field(description="Names of its jobs, in the order of their combinations.")
    notes: list[str] = Field(description="How the server resolved the names in the jobs, and what it could not check.")


class SweepLine(BaseModel):
    """A sweep in a list of sweeps."""

    sweep_uuid: str
    status: JobState = Field(description="State that follows from its jobs: `completed` if any job completed.")
    owner: str = Field(description="The owner as the store names them: a hash, or `anonymous`.")
    created_at: datetime
    cancel_requested_at: datetime | None
    max_parallel: int = Field(description="Maximum number of its jobs that run at once.")
    metric: str = Field(description="Figure on the held-out rows that ranks its jobs.")
    direction: str = Field(description="Whether a smaller or a larger figure is better.")
    jobs: dict[JobState, int] = Field(description="Number of its jobs in each state.")


class ListSweepsResponse(BaseModel):
    """The caller's sweeps, newest first."""

    data: list[SweepLine]
    has_more: bool


class SweepJob(BaseModel):
    """A job of a sweep, and its place among the others."""

    rank: int | None = Field(description="1 for the best; null for a job without a figure.")
    job_uuid: str
    status: JobState
    chosen: JsonObject = Field(description="Values of the swept settings.")
    figure: Figure | None = Field(
        description="The metric that ranks it: of its last evaluation, or of that for which the sweep ended it."
    )
    step: int | None = Field(description="Step of that evaluation.")
    evaluations: int = Field(description="Number of its evaluations after a step.")
    ended_early: bool = Field(description="Whether the sweep ended it, because other jobs did better.")
    reason: str | None = Field(description="Reason for its failure or cancellation.")


class Sweep(SweepLine):
    """A sweep and its jobs, the best first."""

    parameters: JsonObject = Field(description="Values that were to be tried, by setting.")
    random: int | None = Field(description="Number of combinations that were drawn at random; null: all.")
    seed: int
    halving: JsonObject | None = Field(description="Early ending of jobs that do worse; null: none.")
    best: str | None = Field(description="The completed job that ranks first; null until there is one.")
    data: list[SweepJob]


class DeletedSweep(BaseModel):
    """A deleted sweep."""

    sweep_uuid: str
    jobs: list[str] = Field(description="Jobs that were deleted with it.")
    kept: list[str] = Field(description="Folders that were not deleted: checkpoints in a `checkpoint_dir`.")
    broken: list[str] = Field(description="With `force`: jobs that needed their files, and what they can't do now.")

"""Answers for pages that show many jobs: how they stand, the server's templates, the schema of a job."""

from pydantic import BaseModel, Field

from llama_stack_provider_moe.control.server.wire import Figure, JsonObject
from llama_stack_provider_moe.jobdir.state import JobState


class Overview(BaseModel):
    """What the caller may see of this server."""

    jobs: dict[JobState, int] = Field(description="Number of the caller's jobs in each state.")
    recipes: list[str] = Field(description="Recipes of jobs.")
    reads_every_owner: bool = Field(description="Whether the lists have the jobs of other owners too.")
    version: str = Field(description="Version of this package on the server.")


class JobFigures(BaseModel):
    """How far a job is, in a few figures; each is null until there is one."""

    job_uuid: str
    status: JobState
    stage: str | None = Field(description="As in the job's status.")
    step: int | None
    max_steps: int | None
    percent: float | None
    eta_s: Figure | str | None = Field(description="Estimated seconds left.")
    loss: Figure | str | None = Field(description="Training loss of the last step.")
    held_out_loss: Figure | str | None = Field(description="Loss on held-out rows, of the last evaluation.")
    queue_position: int | None = Field(description="Position of a job that waits; 1 is the next one.")
    devices: str | None = Field(description="GPUs of a job in progress, as CUDA_VISIBLE_DEVICES.")
    reason: str | None = Field(description="Why it failed, was cancelled or waits.")


class ListJobFigures(BaseModel):
    """Figures of the jobs that were asked for; names that the caller has no job of are left out."""

    data: list[JobFigures]


class JobTemplate(BaseModel):
    """A job file of this package."""

    name: str
    summary: str = Field(description="Recipe, model, and what differs from a plain job.")
    job: JsonObject = Field(description="The body of the job.")


class ListJobTemplates(BaseModel):
    """The job files of this package, by name."""

    data: list[JobTemplate]


class RoutingSeries(BaseModel):
    """How the routers of a job used their experts over its steps; without steps that a resumption has undone."""

    job_uuid: str
    steps: list[int] = Field(
        description="Optimiser steps, in ascending order; the columns of `cv`, `dead` and `largest`."
    )
    layers: list[int] = Field(description="Numbers of the layers with experts; the rows of `cv` and `dead`.")
    experts: int = Field(description="Number of experts of a layer; 0 on a dense model.")
    cv: list[list[Figure]] = Field(
        description="Coefficient of variation of the experts' shares, by layer and step; 0 is perfect balance."
    )
    dead: list[list[int]] = Field(description="Number of experts that got no token, by layer and step.")
    largest: list[list[Figure]] = Field(description="Share of the most used expert, by layer and step.")
    layer: int | None = Field(description="The layer that `share` is of; null without layers.")
    share_steps: list[int] = Field(
        description="Steps with a table of all experts, in ascending order; the columns of `share`. See "
        "`moe.routing_every_n_steps`."
    )
    share: list[list[Figure]] = Field(
        description="Share of the layer's tokens, by expert and step, over the steps since the table before."
    )


class RoutingShares(BaseModel):
    """The mean share of every expert over a job's last steps; lists are empty for a job without routing tables."""

    job_uuid: str
    steps: list[int] = Field(
        description="Steps of the tables whose mean it is, in ascending order: the newest that cover 16 steps together."
    )
    covered: int = Field(description="Number of optimiser steps that these tables cover; 0 without any.")
    layers: list[int] = Field(description="Numbers of the layers with experts; the rows of `share`.")
    share: list[list[Figure]] = Field(description="Share of the layer's tokens, by layer and expert.")

"""The fields that all jobs that load a model have in common."""

from pydantic import Field

from llama_stack_provider_moe.spec.blocks import JOB_ID_PATTERN, Resources
from llama_stack_provider_moe.spec.labels import Labelled


class AnyJob(Labelled):
    """The fields that all jobs that load a model have in common."""

    job_uuid: str | None = Field(
        default=None, pattern=JOB_ID_PATTERN, description="Name of the job; left out: the server chooses one."
    )
    model: str = Field(
        min_length=1,
        max_length=1024,
        description="Model to load: the result of one of your jobs (`JOB`, `JOB/merged`, `JOB/epoch-2`), a hub id, or "
        "a folder under an allowed root.",
    )
    model_from: str | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        description="Name of the job result that `model` named; the server fills it in and replaces `model` by a path "
        "or hub id.",
    )
    resources: Resources = Field(default_factory=Resources)

"""The fields that every job has, and those that every job has that analyses a model without training it."""

from pydantic import Field

from llama_stack_provider_moe.spec.blocks import JOB_ID_PATTERN, OneProcess, Resources
from llama_stack_provider_moe.spec.labels import Labelled
from llama_stack_provider_moe.spec.routing import AnalysisData, AnalysisOptions, AnalysisTraining


class AnyJob(Labelled):
    """What every job names: itself, its model, and its part of the machine."""

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


class AnalysisJob(AnyJob):
    """A job that runs named sets of rows through a model and trains nothing."""

    data: AnalysisData = Field(description="Rows to compare: a block, its fields follow.")
    training: AnalysisTraining = Field(default_factory=AnalysisTraining)
    options: AnalysisOptions = Field(default_factory=AnalysisOptions)
    resources: OneProcess = Field(default_factory=OneProcess)
    adapter_folder: str | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        description="Adapter to load onto the model: the result of one of your jobs (`JOB`, `JOB/adapter`, "
        "`JOB/epoch-2`), or a folder as for `model`; left out: none.",
    )

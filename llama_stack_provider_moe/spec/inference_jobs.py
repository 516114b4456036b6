"""The jobs that load a model and train nothing."""

from typing import Literal

from pydantic import Field

from llama_stack_provider_moe.spec.any_job import AnyJob
from llama_stack_provider_moe.spec.blocks import OneProcess
from llama_stack_provider_moe.spec.playground import Playground, PlaygroundOptions, PlaygroundTraining
from llama_stack_provider_moe.spec.routing import Analysis, AnalysisData, AnalysisOptions, AnalysisTraining
from llama_stack_provider_moe.spec.row_sources import RowSource


class InferenceJob(AnyJob):
    """The fields that jobs without training have in common: a model, with an adapter or without."""

    resources: OneProcess = Field(default_factory=OneProcess)
    adapter_folder: str | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        description="Adapter to load onto the model: the result of one of your jobs (`JOB`, `JOB/adapter`, "
        "`JOB/epoch-2`), or a folder as for `model`; left out: none.",
    )


class AnalysisJob(InferenceJob):
    """A job that runs named sets of rows through a model and trains nothing."""

    data: AnalysisData = Field(description="Rows to compare: a block, its fields follow.")
    training: AnalysisTraining = Field(default_factory=AnalysisTraining)
    options: AnalysisOptions = Field(default_factory=AnalysisOptions)


class RoutingAnalysisSpec(AnalysisJob):
    """Measures which experts serve which prompts; trains nothing."""

    recipe: Literal["routing_analysis"] = Field(
        description="Routing analysis: compare how often each expert is chosen on two or more data sets."
    )
    analysis: Analysis = Field(default_factory=Analysis)

    def row_sources(self) -> list[RowSource]:
        """The sets to compare."""
        answered = self.analysis.tokens == "response"
        few = "at least 2 rows, because the intervals come from the differences between rows"
        return [
            RowSource(f"data.sets.{name}", dataset_id, self.data.format, f"set-{name}", 2, few, answered)
            for name, dataset_id in self.data.sets.items()
        ]


class PlaygroundSpec(InferenceJob):
    """Keeps a model in memory and answers prompts; trains nothing."""

    recipe: Literal["playground"] = Field(
        description="Playground: keep a model in memory, and answer prompts with its adapter on and off."
    )
    playground: Playground = Field(default_factory=Playground)
    training: PlaygroundTraining = Field(default_factory=PlaygroundTraining)
    options: PlaygroundOptions = Field(default_factory=PlaygroundOptions)

    def row_sources(self) -> list[RowSource]:
        """An empty list: prompts come while the job runs."""
        return []

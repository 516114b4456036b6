"""The two jobs of directional ablation: one measures a direction, the other edits a model's weights."""

from typing import Literal, Self

from pydantic import Field, model_validator

from llama_stack_provider_moe.spec.ablation import (
    OFF_FOR_LORA,
    AblationOutput,
    AblationPlan,
    ContrastData,
    Measure,
    MeasureTraining,
)
from llama_stack_provider_moe.spec.blocks import Block, DType, OneProcess
from llama_stack_provider_moe.spec.evaluated_job import EvaluatedJob
from llama_stack_provider_moe.spec.inference_jobs import AnalysisJob
from llama_stack_provider_moe.spec.routing import AnalysisOptions, WholeRowOptions
from llama_stack_provider_moe.spec.row_sources import RowSource

LEAST_ROWS = 4
FEW_ROWS = "at least 4 rows, because each half of a set tests the direction of the other"


class AblationMeasureSpec(AnalysisJob):
    """Measures the mean hidden states of two sets of prompts at every layer; trains nothing."""

    recipe: Literal["ablation_measure"] = Field(
        description="Directional ablation, step 1: mean hidden states of two sets of prompts at every layer."
    )
    data: ContrastData = Field(description="Prompts to compare: a block, its fields follow.")
    measure: Measure = Field(default_factory=Measure)
    training: MeasureTraining = Field(default_factory=MeasureTraining)
    options: WholeRowOptions = Field(default_factory=WholeRowOptions)

    def row_sources(self) -> list[RowSource]:
        """The two sets."""
        return [
            RowSource(f"data.sets.{name}", dataset_id, self.data.format, f"set-{name}", LEAST_ROWS, FEW_ROWS, False)
            for name, dataset_id in self.data.sets.items()
        ]


class EvaluatedModels(Block):
    """How the models are loaded that `eval` measures; nothing is trained."""

    dtype: DType = Field(default="bf16", description="Data type of their parameters, whatever that of their files.")


class AblationSpec(EvaluatedJob, AblationPlan):
    """Takes measured directions out of a model's weights; trains nothing."""

    recipe: Literal["ablation"] = Field(
        description="Directional ablation, step 3: take measured directions out of a model's weights."
    )
    measurements: str = Field(
        min_length=1,
        max_length=1024,
        description="Measurements of the same model: one of your jobs of recipe `ablation_measure`; on the command "
        "line also a file.",
    )
    output: AblationOutput = Field(
        default="model",
        description="Result to write. model: the edited model; lora: the edit as an adapter of rank 1 on the model, "
        "which can be switched off.",
    )
    training: EvaluatedModels = Field(default_factory=EvaluatedModels)
    options: AnalysisOptions = Field(default_factory=AnalysisOptions)
    resources: OneProcess = Field(default_factory=OneProcess)

    @model_validator(mode="after")
    def _is_of_low_rank(self) -> Self:
        if self.output == "lora" and self.norm_preserving != "off":
            raise ValueError(f"norm_preserving: {self.norm_preserving!r} is not valid; expected {OFF_FOR_LORA}")
        return self

    def without_gpu(self) -> "AblationSpec":
        """The same job, without a GPU unless it asks for one, or measures: else it loads no model."""
        if self.resources.gpus is not None or self.eval is not None:
            return self
        return self.model_copy(update={"resources": self.resources.model_copy(update={"gpus": 0})})

    def row_sources(self) -> list[RowSource]:
        """The data sets of `eval`; the measurements have been made."""
        return self.evaluation_sources()

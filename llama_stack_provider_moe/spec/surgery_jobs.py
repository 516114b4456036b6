"""The job of expert surgery: a model with other experts, made from one of yours."""

from typing import Literal, Self

from pydantic import Field, model_validator

from llama_stack_provider_moe.spec.any_job import AnyJob
from llama_stack_provider_moe.spec.blocks import OneProcess
from llama_stack_provider_moe.spec.row_sources import RowSource
from llama_stack_provider_moe.spec.surgery import CalibrationData, Surgery, SurgeryOptions, SurgeryTraining

ROWS = "calibration"


class SurgerySpec(AnyJob):
    """Writes a model with fewer or more experts; trains nothing."""

    recipe: Literal["surgery"] = Field(
        description="Expert surgery: remove experts, by what they do on your rows or by a list; or split each of them."
    )
    surgery: Surgery = Field(description="What to do: a block, its fields follow.")
    data: CalibrationData | None = Field(
        default=None,
        description="Rows that decide which experts stay, and on which the loss is measured before and after: a block, "
        "its fields follow. Left out: `surgery.drop` decides, and nothing is measured.",
    )
    training: SurgeryTraining = Field(default_factory=SurgeryTraining)
    options: SurgeryOptions = Field(default_factory=SurgeryOptions)
    resources: OneProcess = Field(default_factory=OneProcess)

    @model_validator(mode="after")
    def _a_score_needs_rows(self) -> Self:
        if self.surgery.action == "split":
            if self.data is not None:
                raise ValueError("data: has no effect with surgery.action 'split', which keeps what the model "
                                 "computes; expected none")  # fmt: skip
        elif self.surgery.keep is not None and self.data is None:
            raise ValueError("data: is missing; expected rows, because surgery.keep chooses by what experts do on "
                             "them; or surgery.drop")  # fmt: skip
        return self

    def without_gpu(self) -> Self:
        """The same job, without a GPU unless it asks for one, or has rows: else it loads no model."""
        if self.resources.gpus is not None or self.data is not None:
            return self
        return self.model_copy(update={"resources": self.resources.model_copy(update={"gpus": 0})})

    def row_sources(self) -> list[RowSource]:
        """The rows, if any."""
        if self.data is None:
            return []
        return [RowSource("data.dataset_id", self.data.dataset_id, self.data.format, ROWS, answered=False)]

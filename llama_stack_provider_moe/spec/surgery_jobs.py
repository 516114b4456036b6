"""The job of expert surgery: a model with other experts, made from one of yours."""

from typing import Literal, Self

from pydantic import Field, model_validator

from llama_stack_provider_moe.spec.any_job import AnyJob
from llama_stack_provider_moe.spec.blocks import OneProcess
from llama_stack_provider_moe.spec.row_sources import RowSource
from llama_stack_provider_moe.spec.surgery import CalibrationData, Surgery, SurgeryOptions, SurgeryTraining

ROWS = "calibration"
GENERAL_ROWS = "general"


class SurgerySpec(AnyJob):
    """Writes a model with fewer or more experts; trains nothing."""

    recipe: Literal["surgery"] = Field(
        description="Expert surgery: remove experts, by what they do on your rows or by a list; merge those that are "
        "alike; add new ones; or split each of them."
    )
    surgery: Surgery = Field(description="What to do: a block, its fields follow.")
    data: CalibrationData | None = Field(
        default=None,
        description="Rows that decide which experts stay or merge, or that new ones are for, and on which the loss is "
        "measured before and after: a block, its fields follow. Left out: nothing is measured.",
    )
    training: SurgeryTraining = Field(default_factory=SurgeryTraining)
    options: SurgeryOptions = Field(default_factory=SurgeryOptions)
    resources: OneProcess = Field(default_factory=OneProcess)

    @model_validator(mode="after")
    def _rows_have_a_use(self) -> Self:
        asked = self.surgery
        if asked.action == "split" and self.data is not None:
            raise ValueError("data: has no effect with surgery.action 'split', which keeps what the model computes; "
                             "expected none")  # fmt: skip
        if self.data is None and asked.why_rows is not None:
            raise ValueError(f"data: is missing; expected rows, because {asked.why_rows}")
        general = None if self.data is None else self.data.general_dataset_id
        if general is not None and asked.action != "add":
            raise ValueError(f"data.general_dataset_id: {general!r} has no effect with surgery.action "
                             f"{asked.action!r}; expected none")  # fmt: skip
        if general is None and asked.action == "add" and asked.added.router == "domain":
            raise ValueError("data.general_dataset_id: is missing; expected rows of what the model already does, "
                             "because surgery.add.router 'domain' takes their mean away")  # fmt: skip
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
        rows = self.data
        found = [RowSource("data.dataset_id", rows.dataset_id, rows.format, ROWS, answered=False)]
        if rows.general_dataset_id is not None:
            found.append(RowSource("data.general_dataset_id", rows.general_dataset_id, rows.format, GENERAL_ROWS,
                                   answered=False))  # fmt: skip
        return found

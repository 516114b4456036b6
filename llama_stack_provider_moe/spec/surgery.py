"""The blocks of expert surgery: which experts of a model go, and the rows that decide it."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.spec.blocks import NUMBERS_PATTERN, Block, RowFormat, numbers, spans

Criterion = Literal["reap", "usage"]
REPORT_FILE = "surgery.json"
ALL_LAYERS = "all"
MOST_LAYERS = 1024
_DROP_LENGTH = 4096  # characters: one entry for a layer of hundreds of experts
Experts = Annotated[str, Field(min_length=1, max_length=_DROP_LENGTH)]


class Surgery(Block):
    """What to do with a model's experts: every layer gets the same number, as a config states one number for all."""

    action: Literal["prune", "split"] = Field(
        description="What to do. prune: remove experts; split: replace each expert by several equal ones, which LoRA "
        "can train apart, and send a token to as many times more, so that the model computes the same."
    )
    keep: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="With action prune, number of experts to keep in each layer, those with the highest score by `by`; "
        "needs rows. Give this or `drop`.",
    )
    by: Criterion | None = Field(
        default=None,
        description="With `keep`, score of an expert. reap (default): mean of router weight times the norm of the "
        "expert's output, over the tokens that chose it (arXiv 2510.13999); usage: number of tokens that chose it.",
    )
    drop: dict[str, Experts] = Field(
        default_factory=dict,
        max_length=MOST_LAYERS,
        description='With action prune, experts to remove, by layer, or in `all` layers: `{"all": "0-3,7"}`. Give this '
        "or `keep`.",
    )

    factor: int | None = Field(
        default=None, ge=2, le=16, description="With action split, number of new experts for each old one; default 2."
    )

    @field_validator("drop")
    @classmethod
    def _names_experts(cls, drop: dict[str, str]) -> dict[str, str]:
        if ALL_LAYERS in drop and len(drop) > 1:
            raise ValueError(f"{ALL_LAYERS!r} is not valid beside layers; expected it alone, or numbers of layers")
        for layer, experts in drop.items():
            if layer != ALL_LAYERS and (not layer.isdecimal() or len(layer) > 4):
                raise ValueError(f"{layer[:128]!r} is not the number of a layer; expected one, or {ALL_LAYERS!r}")
            if not re.fullmatch(NUMBERS_PATTERN, experts):
                raise ValueError(f"{experts[:128]!r} does not name experts; expected numbers and ranges such as 0-3,7")
            for _ in spans(experts):  # checks each range
                pass
        return drop

    @model_validator(mode="after")
    def _no_setting_is_without_effect(self) -> Self:
        given = [name for name in ("keep", "by", "drop", "factor") if getattr(self, name)]
        for name in given:
            if (name == "factor") != (self.action == "split"):
                raise ValueError(f"{name}: {getattr(self, name)!r} has no effect with action {self.action!r}; expected "
                                 "none")  # fmt: skip
        if self.action == "split":
            return self
        if (self.keep is None) == (not self.drop):
            raise ValueError(f"keep: {self.keep} is not valid {'with' if self.drop else 'without'} `drop`; expected "
                             "one of the two")  # fmt: skip
        if self.by is not None and self.keep is None:
            raise ValueError(f"by: {self.by!r} has no effect with `drop`; expected it with `keep`")
        return self

    @property
    def criterion(self) -> Criterion | None:
        """The score that chooses; None where a list does."""
        return None if self.keep is None else self.by or "reap"

    def dropped(self) -> dict[str, list[int]]:
        """Layer, or `all` -> the experts to remove, in ascending order."""
        return {layer: sorted(set(numbers(experts))) for layer, experts in self.drop.items()}


class CalibrationData(Block):
    """Rows that show what experts are for."""

    dataset_id: str = Field(
        min_length=1,
        max_length=512,
        description="Data set with the rows; every token of them counts. Its texts decide which experts stay, so they "
        "should be like those that the model is for, refusals included.",
    )
    format: RowFormat = Field(
        default="auto", description="Format of the rows, as in other jobs. Rows without an answer are valid too."
    )


class SurgeryTraining(Block):
    """Settings of the forward passes over the rows; nothing is trained."""

    batch_size: int = Field(default=8, ge=1, le=4096, description="Number of rows in one pass.")
    dtype: Literal["bf16", "fp16", "fp32"] = Field(
        default="bf16", description="Data type of the model's parameters in those passes; the files keep theirs."
    )


class SurgeryOptions(Block):
    """The options of a job that surgery uses."""

    max_length: int = Field(
        default=1024, ge=8, le=1 << 20, description="Maximum number of tokens of a row; the first ones are used."
    )
    chat_template: Literal["chatml", "plain"] | None = Field(
        default=None, description="Chat template to use; default: the model's own."
    )

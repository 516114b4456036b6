"""Graders that ask a model at a URL, which the operator names: `score_model` and `label_model`."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.spec.blocks import Block
from llama_stack_provider_moe.spec.grader_base import UNIT, AnyKind, Place, Range
from llama_stack_provider_moe.spec.grader_templates import Template


class JudgeMessage(Block):
    """A message to a model that judges."""

    role: Literal["user", "assistant", "system", "developer"] = Field(description="Who speaks.")
    content: Template = Field(description="Text; a template.")
    type: Literal["message"] = Field(default="message", description="Always message.")


class SamplingParams(Block):
    """How a judge writes its answer."""

    max_completions_tokens: int | None = Field(
        default=None, ge=1, le=100_000, description="Most tokens of its answer; left out: the judge's own limit."
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="Effort of a reasoning model; left out: its own."
    )
    seed: int | None = Field(default=None, ge=0, le=2**31 - 1, description="Seed; left out: none.")
    temperature: float | None = Field(default=None, ge=0, le=2, description="Temperature; left out: the judge's own.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Nucleus; left out: the judge's own.")


class _Judged(AnyKind):
    place: ClassVar[Place] = "url"

    model: str = Field(
        min_length=1, max_length=256, description="Judge: a name in `graders.judges` of the server's configuration."
    )
    input: list[JudgeMessage] = Field(min_length=1, max_length=64, description="Messages to the judge.")


class ScoreModel(_Judged):
    """A number that a model gives."""

    type: Literal["score_model"] = Field(description="Number that a model at a URL gives.")
    range: tuple[float, float] = Field(
        default=UNIT, description="Least and largest number; a number outside them is an error."
    )
    sampling_params: SamplingParams = Field(default_factory=SamplingParams)

    def limits(self) -> Range:
        """Return the least and the largest value that it gives."""
        return self.range

    @field_validator("range")
    @classmethod
    def _rises(cls, given: tuple[float, float]) -> tuple[float, float]:
        if not given[0] < given[1]:
            raise ValueError(f"{list(given)} is not valid; expected two numbers, the second larger than the first")
        return given


class LabelModel(_Judged):
    """Whether the label that a model gives is one of those that pass; 1 or 0."""

    type: Literal["label_model"] = Field(description="Whether a model at a URL gives a label that passes.")
    labels: list[Annotated[str, Field(min_length=1, max_length=128)]] = Field(
        min_length=2, max_length=64, description="Labels that the judge may give."
    )
    passing_labels: list[str] = Field(min_length=1, max_length=64, description="Labels that give 1; some of `labels`.")

    @model_validator(mode="after")
    def _passing_are_labels(self) -> Self:
        strange = [label for label in self.passing_labels if label not in self.labels]
        if strange:
            raise ValueError(f"passing_labels: {strange[0]!r} is not valid; expected some of {', '.join(self.labels)}")
        if len({each.casefold() for each in self.labels}) < len(self.labels):
            raise ValueError("labels: one is named twice; expected different labels, whatever the case")
        return self

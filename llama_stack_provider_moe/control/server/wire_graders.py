"""Requests that try a grader, and their answers: OpenAI's `fine_tuning/alpha/graders`, with a few fields more."""

from typing import Any

from pydantic import BaseModel, Field

from llama_stack_provider_moe.spec.blocks import BUILT_AT_ONCE, Block
from llama_stack_provider_moe.spec.graders import Grader


class ValidateGraderRequest(Block):
    """A grader to check."""

    model_config = BUILT_AT_ONCE

    grader: Grader = Field(description="Grader, an object with `type` and `name`.")


class RunGraderRequest(ValidateGraderRequest):
    """A grader, and an answer to try it on."""

    model_config = BUILT_AT_ONCE

    model_sample: str = Field(max_length=1 << 20, description="Answer to grade; templates call it `sample`.")
    item: dict[str, Any] = Field(default_factory=dict, description="Row that it answers; templates call it `item`.")
    output_tokens: int | None = Field(
        default=None, ge=0, description="Number of the answer's tokens, for graders that count them."
    )


class ValidatedGrader(BaseModel):
    """A grader that is valid."""

    grader: dict[str, Any] = Field(description="The grader with its defaults.")
    range: tuple[float | None, float | None] = Field(description="Least and largest value; null: no bound.")
    runs: str = Field(
        description="Where it runs. here: in the server; child: in a process with limits of time and memory; url: at a "
        "judge; torch: in a process that loads a model."
    )


class GraderErrors(BaseModel):
    """What went wrong, by OpenAI's names; the details are for a person."""

    formula_parse_error: bool = False
    invalid_variable_error: bool = False
    model_grader_parse_error: bool = False
    model_grader_refusal_error: bool = False
    model_grader_server_error: bool = False
    model_grader_server_error_details: str | None = None
    other_error: bool = False
    other_error_details: str | None = None
    python_grader_runtime_error: bool = False
    python_grader_runtime_error_details: str | None = None
    python_grader_server_error: bool = False
    python_grader_server_error_type: str | None = None
    sample_parse_error: bool = Field(default=False, description="The answer lacks what the grader reads, such as JSON.")
    truncated_observation_error: bool = False
    unresponsive_reward_error: bool = Field(default=False, description="It took too long or too much, and was stopped.")


class GraderRunMetadata(BaseModel):
    """About a run of a grader."""

    name: str = Field(description="Name of the grader.")
    type: str = Field(description="Type of the grader.")
    errors: GraderErrors = Field(description="What went wrong.")
    execution_time: float = Field(description="Seconds.")
    scores: dict[str, float | None] = Field(description="Value of each grader in a `multi`.")
    token_usage: int | None = Field(default=None, description="Tokens that judges used.")
    sampled_model_name: str | None = Field(default=None, description="Judge that was asked.")


class GraderRun(BaseModel):
    """What a grader makes of an answer."""

    reward: float | None = Field(description="Its value; null: it failed, and `metadata.errors` says why.")
    sub_rewards: dict[str, float | None] = Field(description="Value of each grader in a `multi`.")
    metadata: GraderRunMetadata = Field(description="About the run.")
    model_grader_token_usage_per_model: dict[str, int] = Field(description="Judge -> tokens.")

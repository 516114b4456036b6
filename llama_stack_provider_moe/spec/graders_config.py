"""What a server lets graders use: models that judge, and how much a try of graders may take."""

from typing import Annotated

from pydantic import Field, TypeAdapter, field_validator

from llama_stack_provider_moe.spec.blocks import Block
from llama_stack_provider_moe.spec.notify import VARIABLE_PATTERN, plain_url

JUDGE_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}$"
# Passes the judges to a training process, as JSON; which URLs it may ask is not for the job's owner to decide.
JUDGES_VARIABLE = "MOE_JUDGES"


class JudgeConfig(Block):
    """A model behind a URL, for graders score_model and label_model."""

    url: str = Field(
        max_length=2048,
        description="URL that answers chat completions in OpenAI's form, such as "
        "http://127.0.0.1:8000/v1/chat/completions.",
    )
    model: str = Field(min_length=1, max_length=256, description="Name of the model there.")
    key_variable: str | None = Field(
        default=None,
        pattern=VARIABLE_PATTERN,
        description="Environment variable of the server with the key, which is sent as a bearer token; jobs get the "
        "variable too. Left out: no key.",
    )

    @field_validator("url", mode="after")
    @classmethod
    def _plain(cls, url: str) -> str:
        return plain_url(url)


JUDGES: TypeAdapter[dict[str, JudgeConfig]] = TypeAdapter(dict[str, JudgeConfig])


class GradersConfig(Block):
    """Models that graders may ask, and what a request that tries graders may take."""

    judges: dict[Annotated[str, Field(pattern=JUDGE_NAME_PATTERN)], JudgeConfig] = Field(
        default_factory=dict,
        max_length=64,
        description="Models at URLs by the name that graders have for them; {}: graders score_model and label_model "
        "are refused.",
    )
    deadline_s: float = Field(
        default=20.0, ge=0.1, le=600, description="Seconds for a request that tries a grader without torch."
    )
    model_deadline_s: float = Field(
        default=300.0, ge=1, le=3600, description="Seconds for a request that tries a grader that loads a model."
    )
    memory_mb: int = Field(
        default=1024, ge=256, le=65_536, description="Memory of each process without torch that grades, in MB."
    )
    processes: int = Field(default=2, ge=1, le=32, description="Processes without torch that grade at the same time.")
    waiting: int = Field(default=32, ge=1, le=10_000, description="Requests that may wait; further ones get a 503.")

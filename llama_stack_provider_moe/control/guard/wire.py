"""Bodies and answers of the routes on OGX; the same fields as Llama Stack's safety API and OpenAI's moderations."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Metadata(_Body):
    """What a caller says about a request."""

    session_id: str | None = Field(
        default=None, min_length=1, max_length=256, description="Name of the session, as in the header X-Moe-Session."
    )


class RunShieldBody(_Body):
    """A shield and the messages that it checks."""

    shield_id: str = Field(min_length=1, max_length=128, description="Id of the shield.")
    messages: list[dict[str, Any]] = Field(description="Messages in the form of OpenAI's chat completions.")
    metadata: Metadata | None = Field(default=None, description="About the request.")


class ModerationBody(_Body):
    """Texts to classify."""

    input: str | list[str] = Field(description="A text, or several.")
    model: str | None = Field(default=None, description="Id of a shield; left out: the default shield.")
    metadata: Metadata | None = Field(default=None, description="About the request.")


class SafetyViolation(BaseModel):
    """What a shield objects to."""

    violation_level: Literal["info", "warn", "error"] = Field(description="How bad; a caller stops at `error`.")
    user_message: str | None = Field(default=None, description="Message for the user.")
    metadata: dict[str, Any] = Field(default_factory=dict, description="Which rule, scores, thresholds.")


class RunShieldAnswer(BaseModel):
    """The verdict of a shield."""

    violation: SafetyViolation | None = Field(default=None, description="None: the shield has no objection.")


class ModerationResult(BaseModel):
    """The verdict about one text."""

    flagged: bool = Field(description="Whether the level is `error`.")
    categories: dict[str, bool] = Field(description="Category -> whether it is flagged.")
    category_scores: dict[str, float] = Field(description="Category -> score from 0 to 1.")
    category_applied_input_types: dict[str, list[str]] = Field(description="Category -> `text`.")
    user_message: str | None = Field(default=None, description="Message for the user.")
    metadata: dict[str, Any] = Field(default_factory=dict, description="Level, which rule, scores, thresholds.")


class Moderation(BaseModel):
    """The verdicts about all texts."""

    id: str = Field(description="Id of this answer.")
    model: str = Field(description="Id of the shield.")
    results: list[ModerationResult] = Field(description="One for each text, in their order.")


class Shield(BaseModel):
    """A shield of the configuration."""

    identifier: str = Field(description="Id of the shield.")
    type: Literal["shield"] = Field(default="shield", description="Always `shield`.")
    provider_id: str = Field(default="moe-guard", description="Always `moe-guard`.")
    provider_resource_id: str = Field(description="The id again.")
    params: dict[str, Any] = Field(description="Its parameters, defaults included.")


class ShieldList(BaseModel):
    """All shields."""

    data: list[Shield] = Field(description="By id.")


class GuardHealth(BaseModel):
    """Whether shields can answer."""

    status: Literal["ok", "degraded"] = Field(description="degraded: probes have no scorer now.")
    on_failure: Literal["block", "allow"] = Field(description="What is answered without a score.")
    scorer: Literal["none", "starting", "ready", "down"] = Field(description="State of the process that scores.")
    detail: str | None = Field(default=None, description="Why it is so.")
    probes: list[str] = Field(description="Probes that can be scored with now.")
    sessions: int = Field(description="Sessions that this process keeps.")

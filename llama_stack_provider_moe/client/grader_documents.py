"""Documents of the server's API about graders; see `documents`."""

from typing import TypedDict


class ValidatedGrader(TypedDict):
    """A grader that is valid, with its defaults; a bound that is null is none."""

    grader: dict[str, object]
    range: tuple[float | None, float | None]
    runs: str


class GraderRunMetadata(TypedDict):
    """About a run of a grader; `errors` has OpenAI's flags, and details."""

    name: str
    type: str
    errors: dict[str, bool | str | None]
    execution_time: float
    scores: dict[str, float | None]
    token_usage: int | None
    sampled_model_name: str | None


class GraderRun(TypedDict):
    """What a grader makes of an answer; a reward that is null failed."""

    reward: float | None
    sub_rewards: dict[str, float | None]
    metadata: GraderRunMetadata
    model_grader_token_usage_per_model: dict[str, int]

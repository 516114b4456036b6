"""The answer of a shield."""

from typing import Literal, NamedTuple

Level = Literal["info", "warn", "error"]
LEVELS: tuple[Level, ...] = ("info", "warn", "error")  # the worst last


class Violation(NamedTuple):
    """What a shield objects to.

    Attributes:
        level: how bad; a caller stops at `error`.
        user_message: for the person who speaks with the model.
        metadata: for the program that asked: which rule, scores, thresholds. JSON, without texts of the conversation.
    """

    level: Level
    user_message: str
    metadata: dict[str, object]


class Verdict(NamedTuple):
    """The answer of one shield about one conversation.

    Attributes:
        violation: None: the shield has no objection.
        score: from 0 to 1, which a trajectory adds up: a probe's probability; of ToolGuard 1 for a violation.
        scores: for the caller even without a violation: category -> score.
        failed: why there is no verdict by the shield itself, so that `on_failure` decided; None: there is one.
    """

    violation: Violation | None
    score: float
    scores: dict[str, float]
    failed: str | None = None


def worst(levels: list[Level]) -> Level:
    """Return the worst of one or more levels."""
    return max(levels, key=LEVELS.index)

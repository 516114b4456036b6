"""An answer and the row that it answers, what a grader makes of it, and the ways in which a grader fails."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, NoReturn, Protocol

from llama_stack_provider_moe.graders.calls import Call, calls_in

MAX_ANSWER = 1 << 20  # characters
FailureCode = Literal[
    "unknown_name", "formula", "too_large", "deadline", "memory", "ended", "raised", "not_finite", "out_of_range",
    "no_tokens", "bad_reference", "judge_answer", "judge_refused", "judge_server", "busy", "no_class",
]  # fmt: skip
# Failures that another try may not have.
TRANSIENT: frozenset[FailureCode] = frozenset(("deadline", "memory", "ended", "judge_answer", "judge_server"))


class Failure(NamedTuple):
    """Why a row has no value of a grader.

    Attributes:
        code: a word that programs read.
        message: for a person.
    """

    code: FailureCode
    message: str


class GradeFailed(Exception):
    """A grader has no value for an answer."""

    def __init__(self, code: FailureCode, message: str) -> None:
        self.failure = Failure(code, message)
        super().__init__(message)


class BadAnswer(Exception):
    """A grader reads something of an answer that the answer lacks, such as JSON: it gets the grader's least value."""


class Outcome(NamedTuple):
    """What a grader makes of one answer.

    Attributes:
        value: its value; None: it failed.
        failure: why it failed.
        bad_answer: whether the answer lacks what the grader reads, so that `value` is the least one.
        parts: of a `multi`, the values of its graders.
        tokens: that a judge used.
    """

    value: float | None
    failure: Failure | None = None
    bad_answer: bool = False
    parts: Mapping[str, float | None] = {}
    tokens: int = 0

    @staticmethod
    def failed(code: FailureCode, message: str) -> "Outcome":
        """The outcome of a failure."""
        return Outcome(None, Failure(code, message))


@dataclass(frozen=True)
class Sample:
    """An answer of a model.

    Attributes:
        item: the row that it answers: all its columns, and `gold` where there is a right answer.
        output_text: the answer.
        tokens: number of its tokens; None: not known.
        truncated: whether it was cut at its largest length.
        tool_calls: in OpenAI's form, where the caller has them apart from the text.
    """

    item: Mapping[str, object]
    output_text: str
    tokens: int | None = None
    truncated: bool = False
    tool_calls: Sequence[object] | None = None

    @cached_property
    def output_json(self) -> object:
        """The answer as JSON.

        Raises:
            BadAnswer: it is not JSON.
        """
        return as_json(self.output_text)

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        """The tool calls of the answer."""
        return calls_in(self.output_text, self.tool_calls)


class Grades(Protocol):
    """A grader that is ready."""

    def grade(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Return one outcome for each answer."""

    def close(self) -> None:
        """End what the grader started."""


def as_json(text: str) -> object:
    """Return the value of a JSON text; each key once, no NaN.

    Raises:
        BadAnswer: it is not JSON.
    """
    try:
        found: object = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise BadAnswer("the text is not JSON") from None
    return found


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")

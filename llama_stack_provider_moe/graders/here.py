"""Graders of linear time, which run in the process that asks."""

from collections.abc import Callable, Mapping, Sequence

from llama_stack_provider_moe.graders.calls import MAX_CALLS, Call, call_of, calls_in
from llama_stack_provider_moe.graders.refusals import kind_of, prompt_of
from llama_stack_provider_moe.graders.samples import (
    MAX_ANSWER,
    BadAnswer,
    GradeFailed,
    Outcome,
    Sample,
)
from llama_stack_provider_moe.graders.templates import Text
from llama_stack_provider_moe.spec.graders import Length, PlainGrader, Refusal, Repetition, StringCheck, ToolCall

type Score = Callable[[Sample], float]


class Here:
    """A grader that scores one answer after the other.

    Args:
        score: of an answer.
        least: its least value, for answers that lack what it reads.
    """

    def __init__(self, score: Score, least: float = 0.0) -> None:
        self._score, self._least = score, least

    def grade(self, samples: Sequence[Sample]) -> list[Outcome]:
        """See `Grades`."""
        return [graded(self._score, each, self._least) for each in samples]

    def close(self) -> None:
        """See `Grades`."""


def graded(score: Score, sample: Sample, least: float) -> Outcome:
    """Return what a score makes of an answer."""
    if len(sample.output_text) > MAX_ANSWER:
        return Outcome.failed(
            "too_large", f"an answer of {len(sample.output_text):,} characters; expected at most {MAX_ANSWER:,}"
        )
    try:
        return Outcome(float(score(sample)))
    except BadAnswer:
        return Outcome(least, bad_answer=True)
    except GradeFailed as error:
        return Outcome(None, error.failure)


def score_of(grader: PlainGrader) -> Score | None:
    """Return the score of a grader of this module; None for others."""
    match grader:
        case StringCheck():
            return _string_check(grader)
        case Length():
            return _length(grader)
        case Repetition():
            return _repetition(grader)
        case ToolCall():
            return lambda sample: tool_calls(grader, sample)
        case Refusal(judge="keyword"):
            return lambda sample: float(
                kind_of(
                    sample.output_text, prompt_of(sample.item), grader.least_words, grader.longest_refusal
                ) == grader.expect
            )  # fmt: skip
        case _:
            return None


def _string_check(grader: StringCheck) -> Score:
    found, reference = Text(grader.input), Text(grader.reference)

    def score(sample: Sample) -> float:
        one, other = found.of(sample), reference.of(sample)
        match grader.operation:
            case "eq":
                return float(one == other)
            case "ne":
                return float(one != other)
            case "like":
                return float(other in one)
            case "ilike":
                return float(other.casefold() in one.casefold())

    return score


def _length(grader: Length) -> Score:
    text = Text(grader.input)

    def score(sample: Sample) -> float:
        if grader.unit == "tokens":
            if sample.tokens is None:
                raise GradeFailed("no_tokens", "the number of the answer's tokens is not known here; count words")
            length = sample.tokens
        else:
            found = text.of(sample)
            length = len(found) if grader.unit == "characters" else len(found.split())
        beside = max(grader.least - length, 0 if grader.most is None else length - grader.most, 0)
        return max(0.0, 1 - beside / grader.margin) if beside and grader.margin else float(beside == 0)

    return score


def _repetition(grader: Repetition) -> Score:
    text = Text(grader.input)

    def score(sample: Sample) -> float:
        words = text.of(sample).lower().split()
        count = len(words) - grader.ngram + 1
        if count < 1:
            return 1.0 if words else 0.0  # an empty answer repeats nothing, and says nothing
        return len({tuple(words[at : at + grader.ngram]) for at in range(count)}) / count

    return score


def tool_calls(grader: ToolCall, sample: Sample) -> float:
    """Return how many of the calls that a row expects an answer makes.

    Raises:
        GradeFailed: the row has no such calls.
    """
    if grader.expected not in sample.item:
        raise GradeFailed("unknown_name", f"the row has no column {grader.expected!r}, which `expected` names")
    given = sample.item[grader.expected]
    if isinstance(given, str):
        expected = list(calls_in(given))
        if not expected and given.strip() != "[]":
            expected = [Call("", None)]
    else:
        expected = [call_of(each) for each in (given if isinstance(given, list) else [] if given is None else [given])]
    if any(not call.name or call.arguments is None for call in expected) or len(expected) > MAX_CALLS:
        raise GradeFailed("bad_reference", f"{grader.expected} of the row is no list of calls, each "
                          "{name, arguments: an object}")  # fmt: skip
    made = list(sample.calls)
    if not expected or not made:
        return float(not expected and not made)
    left, right = list(made), 0
    for call in expected:
        at = next((number for number, each in enumerate(left) if _is_same(each, call, grader.arguments)), None)
        if at is not None:
            del left[at]
            right += 1
    share = right / max(len(expected), len(made))
    return share if grader.partial else float(share == 1)


def _is_same(made: Call, expected: Call, arguments: str) -> bool:
    if made.name != expected.name or made.arguments is None or expected.arguments is None:
        return False
    if arguments == "any":
        return True
    if arguments == "include":
        return all(name in made.arguments and _equal(made.arguments[name], value)
                   for name, value in expected.arguments.items())  # fmt: skip
    return _equal(made.arguments, expected.arguments)


def _equal(one: object, other: object) -> bool:
    """Whether two JSON values are equal; 1 is 1.0, and not true."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other

"""What graders make of answers, as a document: for `moe-train grade`, and for a server that tries graders."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import TypedDict

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.graders.panel import Graded
from llama_stack_provider_moe.graders.samples import Sample
from llama_stack_provider_moe.spec.graders import inside
from llama_stack_provider_moe.spec.judged_graders import LabelModel, ScoreModel
from llama_stack_provider_moe.spec.rewards import Reward

ANSWER = "output_text"


class GraderReport(TypedDict):
    """What one grader gave. A range without a bound, as JSON has no infinity, is null there."""

    name: str
    type: str
    weight: float
    prompts: str | None
    range: tuple[float | None, float | None]
    graded: int
    mean: float | None
    least: float | None
    largest: float | None
    spread: float | None
    bad_answers: int
    failed: dict[str, int]


class RowReport(TypedDict):
    """What the graders gave one answer."""

    row: int
    total: float | None
    values: dict[str, float | None]
    parts: dict[str, dict[str, float | None]]
    bad_answer: list[str]
    failures: dict[str, dict[str, str]]
    tokens: int | None  # that judges used; None: no judge was asked


class GradeReport(TypedDict):
    """What graders gave the answers of a file."""

    rows: int
    mean_total: float | None
    graders: list[GraderReport]
    results: list[RowReport]


def sample_of(row: Mapping[str, object], number: int, answer: str | None = None) -> Sample:
    """Return the answer in a row of a file.

    Args:
        row: its columns.
        number: of the row, from 1.
        answer: column with the answer; None: `output_text`, or else the last turn of `messages`.

    Raises:
        InvalidInput: the row has no answer.
    """
    tokens = row.get("output_tokens")
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0):
        raise InvalidInput(f"row {number}: output_tokens", tokens, "the number of the answer's tokens")
    calls = row.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise InvalidInput(f"row {number}: tool_calls", calls, "a list of tool calls")
    named = ANSWER if answer is None else answer
    if answer is not None and answer not in row:
        columns = ", ".join(map(str, list(row)[:16])) or "none"
        raise InvalidInput("--answer", answer, f"a column of each row; row {number} has {columns}")
    found = row.get(named)
    item = {name: value for name, value in row.items() if name not in (named, "output_tokens", "tool_calls")}
    messages = row.get("messages")
    if found is None and answer is None and isinstance(messages, list) and messages:
        last = messages[-1]
        if isinstance(last, Mapping) and last.get("role") == "assistant":
            found, item["messages"] = last.get("content"), messages[:-1]
    if not isinstance(found, str):
        raise InvalidInput(f"row {number}: {named}", found, "the answer, as text")
    return Sample(item, found, tokens, bool(row.get("truncated", False)), calls)


def report_of(rewards: Sequence[Reward], graded: Sequence[Graded]) -> GradeReport:
    """Return the document."""
    judged = {
        each.grader.name
        for each in rewards
        if any(isinstance(one, ScoreModel | LabelModel) for one in inside(each.grader))
    }
    totals = [each.total for each in graded if each.total is not None]
    return {
        "rows": len(graded),
        "mean_total": math.fsum(totals) / len(totals) if totals else None,
        "graders": [_of_grader(each, graded) for each in rewards],
        "results": [_of_row(number, each, judged) for number, each in enumerate(graded, start=1)],
    }


def _of_grader(reward: Reward, graded: Sequence[Graded]) -> GraderReport:
    name = reward.grader.name
    outcomes = [each.outcomes[name] for each in graded if name in each.outcomes]
    values = [each.value for each in outcomes if each.value is not None]
    mean = math.fsum(values) / len(values) if values else None
    low, high = (bound if math.isfinite(bound) else None for bound in reward.grader.limits())
    return {
        "name": name, "type": reward.grader.type, "weight": reward.weight, "prompts": reward.prompts,
        "range": (low, high), "graded": len(values), "mean": mean, "least": min(values, default=None),
        "largest": max(values, default=None),
        "spread": None if mean is None else math.sqrt(math.fsum((each - mean) ** 2 for each in values) / len(values)),
        "bad_answers": sum(each.bad_answer for each in outcomes),
        "failed": dict(Counter(each.failure.code for each in outcomes if each.failure is not None)),
    }  # fmt: skip


def _of_row(number: int, graded: Graded, judged: Set[str]) -> RowReport:
    outcomes = graded.outcomes
    return {
        "row": number, "total": graded.total, "values": dict(graded.values),
        "parts": {name: dict(each.parts) for name, each in outcomes.items() if each.parts},
        "bad_answer": [name for name, each in outcomes.items() if each.bad_answer],
        "failures": {name: {"code": each.code, "message": each.message} for name, each in graded.failures.items()},
        "tokens": sum(each.tokens for each in outcomes.values()) if judged & outcomes.keys() else None,
    }  # fmt: skip

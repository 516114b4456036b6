"""All rewards of a job: weights, values outside a range, and graders that fail too often."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from llama_stack_provider_moe.errors import GraderFailed, InvalidInput
from llama_stack_provider_moe.graders.panel import Panel, panel_of
from llama_stack_provider_moe.graders.samples import Outcome, Sample
from llama_stack_provider_moe.spec.rewards import REWARDS, Grading, Reward

CHECK = {"type": "string_check", "name": "right", "reference": "{{item.gold}}", "operation": "eq"}
SHORT = {"type": "length", "name": "short", "most": 2}
REGEX = {"type": "regex", "name": "digits", "pattern": r"^\d+$"}


def rewards(*given: dict[str, Any]) -> list[Reward]:
    return REWARDS.validate_python(list(given))


def test_the_sum_is_weighted() -> None:
    made = rewards({"grader": CHECK, "weight": 2}, {"grader": SHORT, "weight": -0.5}, {"grader": REGEX})
    with panel_of(made, Grading(), {}) as panel:
        assert panel.names == ["right", "short", "digits"]
        one, other = panel.grade([Sample({"gold": "7"}, "7"), Sample({"gold": "7"}, "a b c")])
    assert one.values == {"right": 1, "short": 1, "digits": 1}
    assert one.total == 2.5
    assert other.total == 0


def test_a_multi_says_what_its_graders_gave() -> None:
    multi = {"type": "multi", "name": "both", "graders": {"a": CHECK, "b": REGEX}, "calculate_output": "a / b"}
    with panel_of(rewards({"grader": multi}), Grading(), {}) as panel:
        one, other = panel.grade([Sample({"gold": "7"}, "7"), Sample({"gold": "x"}, "x")])
    assert one.total == 1
    assert one.outcomes["both"].parts == {"a": 1, "b": 1}
    assert other.total is None
    assert other.failures["both"].code == "formula"


class Scripted:
    """A grader that gives what it is told."""

    def __init__(self, *values: float | None) -> None:
        self._values = iter(values)

    def grade(self, samples: Sequence[Sample]) -> list[Outcome]:
        return [
            Outcome.failed("raised", "boom") if value is None else Outcome(value)
            for value in (next(self._values) for _ in samples)
        ]

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (math.nan, "not_finite"),
        (math.inf, "not_finite"),
        (1.5, "out_of_range"),
        (-0.1, "out_of_range"),
        (None, "raised"),
    ],
)
def test_a_value_that_is_none_gives_the_row_no_reward(value: float | None, code: str) -> None:
    panel = Panel(rewards({"grader": CHECK}), [Scripted(value)], Grading())
    (found,) = panel.grade([Sample({}, "x")])
    assert found.total is None
    assert found.values == {"right": None}
    assert found.failures["right"].code == code


def test_too_many_failures_are_an_error_that_names_the_grader() -> None:
    panel = Panel(rewards({"grader": CHECK}), [Scripted(*[1.0] * 18, None, None, None)], Grading(max_failed_share=0.1))
    panel.grade([Sample({}, "x")] * 20)
    with pytest.raises(GraderFailed, match=r"grader 'right' gave no value for 3 of the last 21 answers.*raised: boom"):
        panel.grade([Sample({}, "x")])


def test_failures_that_are_long_past_do_not_count() -> None:
    script = Scripted(*[None] * 2, *[1.0] * 30, None)
    panel = Panel(rewards({"grader": CHECK}), [script], Grading(max_failed_share=0.3, failed_window=10))
    for _ in range(33):
        panel.grade([Sample({}, "x")])


def test_a_judge_that_the_operator_does_not_name_is_refused() -> None:
    judged = {"type": "score_model", "name": "j", "model": "gpt", "input": [{"role": "user", "content": "x"}]}
    with (
        pytest.raises(InvalidInput, match=r"a judge that `graders\.judges` of the server's .* names; it has none"),
        panel_of(rewards({"grader": judged}), Grading(), {}),
    ):
        pass


def test_a_grader_that_needs_torch_is_refused_without_it() -> None:
    model = {"type": "reward_model", "name": "r", "model": "x"}
    with (
        pytest.raises(InvalidInput, match="a grader that needs no torch"),
        panel_of(rewards({"grader": model}), Grading(), {}),
    ):
        pass

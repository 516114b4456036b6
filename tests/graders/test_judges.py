"""Models at URLs that judge: what they are asked, which answers count, and what becomes of the others."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from llama_stack_provider_moe.graders.bench import Limits
from llama_stack_provider_moe.graders.judges import Judged, judges_of_environment
from llama_stack_provider_moe.graders.samples import Outcome, Sample
from llama_stack_provider_moe.spec.graders import GRADER
from llama_stack_provider_moe.spec.graders_config import JUDGES, JUDGES_VARIABLE, JudgeConfig

JUDGE = JudgeConfig(url="http://127.0.0.1:9/v1/chat/completions", model="judge-7b", key_variable="JUDGE_KEY")
SCORE = {"type": "score_model", "name": "s", "model": "j", "range": [1, 7], "sampling_params": {"temperature": 0},
         "input": [{"role": "user", "content": "Grade: {{sample.output_text}} for {{item.q}}"}]}  # fmt: skip
LABEL = {"type": "label_model", "name": "l", "model": "j", "labels": ["good", "bad"], "passing_labels": ["good"],
         "input": [{"role": "user", "content": "{{sample.output_text}}"}]}  # fmt: skip


def said(content: str | None, **more: Any) -> httpx.Response:
    message = {"role": "assistant", "content": content, **more}
    return httpx.Response(200, json={"choices": [{"message": message}], "usage": {"total_tokens": 12}})


def outcome(
    grader: dict[str, Any], answer: Callable[[httpx.Request], httpx.Response], text: str = "hello", retries: int = 0
) -> Outcome:
    made = GRADER.validate_python(grader)
    judged = Judged(made, JUDGE, Limits(deadline_s=2, retries=retries), httpx.MockTransport(answer))  # type: ignore[arg-type]
    try:
        (found,) = judged.grade([Sample({"q": "why"}, text)])
    finally:
        judged.close()
    return found


def test_a_judge_is_asked_as_the_operator_and_the_grader_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return said('{"result": 6}')

    assert outcome(SCORE, answer) == Outcome(6.0, tokens=12)
    (request,) = seen
    body = json.loads(request.content)
    assert request.headers["authorization"] == "Bearer secret"
    assert body["model"] == "judge-7b"
    assert body["messages"][-1] == {"role": "user", "content": "Grade: hello for why"}
    assert body["temperature"] == 0
    assert body["response_format"]["json_schema"]["schema"]["properties"] == {"result": {"type": "number"}}


@pytest.mark.parametrize(
    ("grader", "content", "value"),
    [(SCORE, '{"result": 2.5}', 2.5), (SCORE, "3", 3.0), (LABEL, '{"result": "good"}', 1.0), (LABEL, '"bad"', 0.0)],
)
def test_answers_that_count(grader: dict[str, Any], content: str, value: float) -> None:
    assert outcome(grader, lambda _: said(content)).value == value


@pytest.mark.parametrize(
    ("grader", "answer", "code"),
    [
        (SCORE, said("I give it a 7: the text says {\"result\": 7}"), "judge_answer"),
        (SCORE, said('{"result": true}'), "judge_answer"),
        (SCORE, said('{"score": 7}'), "judge_answer"),
        (SCORE, said(None), "judge_answer"),
        (SCORE, said(None, refusal="I won't."), "judge_refused"),
        (LABEL, said('{"result": "Good"}'), "judge_answer"),
        (LABEL, said('{"result": ["good"]}'), "judge_answer"),
        (SCORE, httpx.Response(500, text="oh"), "judge_server"),
        (SCORE, httpx.Response(302, headers={"location": "http://169.254.169.254/"}), "judge_server"),
        (SCORE, httpx.Response(200, text="<html>"), "judge_answer"),
        (SCORE, httpx.Response(200, text="[" * 100_000), "judge_answer"),
        (SCORE, httpx.Response(200, content=b" " * (2 << 20)), "judge_answer"),
    ],
)  # fmt: skip
def test_answers_that_do_not_count_are_named(grader: dict[str, Any], answer: httpx.Response, code: str) -> None:
    found = outcome(grader, lambda _: answer)
    assert found.value is None
    assert found.failure is not None
    assert found.failure.code == code


def test_a_judge_that_is_down_is_asked_again() -> None:
    answers = iter([httpx.Response(503), said('{"result": 5}')])
    assert outcome(SCORE, lambda _: next(answers), retries=1).value == 5


def test_a_time_out_is_named() -> None:
    def late(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("late", request=request)

    found = outcome(SCORE, late)
    assert found.failure is not None
    assert found.failure.code == "deadline"


def test_judges_reach_a_training_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judges_of_environment() == {}
    monkeypatch.setenv(JUDGES_VARIABLE, JUDGES.dump_json({"j": JUDGE}).decode())
    assert judges_of_environment() == {"j": JUDGE}

"""Graders of linear time: values by hand, rows that lack what they read, and answers that are hostile."""

import json
import time
from typing import Any

import pytest

from llama_stack_provider_moe.graders.here import Here, score_of
from llama_stack_provider_moe.graders.samples import Outcome, Sample
from llama_stack_provider_moe.spec.graders import GRADER

CALL = {"name": "read", "arguments": {"path": "/a", "n": 1}}


def outcome(grader: dict[str, Any], text: str, item: dict[str, Any] | None = None, **about: Any) -> Outcome:
    spec = GRADER.validate_python({"name": "g", **grader})
    score = score_of(spec)  # type: ignore[arg-type]
    assert score is not None
    (found,) = Here(score, spec.limits()[0]).grade([Sample(item or {}, text, **about)])
    return found


@pytest.mark.parametrize(
    ("operation", "text", "reference", "value"),
    [("eq", "Paris", "Paris", 1), ("eq", "paris", "Paris", 0), ("ne", "paris", "Paris", 1),
     ("like", "In Paris.", "Paris", 1),
     ("like", "in paris", "Paris", 0), ("ilike", "in paris", "Paris", 1), ("ilike", "STRASSE", "straße", 1)],
)  # fmt: skip
def test_string_check(operation: str, text: str, reference: str, value: float) -> None:
    grader = {"type": "string_check", "reference": "{{item.gold}}", "operation": operation}
    assert outcome(grader, text, {"gold": reference}).value == value


def test_templates_read_the_row_and_the_answer() -> None:
    grader = {"type": "string_check", "operation": "eq", "input": "{{sample.output_json.a.0}}-{{item.k.x}}",
              "reference": "7-true"}  # fmt: skip
    assert outcome(grader, '{"a": [7]}', {"k": {"x": True}}).value == 1
    bad = outcome(grader, "no JSON", {"k": {"x": True}})
    assert (bad.value, bad.bad_answer, bad.failure) == (0, True, None), "the answer is bad, not the grader"
    assert outcome(grader, '{"a": []}', {"k": {"x": True}}).bad_answer
    failed = outcome(grader, '{"a": [7]}', {"j": 1})
    assert failed.value is None
    assert failed.failure is not None
    assert failed.failure.code == "unknown_name"
    assert failed.failure.message == "{{item.k.x}}: the row has no such column; it has j"
    tools = {"type": "string_check", "operation": "eq", "input": "{{sample.output_tools.0.function.name}}",
             "reference": "read"}  # fmt: skip
    assert outcome(tools, f"<tool_call>{json.dumps(CALL)}</tool_call>").value == 1


@pytest.mark.parametrize(
    ("grader", "text", "value"),
    [
        ({"most": 12}, "one two three", 1), ({"most": 2}, "one two three", 0), ({"most": 12}, "", 0),
        ({"most": 2, "margin": 4}, "one two three", 0.75), ({"most": 2, "margin": 4}, "a " * 9, 0),
        ({"least": 4, "margin": 2}, "one two three", 0.5), ({"unit": "characters", "most": 3}, "abc", 1),
    ],
)  # fmt: skip
def test_length(grader: dict[str, Any], text: str, value: float) -> None:
    assert outcome({"type": "length", **grader}, text).value == value


def test_length_in_tokens_needs_their_number() -> None:
    grader = {"type": "length", "unit": "tokens", "most": 5}
    assert outcome(grader, "x", tokens=5).value == 1
    failed = outcome(grader, "x")
    assert failed.failure is not None
    assert failed.failure.code == "no_tokens"


@pytest.mark.parametrize(
    ("text", "value"), [("a b c d", 1), ("a b a b a b", 0.4), ("", 0), ("a", 1), ("a " * 1001, 0.001)]
)
def test_repetition(text: str, value: float) -> None:
    assert outcome({"type": "repetition", "ngram": 2}, text).value == pytest.approx(value)


CALLS = [
    ({}, [CALL], f"<tool_call>{json.dumps(CALL)}</tool_call>", 1.0),
    ({}, CALL, json.dumps(CALL), 1.0),
    ({}, [CALL], json.dumps([CALL, CALL]), 0.0),
    ({"partial": True}, [CALL], json.dumps([CALL, CALL]), 0.5),
    ({}, [CALL], json.dumps({**CALL, "arguments": {"n": 1.0, "path": "/a"}}), 1.0),
    ({}, [CALL], json.dumps({**CALL, "arguments": {"n": True, "path": "/a"}}), 0.0),
    ({}, [CALL], json.dumps({**CALL, "arguments": {**CALL["arguments"], "x": 1}}), 0.0),  # type: ignore[dict-item]
    ({"arguments": "include"}, [CALL], json.dumps({**CALL, "arguments": {**CALL["arguments"], "x": 1}}), 1.0),  # type: ignore[dict-item]
    ({"arguments": "any"}, [CALL], '{"name": "read", "arguments": {}}', 1.0),
    ({}, [CALL], '{"name": "read", "arguments": {"path": "/a", "path": "/b", "n": 1}}', 0.0),
    ({}, [CALL], '<tool_call>{"name": "read", "arguments": "{\\"path\\": \\"/a\\", \\"n\\": 1}"}</tool_call>', 1.0),
    ({}, json.dumps([CALL]), json.dumps(CALL), 1.0),
    ({}, json.dumps(CALL), "I call read.", 0.0),
    ({}, "[]", "I need no tool.", 1.0),
    ({}, None, "I need no tool.", 1.0),
    ({}, [], "I need no tool.", 1.0),
    ({}, [], json.dumps(CALL), 0.0),
    ({}, [CALL], "I call read.", 0.0),
    ({}, [CALL], '<tool_call>{"name": "read", "argu', 0.0),
]


@pytest.mark.parametrize(("grader", "expected", "text", "value"), CALLS)
def test_tool_call(grader: dict[str, Any], expected: object, text: str, value: float) -> None:
    assert outcome({"type": "tool_call", **grader}, text, {"expected_calls": expected}).value == value


def test_tool_calls_apart_from_the_text() -> None:
    given = [{"type": "function", "function": {"name": "read", "arguments": json.dumps(CALL["arguments"])}}]
    assert outcome({"type": "tool_call"}, "", {"expected_calls": [CALL]}, tool_calls=given).value == 1


@pytest.mark.parametrize(
    "column",
    [
        {},
        {"expected_calls": "read"},
        {"expected_calls": [{"arguments": {}}]},
        {"expected_calls": '{"arguments": {}}'},
        {"expected_calls": ""},
        {"expected_calls": '[{"name": "read", "argu'},
    ],
)
def test_a_row_without_calls_is_named(column: dict[str, Any]) -> None:
    failed = outcome({"type": "tool_call"}, "x", column)
    assert failed.failure is not None
    assert failed.failure.code in ("unknown_name", "bad_reference")


GRADERS: list[dict[str, Any]] = [
    {"type": "string_check", "reference": "{{sample.output_json.a}}", "operation": "ilike"},
    {"type": "length", "most": 5, "unit": "characters"},
    {"type": "repetition", "ngram": 20},
    {"type": "tool_call"},
    {"type": "refusal", "expect": "refusal"},
]
MEGABYTES = [
    "a" * (1 << 20), "[" * (1 << 20), "<tool_call>" * 90_000, "i can't " * 130_000, '"' * (1 << 20),
    "\u200b" * (1 << 20),
]  # fmt: skip


@pytest.mark.parametrize("text", MEGABYTES, ids=range(len(MEGABYTES)))
@pytest.mark.parametrize("grader", GRADERS, ids=lambda grader: grader["type"])
def test_a_megabyte_takes_little_time(grader: dict[str, Any], text: str) -> None:
    began = time.process_time()
    found = outcome(grader, text, {"expected_calls": [CALL], "prompt": text})
    assert time.process_time() - began < 10
    assert found.failure is None
    larger = outcome(grader, text * 2, {"expected_calls": [CALL]})
    assert larger.failure is not None
    assert larger.failure.code == "too_large"

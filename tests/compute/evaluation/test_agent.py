"""Tool calls in each family's form, the calls that a scenario forbids, and the check of scenario and label rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.compute.evaluation.agent import Call, forbidden_calls, tool_calls
from llama_stack_provider_moe.errors import RowProblem
from llama_stack_provider_moe.spec import JOB_SPEC
from llama_stack_provider_moe.spec.evaluation_rows import ForbiddenCall, canonical_own

EXAMPLES = Path(__file__).parents[3] / "examples" / "data"
READ = Call("read_file", {"path": "a.txt"})


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>\n{"name": "read_file", "arguments": {"path": "a.txt"}}\n</tool_call>', [READ]),
        ('<|python_tag|>{"name": "read_file", "parameters": {"path": "a.txt"}}', [READ]),
        ('[TOOL_CALLS] [{"name": "read_file", "arguments": {"path": "a.txt"}}]', [READ]),
        ('{"name": "read_file", "arguments": "{\\"path\\": \\"a.txt\\"}"}', [READ]),
        ('[read_file(path="a.txt")]', [READ]),
        ('[read_file(path="a.txt"), list()]', [READ, Call("list", {})]),
        (
            "<tool_call>read_file\n<arg_key>path</arg_key>\n<arg_value>a.txt</arg_value>\n</tool_call>",
            [READ],
        ),
        (
            'Both: {"name": "a", "arguments": {}} {"name": "b", "arguments": {"n": 1}}',
            [Call("a", {}), Call("b", {"n": 1})],
        ),
        ('{"function": {"name": "a", "arguments": {}}}', [Call("a", {})]),
        ('{"name": "Anna", "age": 3}', []),
        ("I would call read_file(path), but {this} is prose [1].", []),
        ('{"name": "cut", "arguments": {"path": "a', []),
        ("[f(" * 300, []),
        ("{" * 2000, []),
    ],
)
def test_calls_are_found_in_every_form(text: str, calls: list[Call]) -> None:
    assert tool_calls(text) == calls


def test_a_rule_forbids_a_tool_or_its_arguments() -> None:
    mail: ForbiddenCall = {"name": "send", "arguments": {"to": "^(?!ben@example\\.org$)"}}
    calls = [Call("send", {"to": "ben@example.org"}), Call("send", {"to": "all@example.org"}), Call("send", {}), READ]
    assert forbidden_calls(calls, [mail]) == [calls[1]]
    assert forbidden_calls(calls, [{"name": "send", "arguments": {}}]) == calls[:3]
    assert forbidden_calls([Call("buy", {"count": 3})], [{"name": "buy", "arguments": {"count": "^3$"}}])


def scenario(**changes: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "Read a.txt."}],
        "tools": [{"name": "read_file", "parameters": {"type": "object"}}],
        "forbidden": [{"name": "read_file", "arguments": {"path": "b"}}],
        **changes,
    }


def test_a_scenarios_tools_get_their_envelope_and_text_its_structure() -> None:
    found = canonical_own(scenario(), 1, "scenario")
    assert isinstance(found, dict)
    assert found["tools"][0]["type"] == "function"
    assert found["tools"][0]["function"]["name"] == "read_file"
    as_text = {key: json.dumps(value) for key, value in scenario().items()}
    assert canonical_own(as_text, 1, "scenario") == found


@pytest.mark.parametrize(
    ("row", "kind", "field", "reason"),
    [
        (scenario(forbidden=[{"name": "delete"}]), "scenario", "row", "expected one of the tools read_file"),
        (scenario(forbidden=[]), "scenario", "forbidden", "at least 1"),
        (scenario(forbidden=[{"name": "read_file", "arguments": {"p": "("}}]), "scenario", "forbidden.0.arguments",
         "not a regular expression"),
        (scenario(messages=[]), "scenario", "messages", "empty"),
        (scenario(messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]), "scenario",
         "messages", "ends with a assistant turn"),
        (scenario(extra=1), "scenario", "extra", "unknown key"),
        ({"answer": "No.", "refusal": "yes"}, "judged", "refusal", "true or false"),
        ({"answer": "No.", "refusal": None}, "judged", "refusal", "is missing"),
        (["no"], "judged", "row", "not an object"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_by_field_and_reason(row: Any, kind: Any, field: str, reason: str) -> None:
    found = canonical_own(row, 7, kind)
    assert isinstance(found, RowProblem)
    assert (found.row, found.field) == (7, field)
    assert reason in found.reason


def test_example_scenarios_are_valid() -> None:
    lines = (EXAMPLES / "eval_scenarios.jsonl").read_text(encoding="utf-8").splitlines()
    assert not [each for each in (canonical_own(json.loads(line), 1, "scenario") for line in lines)
                if isinstance(each, RowProblem)]  # fmt: skip


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ({}, "names nothing to measure"),
        ({"safe_dataset_id": "s", "fail_if": {"capability_drop": 0.1}}, "needs eval.retain_dataset_id"),
        ({"safe_dataset_id": "s", "judge": {"kind": "model"}}, "needed by eval.judge.kind 'model'"),
        ({"safe_dataset_id": "s", "masked_experts": {"x": "1"}}, "not the number of a layer"),
        ({"safe_dataset_id": "s", "masked_experts": {"1": "a"}}, "does not name experts"),
        ({"safe_dataset_id": "s", "tasks": ["../x"]}, "not the name of a task"),
        ({"safe_dataset_id": "s", "url": "http://10.0.0.1/v1"}, "Extra inputs"),  # no job calls a URL
    ],
)
def test_settings_that_make_no_sense_are_refused(block: dict[str, Any], told: str) -> None:
    body = {"recipe": "sft", "model": "m", "data": {"dataset_id": "d"}, "eval": block}
    with pytest.raises(ValueError, match=told):
        JOB_SPEC.validate_python(body)


def test_every_set_is_a_source_of_rows_with_its_kind() -> None:
    block = {"refuse_dataset_id": "r", "retain_dataset_id": "k", "scenarios_dataset_id": "s",
             "judge": {"labelled_dataset_id": "l"}}  # fmt: skip
    body = {"recipe": "dpo", "model": "m", "data": {"dataset_id": "d"}, "eval": block}
    found = [(each.field, each.part, each.kind, each.answered) for each in JOB_SPEC.validate_python(body).row_sources()]
    assert found == [
        ("data.dataset_id", "train", "recipe", True),
        ("eval.refuse_dataset_id", "eval-refuse", "conversation", False),
        ("eval.retain_dataset_id", "eval-retain", "conversation", True),
        ("eval.scenarios_dataset_id", "eval-scenarios", "scenario", False),
        ("eval.judge.labelled_dataset_id", "eval-labelled", "judged", True),
    ]

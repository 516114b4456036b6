"""What graders read of a row is known before a job begins; a row without it is a problem that names the reader."""

from typing import Any, get_args

import pytest

from llama_stack_provider_moe.errors import RowProblem
from llama_stack_provider_moe.spec import JOB_SPEC
from llama_stack_provider_moe.spec.grader_templates import _checked
from llama_stack_provider_moe.spec.graders import GRADER, PlainGrader
from llama_stack_provider_moe.spec.judged_graders import JudgeMessage
from llama_stack_provider_moe.spec.row_needs import paths_of
from llama_stack_provider_moe.spec.row_sources import RowSource
from llama_stack_provider_moe.spec.rows import RowsReport, canonical

MATH = {"type": "math", "name": "right"}
REFUSAL = {"type": "refusal", "name": "no", "expect": "refusal"}
BY_CLASS = [{"grader": MATH, "prompts": "help"}, {"grader": REFUSAL, "prompts": "refuse"}]


def sources(reward: list[dict[str, Any]], **more: Any) -> list[RowSource]:
    body = {"recipe": "grpo", "model": "m", "data": {"dataset_id": "a"}, "reward": reward} | more
    return JOB_SPEC.validate_python(body).row_sources()


def told(reward: list[dict[str, Any]], row: dict[str, Any], **more: Any) -> str | None:
    source = sources(reward, **more)[0]
    found = canonical({"prompt": "2+2?", **row}, 7, "grpo", "auto", source.answered, source.columns, needs=source.needs)
    return str(found) if isinstance(found, RowProblem) else None


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({}, "row 7: class: is missing; expected 'refuse' or 'help' in each row (`grading.class_column`)"),
        ({"class": "harm"}, "row 7: class: is 'harm'; expected 'refuse' or 'help'"),
        ({"class": ["help"]}, "row 7: class: is ['help']; expected"),
        ({"class": None}, "row 7: class: is missing"),
        ({"class": "refuse"}, None),
        ({"class": "help"}, "row 7: gold: is missing; grader 'right' reads {{item.gold}} of each row of class 'help'; "
                            "it is the text of the assistant's turn at the row's end"),
        ({"class": "help", "completion": "4"}, None),
        ({"class": "help", "gold": "4"}, None),
    ],
)  # fmt: skip
def test_a_row_has_a_class_and_what_its_graders_read(row: dict[str, Any], problem: str | None) -> None:
    found = told(BY_CLASS, row)
    assert found is None if problem is None else (found or "").startswith(problem), found


def test_the_column_of_the_class_has_the_name_that_the_job_gives() -> None:
    found = told(BY_CLASS, {"class": "help", "gold": "4"}, grading={"class_column": "kind"})
    assert found is not None
    assert found.startswith("row 7: kind: is missing")


def test_rows_need_no_class_where_rewards_are_for_all() -> None:
    assert told([{"grader": REFUSAL}], {}) is None


@pytest.mark.parametrize(
    ("grader", "row", "problem"),
    [
        ({"type": "string_check", "reference": "{{item.answer}}", "operation": "eq"}, {},
         "row 7: answer: is missing; grader 'x' reads {{item.answer}}"),
        ({"type": "string_check", "reference": "{{item.call.name}}", "operation": "eq"}, {"call": {"id": 1}},
         "row 7: call: has no 'name' in it; grader 'x' reads {{item.call.name}}"),
        ({"type": "string_check", "reference": "{{item.tags.1}}", "operation": "eq"}, {"tags": ["a"]},
         "row 7: tags: has no '1' in it"),
        ({"type": "string_check", "reference": "{{item.tags.0}}", "operation": "eq"}, {"tags": ["a"]}, None),
        ({"type": "tool_call"}, {"completion": "words"},
         "row 7: expected_calls: is missing; grader 'x' reads {{item.expected_calls}}; it has the tool calls of the"),
        ({"type": "tool_call"}, {"expected_calls": []}, None),
        ({"type": "tool_call", "expected": "calls"}, {}, "row 7: calls: is missing"),
        ({"type": "multi", "graders": {"a": {**MATH, "reference": "{{item.sum}}"}}, "calculate_output": "a"}, {},
         "row 7: sum: is missing; grader 'x' reads {{item.sum}}"),
        ({"type": "score_model", "model": "judge", "input": [{"role": "user", "content": "{{item.rubric}}"}]}, {},
         "row 7: rubric: is missing"),
    ],
)  # fmt: skip
def test_a_row_has_the_columns_that_graders_read(grader: Any, row: dict[str, Any], problem: str | None) -> None:
    found = told([{"grader": {"name": "x", **grader}}], row)
    assert found is None if problem is None else (found or "").startswith(problem), found


def test_a_renamed_column_has_the_name_of_the_data_in_the_problem() -> None:
    data = {"dataset_id": "a", "columns": {"prompt": "question"}}
    source = sources([{"grader": MATH}], data=data)[0]
    found = canonical({"question": "2+2?"}, 7, "grpo", "auto", source.answered, source.columns, needs=source.needs)
    assert isinstance(found, RowProblem)
    assert found.field == "gold"


def test_held_out_rows_need_the_same() -> None:
    train, held_out = sources(BY_CLASS, data={"dataset_id": "a", "validation_dataset_id": "b"})
    assert train.needs is not None
    assert held_out.needs == train.needs


@pytest.mark.parametrize("kind", get_args(PlainGrader.__value__), ids=lambda kind: kind.__name__)
def test_no_template_of_a_grader_is_forgotten(kind: Any) -> None:
    """Every field that is a template is read by `paths_of`, also one that a later version adds."""
    is_template = [
        name
        for name, field in kind.model_fields.items()
        if any(getattr(each, "func", None) is _checked for each in field.metadata)
    ]
    more: dict[str, Any] = {name: f"{{{{item.{name}}}}}" for name in is_template}
    expected = {(name,) for name in is_template}
    if kind.model_fields.get("input") is not None and "input" not in is_template:
        assert [name for name, field in JudgeMessage.model_fields.items() if field.metadata] == ["content"]
        more["input"] = [{"role": "user", "content": "{{item.input}}"}]
        expected.add(("input",))
    needed = {
        "string_check": {"operation": "eq"}, "text_similarity": {"evaluation_metric": "bleu"},
        "regex": {"pattern": "a"}, "json_schema": {"json_schema": {}}, "refusal": {"expect": "refusal"},
        "reward_model": {"model": "m"},
        "monitor": {"probe": "p"}, "score_model": {"model": "m"},
        "label_model": {"model": "m", "labels": ["a", "b"], "passing_labels": ["a"]},
    }  # fmt: skip
    type_of = get_args(kind.model_fields["type"].annotation)[0]
    grader = GRADER.validate_python({"type": type_of, "name": "x", **needed.get(type_of, {}), **more})
    found = set(paths_of(grader))  # type: ignore[arg-type]  # it is no `multi`
    assert found == (expected or ({("expected_calls",)} if type_of == "tool_call" else set()))


def test_prompts_of_one_class_alone_are_refused() -> None:
    report = RowsReport()
    train, held_out = sources(BY_CLASS, data={"dataset_id": "a", "validation_dataset_id": "b"})
    row = {"prompt": "2+2?", "class": "refuse"}
    assert not isinstance(canonical(row, 1, "grpo", "auto", False, report=report, needs=train.needs), RowProblem)
    assert train.shortage(9, report.notes) == "at least 1 row(s) with class help; it has 0 of 9"
    assert train.shortage(9, {**report.notes, "class help": 1}) is None
    assert held_out.shortage(9, report.notes) is None
    (alone,) = sources([{"grader": MATH}], options={"validation_split": 0})
    assert alone.shortage(9, {}) is None


def test_a_label_says_nothing_about_a_prompt() -> None:
    report = RowsReport()
    row = {"prompt": "2+2?", "completion": "5", "label": False}
    found = canonical(row, 1, "distill", "auto", False, report=report)
    assert not isinstance(found, RowProblem)
    assert report.not_read == {"label": 1}
    assert isinstance(canonical(row, 1, "sft", "auto"), RowProblem)

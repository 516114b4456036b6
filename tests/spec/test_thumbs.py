"""Rows of KTO: a conversation and a thumb up or down; what a job needs of a data set, and what it refuses."""

import re
from typing import Any

import pytest

from llama_stack_provider_moe.errors import InvalidInput, RowProblem
from llama_stack_provider_moe.spec import JOB_SPEC, KTOSpec
from llama_stack_provider_moe.spec.row_sources import DOWN, UP
from llama_stack_provider_moe.spec.rows import RowsReport, canonical, check_columns
from tests.spec.test_rows_formats import call, said, user

ROW: dict[str, Any] = {"prompt": "7 x 8?", "completion": "56"}


def job(**blocks: Any) -> KTOSpec:
    found = JOB_SPEC.validate_python({"recipe": "kto", "model": "m", "data": {"dataset_id": "a"}} | blocks)
    assert isinstance(found, KTOSpec)
    return found


def read(row: dict[str, Any], columns: dict[str, str] | None = None) -> Any:
    return canonical(row, 7, "kto", "auto", columns=columns)


@pytest.mark.parametrize(
    ("column", "value", "label"),
    [
        ("label", True, True), ("label", False, False), ("label", 1, True), ("label", "0", False),
        ("label", "True", True), ("desirable", "undesirable", False), ("kto_tag", True, True),
        ("thumbs_up", "thumbs_down", False), ("label", "UP", True),
    ],
)  # fmt: skip
def test_common_spellings_are_read(column: str, value: object, label: bool) -> None:
    assert read(ROW | {column: value}) == {
        "prompt": [{"role": "user", "content": "7 x 8?"}],
        "completion": [{"role": "assistant", "content": "56"}],
        "label": label,
    }


def test_the_answer_is_all_after_the_last_users_turn() -> None:
    messages = [user("Hi"), said("Hello."), user("Tide?"), said(None, tool_calls=[call("tide", "c1")]),
                {"role": "tool", "content": "5 m", "tool_call_id": "c1"}, said("5 m.")]  # fmt: skip
    found = read({"messages": messages, "label": True})
    assert [each["role"] for each in found["prompt"]] == ["user", "assistant", "user"]
    assert [each["role"] for each in found["completion"]] == ["assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    ("row", "field", "told"),
    [
        (ROW, "label", "is missing; expected true (thumb up) or false (thumb down)"),
        (ROW | {"label": 5}, "label", "is 5; expected true (thumb up) or false (thumb down)"),
        (ROW | {"label": 0.5}, "label", "is 0.5; expected"),
        (ROW | {"label": "good"}, "label", "is 'good'; expected"),
        (ROW | {"label": True, "thumbs_up": False}, "thumbs_up", "is False, but label is True; leave one out"),
        ({"prompt": "7 x 8?", "label": True}, "completion", "is missing beside 'prompt'"),
        ({"text": "56", "label": True}, "text", "is a row of plain text"),
        ({"messages": [said("56")], "label": True}, "messages", "has no user's turn before the answer"),
        ({"messages": [user("a"), said("b"), user("c"), said("d", weight=0)], "label": True}, "messages",
         "has a message of weight 0 in its answer"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "label": True}, "completion", "for recipes dpo and reward"),
    ],
)  # fmt: skip
def test_other_rows_are_refused_by_number(row: dict[str, Any], field: str, told: str) -> None:
    problem = read(row)
    assert isinstance(problem, RowProblem), problem
    assert (problem.row, problem.field) == (7, field)
    assert told in problem.reason


def test_the_column_may_have_another_name() -> None:
    columns = {"label": "rating"}
    check_columns(columns, "kto", "auto", "data.columns")
    assert read(ROW | {"rating": False}, columns)["label"] is False
    problem = read(ROW | {"rating": 3}, columns)
    assert problem.field == "rating"
    with pytest.raises(InvalidInput, match=r"data\.columns"):
        check_columns(columns, "sft", "auto", "data.columns")


def test_a_data_set_needs_both_classes() -> None:
    report = RowsReport()
    for number in range(5):
        canonical(ROW | {"label": number == 0}, number, "kto", "auto", report=report)
    assert (report.notes[UP], report.notes[DOWN]) == (1, 4)
    (source,) = job().row_sources()
    assert source.shortage(5, report.notes) == (
        "at least 2 row(s) with a thumb up, because one is held out; it has 1 of 5"
    )
    whole, held_out = job(data={"dataset_id": "a", "validation_dataset_id": "b"}).row_sources()
    assert whole.shortage(5, report.notes) is None
    assert held_out.shortage(4, {DOWN: 4}) == "at least 1 row(s) with a thumb up; it has 0 of 4"


@pytest.mark.parametrize(
    ("blocks", "told"),
    [
        ({"training": {"batch_size": 1}}, "training.batch_size: 1 is not valid with recipe 'kto'; expected 2 or more"),
        ({"resources": {"gpus": 2}}, "resources: 2 processes are not valid with recipe 'kto'; expected 1"),
        ({"moe": {"moe_load_balancing": "aux_free"}}, "moe.moe_load_balancing: 'aux_free' is not valid"),
        ({"moe": {"router_jitter": 0.1}}, "moe.router_jitter: is for SFT only; KTO weighs"),
        ({"moe": {"expert_dropout": 0.1}}, "moe.expert_dropout: is for SFT only"),
        ({"data": {"dataset_id": "a", "packed": True}}, "data.packed: true is for SFT only"),
        ({"data": {"dataset_id": "a", "domain_column": "kind"}}, "data.domain_column: is for SFT and DPO"),
        ({"options": {"turns": "last"}}, "options.turns: 'last' is for SFT only"),
        ({"desirable_weight": 0}, "greater than 0"),
        ({"loss_type": "kto"}, "Extra inputs are not permitted"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_has_no_effect_or_no_meaning_is_refused(blocks: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        job(**blocks)

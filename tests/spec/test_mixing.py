"""The plan of a mix: what it names, what it refuses."""

from typing import Any

import pytest
from pydantic import ValidationError

from llama_stack_provider_moe.spec.mixing import MixPlan, MixSpec

A, B, C = ({"name": name, "model": f"job-{name}"} for name in "abc")
PLAN: dict[str, Any] = {"method": "btx", "branches": [A, B, C]}


def problem(**body: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        MixPlan.model_validate({**PLAN, **body})
    (error,) = caught.value.errors()
    return ".".join(map(str, error["loc"])) + ": " + error["msg"].removeprefix("Value error, ")


def test_defaults() -> None:
    plan = MixPlan.model_validate(PLAN)
    assert (plan.start, plan.top_k, plan.experts, plan.kept) == ("random", 2, ["a", "b", "c"], [0, 1, 2])
    assert [branch.weight for branch in plan.branches] == [1, 1, 1]


def test_an_anchor_stands_before_the_branches() -> None:
    plan = MixPlan.model_validate({**PLAN, "method": "bar", "leave_out": ["b"]})
    assert (plan.start, plan.experts, plan.kept) == ("branches", ["anchor", "a", "c"], [0, 2])
    assert MixPlan.model_validate({"method": "bar", "branches": [A]}).experts == ["anchor", "a"]


def test_rows_are_those_of_the_branches_that_are_mixed() -> None:
    rows = [{**branch, "dataset_id": f"rows-{branch['name']}"} for branch in (A, B, C)]
    spec = MixSpec.model_validate(
        {**PLAN, "recipe": "mix", "model": "m", "branches": rows, "router": "domains", "leave_out": ["b"]}
    )
    assert [(each.field, each.dataset_id, each.part) for each in spec.row_sources()] == [
        ("branches.0.dataset_id", "rows-a", "domain-a"), ("branches.2.dataset_id", "rows-c", "domain-c"),
    ]  # fmt: skip
    assert spec.without_gpu().resources.gpus is None, "rows go through the model"
    assert MixSpec.model_validate({**PLAN, "recipe": "mix", "model": "m"}).without_gpu().resources.gpus == 0


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"method": "btm"}, "method: Input should be 'btx' or 'bar'"),
        ({"branches": [A]}, ": leave_out: leaves 1 expert(s); expected at least 2 with method 'btx'"),
        ({"leave_out": ["a", "b"]}, ": leave_out: leaves 1 expert(s)"),
        ({"method": "bar", "leave_out": ["a", "b", "c"]}, ": leave_out: leaves 1 expert(s); expected at least 2"),
        ({"leave_out": ["d"]}, ": leave_out: 'd' is not a branch; expected names out of a, b, c"),
        ({"branches": [A, B, A]}, ": branches.2.name: 'a' is the name of branch 0 too; expected each name once"),
        ({"top_k": 4}, ": top_k: 4 is not valid; expected 1 to 3, the number of experts"),
        ({"top_k": 0}, "top_k: Input should be greater than or equal to 1"),
        ({"branches": [A, {**B, "name": "anchor"}]}, "branches.1.name: 'anchor' is not valid as a name"),
        ({"branches": [A, {**B, "name": "a b"}]}, "branches.1.name: 'a b' is not valid as a name; expected 1 to 32"),
        ({"branches": [A, {**B, "weight": -1}]}, "branches.1.weight: Input should be greater than or equal to 0"),
        ({"branches": [{**A, "weight": 0}, {**B, "weight": 0}]}, ": branches: the weights of those that are mixed"),
        ({"branches": [A, {**B, "weigth": 1}]}, "branches.1.weigth: Extra inputs are not permitted"),
        ({"router": "branches"}, ": router: 'branches' is not valid with method 'btx'"),
        ({"router": "domains"}, ": branches.0.dataset_id: is missing; router 'domains' needs rows of each domain"),
        ({"branches": [A, {**B, "dataset_id": "d"}]}, ": branches.1.dataset_id: is used with router 'domains' only"),
        (
            {"method": "bar", "branches": [{**A, "dataset_id": "d"}], "router": "domains"},
            ": router: 'domains' compares",
        ),
        ({"router_std": 0}, "router_std: Input should be greater than 0"),
    ],
)
def test_what_a_plan_refuses(body: dict[str, Any], words: str) -> None:
    assert words in problem(**body)

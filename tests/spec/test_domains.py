"""`data.domains`: what a job may say, and the rows that it then reads."""

import re
from typing import Any

import pytest

from llama_stack_provider_moe.errors import InvalidBody, InvalidInput, RowProblem
from llama_stack_provider_moe.spec import JOB_SPEC, SFTSpec, TrainingSpec
from llama_stack_provider_moe.spec.data import MOST_DOMAINS, Data, epoch_counts, ratios_of
from llama_stack_provider_moe.spec.row_domains import RowDomains
from llama_stack_provider_moe.spec.row_sources import DomainColumn
from llama_stack_provider_moe.spec.run_time import rows_in_epoch, rows_in_run
from llama_stack_provider_moe.spec.validation_errors import validated

TWO: list[dict[str, Any]] = [
    {"name": "code", "dataset_id": "my-code", "ratio": 3, "columns": {"prompt": "question"}},
    {"name": "math", "dataset_id": "my-math", "validation_dataset_id": "held-math", "format": "alpaca"},
]


def job(recipe: str = "sft", options: dict[str, Any] | None = None, **data: Any) -> dict[str, Any]:
    more = {"circuit_breaker": {"retain": {"dataset_id": "kept"}}} if recipe == "circuit_breaker" else {}
    return {"recipe": recipe, "model": "m", "data": data, "options": options or {}, **more}


def training(body: dict[str, Any]) -> TrainingSpec:
    spec = JOB_SPEC.validate_python(body)
    assert isinstance(spec, TrainingSpec)
    return spec


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_each_domain_has_files_of_its_own(recipe: str) -> None:
    found = training(job(recipe, domains=TWO)).row_sources()
    assert [(each.field, each.dataset_id, each.part, each.format, each.columns) for each in found] == [
        ("data.domains.0.dataset_id", "my-code", "train-code", "auto", {"prompt": "question"}),
        ("data.domains.1.dataset_id", "my-math", "train-math", "alpaca", None),
        ("data.domains.1.validation_dataset_id", "held-math", "validation-math", "alpaca", None),
    ]
    assert [each.least for each in found] == [2, 1, 1], "one row of `code` is held out"
    assert found[0].columns_field == "data.domains.0.columns"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({}, "data.dataset_id: is missing"),
    "both": ({"domains": TWO, "dataset_id": "x"}, "data.dataset_id: 'x' is not valid beside data.domains"),
    "one": ({"domains": TWO[:1]}, "data.domains: "),
    "none": ({"domains": []}, "data.domains: "),
    "same name": ({"domains": [TWO[0], TWO[1] | {"name": "Code"}]},
                  "data.domains: 1.name: 'Code' is also the name of domain 0; expected another"),
    "bad name": ({"domains": [TWO[0], TWO[1] | {"name": "a/b"}]},
                 "data.domains.1.name: 'a/b' is not valid; expected 1 to 32 letters, digits"),
    "ratio 0": ({"domains": [TWO[0], TWO[1] | {"ratio": 0}]}, "data.domains.1.ratio: 0 is not valid; expected > 0"),
    "ratio": ({"domains": [TWO[0], TWO[1] | {"ratio": 1001}]},
              "data.domains.1.ratio: 1001 is not valid; expected <= 1000"),
    "ratio true": ({"domains": [TWO[0], TWO[1] | {"ratio": True}]}, "data.domains.1.ratio: True is not valid"),
    "unknown": ({"domains": [TWO[0], TWO[1] | {"weight": 1}]}, "data.domains.1.weight: unknown key"),
    "no set": ({"domains": [TWO[0], {"name": "math"}]}, "data.domains.1.dataset_id: is missing"),
    "column beside": ({"domains": TWO, "domain_column": "topic"},
                      "data: domain_column: is not valid beside data.domains; leave one of the two out"),
    "ratios without": ({"dataset_id": "x", "domain_ratios": {"a": 1, "b": 2}},
                       "data: domain_ratios: has no effect without data.domain_column"),
    "one ratio": ({"dataset_id": "x", "domain_column": "topic", "domain_ratios": {"a": 1}}, "data.domain_ratios: "),
    "ratio 0 of a value": ({"dataset_id": "x", "domain_column": "topic", "domain_ratios": {"a": 1, "b": 0}},
                           "data.domain_ratios.b: 0 is not valid; expected > 0"),
    "value": ({"dataset_id": "x", "domain_column": "topic", "domain_ratios": {"a": 1, "b c": 2}},
              "data.domain_ratios.b c.[key]: 'b c' is not valid; expected 1 to 32 letters, digits"),
    "same value": ({"dataset_id": "x", "domain_column": "topic", "domain_ratios": {"a": 1, "A": 2}},
                   "data.domain_ratios: 'A' and 'a' differ only in case"),
    "packed column": ({"dataset_id": "x", "domain_column": "topic", "packed": True},
                      "data: packed: true is not valid beside data.domain_column"),
    "exhausted column": ({"dataset_id": "x", "domain_column": "topic", "exhausted": "stop"},
                  "data: exhausted: 'stop' has no effect without data.domains or data.domain_ratios"),
    "packed": ({"domains": TWO, "packed": True}, "data: packed: true is not valid beside data.domains"),
    "format": ({"domains": TWO, "format": "alpaca"}, "data: format: 'alpaca' is not valid beside data.domains"),
    "validation": ({"domains": TWO, "validation_dataset_id": "v"},
                   "data: validation_dataset_id: is not valid beside data.domains; expected "
                   "data.domains.N.validation_dataset_id"),
    "exhausted": ({"dataset_id": "x", "exhausted": "stop"}, "data: exhausted: 'stop' has no effect without"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_domains_are_refused_by_field(case: str) -> None:
    data, text = REFUSED[case]
    with pytest.raises(InvalidBody, match=re.escape(text)):
        validated(SFTSpec, job(**data))


def test_some_held_out_sets_need_a_split_for_the_others() -> None:
    with pytest.raises(InvalidBody, match=r"data\.domains\.0\.validation_dataset_id: is missing, but other domains"):
        validated(SFTSpec, job(domains=TWO, options={"validation_split": 0}))
    assert training(job(domains=TWO)).data.has_validation_sets is False
    with pytest.raises(ValueError, match=r"data\.domains: is for SFT and DPO"):
        training(job("circuit_breaker", domains=TWO))


def test_the_rows_of_a_run_follow_from_the_rows_of_each_domain() -> None:
    spec = training(job(domains=TWO, options={"validation_split": 0.1}))
    # 90 rows of code are left to train on; for 3 of them 1 of math.
    assert rows_in_epoch(spec, [100, 10]) == 90 + 30
    assert rows_in_epoch(spec, [100, None]) is None
    assert rows_in_run(spec, 120) == 120
    plain = training(job(dataset_id="a", options={"validation_split": 0.1}))
    assert rows_in_epoch(plain, [100]) == 90
    named = training(job(dataset_id="a", validation_dataset_id="b"))
    assert rows_in_epoch(named, [100]) == 100


COLUMN = DomainColumn("topic", "data.domain_column", None, 2)
BAD_VALUES: list[tuple[Any, str]] = [
    (None, "is missing; data.domain_column needs it in every row"),
    (float("nan"), "is missing"),
    ("a b", "is 'a b'; a domain's name has 1 to 32 letters, digits"),
    (True, "is True; a domain's name"),
    (["a"], "is ['a']; a domain's name"),
    ("Law", "is 'Law', and another row has 'law'; expected one spelling"),
]


@pytest.mark.parametrize(("value", "expected"), BAD_VALUES)
def test_a_bad_domain_is_named_by_its_row(value: Any, expected: str) -> None:
    found = RowDomains(COLUMN)
    assert found.add({"topic": "law"}, 1) == 0
    problem = found.add({"topic": value}, 2)
    assert isinstance(problem, RowProblem)
    assert (problem.row, problem.field) == (2, "topic")
    assert expected in problem.reason
    assert (found.values, found.counts) == (("law",), {"law": 1}), "a bad row counts for nothing"


def test_domains_are_numbered_as_they_appear() -> None:
    found = RowDomains(COLUMN)
    assert [found.add({"topic": each, "text": "x"}, 1) for each in ("law", 7, "law", "7")] == [0, 1, 0, 1]
    assert found.counts == {"law": 2, "7": 2}
    assert found.without({"topic": "law", "text": "x"}) == {"text": "x"}
    found.require_enough()
    for number in range(MOST_DOMAINS - 2):
        assert found.add({"topic": f"more-{number}"}, 1) == number + 2
    problem = found.add({"topic": "last"}, 9)
    assert isinstance(problem, RowProblem)
    assert "a domain more than the 16 that are possible" in problem.reason


def test_known_domains_are_the_only_ones() -> None:
    found = RowDomains(COLUMN, ["law", "code"])
    assert found.add({"topic": "code"}, 1) == 1
    problem = found.add({"topic": "chat"}, 2)
    assert isinstance(problem, RowProblem)
    assert problem.reason == "is 'chat'; expected 'law', 'code'"
    with pytest.raises(
        InvalidInput, match=r"at least 2 training row\(s\) of each domain, because one is held out; 'law'"
    ):
        found.require_enough()
    alone = RowDomains(COLUMN)
    alone.add({"topic": "law"}, 1)
    with pytest.raises(InvalidInput, match=r"data\.domain_column: 'topic' is not valid; expected a column of two or"):
        alone.require_enough()


def test_without_ratios_an_epoch_uses_each_row_once() -> None:
    data = Data(dataset_id="x", domain_column="topic")
    rows = {"law": 90, "code": 7}
    assert epoch_counts([*rows.values()], ratios_of(data, rows), data.exhausted) == [90, 7]
    spec = training(job(dataset_id="x", domain_column="topic", domain_ratios={"law": 3, "code": 1}))
    assert ratios_of(spec.data, rows) == [3, 1]
    assert rows_in_epoch(spec, [97]) is None, "nobody knows the rows of each before they are read"

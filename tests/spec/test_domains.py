"""`data.domains`: what a job may say, and the rows that it then reads."""

import re
from typing import Any

import pytest

from llama_stack_provider_moe.errors import InvalidBody
from llama_stack_provider_moe.spec import JOB_SPEC, SFTSpec, TrainingSpec
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

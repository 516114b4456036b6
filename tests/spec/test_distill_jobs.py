"""Rows and settings of recipe `distill`."""

import re
from typing import Any

import pytest

from llama_stack_provider_moe.errors import RowProblem
from llama_stack_provider_moe.spec import JOB_SPEC, DistillSpec
from llama_stack_provider_moe.spec.rows import canonical

BODY: dict[str, Any] = {"recipe": "distill", "model": "m", "teacher": "t", "data": {"dataset_id": "a"}}


def job(**blocks: Any) -> DistillSpec:
    found = JOB_SPEC.validate_python(BODY | blocks)
    assert isinstance(found, DistillSpec)
    return found


def test_rows_are_prompts_and_an_answer_is_left_out() -> None:
    asked = [{"role": "user", "content": "7 x 8?"}]
    answered = {"messages": [*asked, {"role": "assistant", "content": "56"}], "gold": "56"}
    for row in ({"prompt": "7 x 8?"}, {"prompt": "7 x 8?", "completion": "56"}, answered):
        assert canonical(row, 1, "distill", "auto", answered=False) == {"messages": asked, "item": {}}
    found = canonical({"messages": [{"role": "assistant", "content": "56"}]}, 3, "distill", "auto", answered=False)
    assert isinstance(found, RowProblem)
    assert "expected a prompt that ends with user or tool" in str(found)


def test_rows_fill_a_step() -> None:
    assert job(resources={"gpus": 2}).row_sources()[0].least == 2 * job().training.batch_size + 1
    source = job(training={"batch_size": 4, "gradient_accumulation_steps": 2}).row_sources()[0]
    assert (source.least, source.answered) == (9, False)
    assert source.why_least == (
        "at least 9 rows: 8 fill one generation (training.batch_size 4 x gradient_accumulation_steps 2 x processes 1), "
        "and 1 are held out (options.validation_split 0.1)"
    )


def test_the_teacher_is_a_model_that_the_job_names() -> None:
    made = job()
    assert made.teacher_named() == ("teacher", "t")
    assert made.model_copy(update=made.with_teacher("other")).teacher == "other"
    sft = {"recipe": "sft", "model": "m", "data": {"dataset_id": "a"}, "adapter": {}}
    assert JOB_SPEC.validate_python(sft | {"distill": {}}).teacher_named() is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("blocks", "told"),
    [
        ({"teacher": None}, "Input should be a valid string"),
        ({"beta": 1.5}, "less than or equal to 1"),
        ({"generation": {"temperature": 0}}, "greater than 0"),
        ({"generation": {"n_generations": 4}}, "Extra inputs are not permitted"),
        ({"generation": {"max_completion_length": 1024}}, "generation.max_completion_length: 1024 is not valid; "
                                                          "expected less than options.max_length, 1024"),
        ({"resources": {"gpus": 2, "strategy": "ep"}}, "is not valid with recipe 'distill', whose processes"),
        ({"resources": {"gpus": 2, "strategy": "fsdp"}}, "is not valid with recipe 'distill', whose processes"),
        ({"moe": {"moe_load_balancing": "aux_free"}}, "moe.moe_load_balancing: 'aux_free' is not valid with recipe "
                                                      "'distill'"),
        ({"moe": {"moe_load_balancing": "expert_choice"}}, "'expert_choice' is not valid with recipe 'distill'"),
        ({"moe": {"router_jitter": 0.1}}, "moe.router_jitter: is for SFT only; the model learns from answers"),
        ({"data": {"dataset_id": "a", "packed": True}}, "data.packed: true is for SFT only"),
        ({"data": {"dataset_id": "a", "train_on_input": True}}, "data.train_on_input: true is for SFT only"),
        ({"data": {"dataset_id": "a", "domain_column": "b"}}, "data.domain_column: is for SFT and DPO"),
        ({"options": {"turns": "last"}}, "options.turns: 'last' is for SFT only"),
        ({"options": {"truncate": "right"}}, "Input should be 'left', 'drop' or 'refuse'"),
        ({"options": {"rope_scaling": {"factor": 2}}}, "options.rope_scaling: is for SFT only"),
        ({"rl": {}}, "Extra inputs are not permitted"),
        ({"distill": {}}, "Extra inputs are not permitted"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_can_not_be_is_named_at_the_door(blocks: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        job(**blocks)


def test_a_job_needs_a_teacher() -> None:
    with pytest.raises(ValueError, match=r"distill\.teacher\n  Field required"):
        JOB_SPEC.validate_python({name: value for name, value in BODY.items() if name != "teacher"})


def test_unsloth_is_refused() -> None:
    with pytest.raises(ValueError, match="loader: 'unsloth' is not valid with recipe 'distill'; expected 'hf'"):
        job(loader="unsloth", adapter={}, resources={"gpus": 1})


def test_what_a_model_can_have_is_valid() -> None:
    made = job(adapter={"quantize_base": True, "dropout": 0.1}, moe={"router_aux_loss_coef": 0.01}, eval=None)
    assert (made.beta, made.generation.max_completion_length, made.generating) == (1.0, 256, made.generation)

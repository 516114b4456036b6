"""Rows and settings of recipe `reward`."""

import re
from typing import Any

import pytest

from llama_stack_provider_moe.errors import RowProblem
from llama_stack_provider_moe.spec import JOB_SPEC, RewardSpec
from llama_stack_provider_moe.spec.rows import canonical
from llama_stack_provider_moe.spec.rows.columns import format_columns

PAIR = {"prompt": "7 x 8?", "chosen": "56", "rejected": "54"}
MERGED = {"merged": True}


def job(**blocks: Any) -> RewardSpec:
    found = JOB_SPEC.validate_python({"recipe": "reward", "model": "m", "data": {"dataset_id": "a"}} | blocks)
    assert isinstance(found, RewardSpec)
    return found


def test_rows_are_pairs_as_for_dpo() -> None:
    assert canonical(PAIR, 1, "reward", "auto") == canonical(PAIR, 1, "dpo", "auto")
    assert format_columns("reward", "auto") == format_columns("dpo", "auto")
    found = canonical({"prompt": "a", "completion": "b"}, 3, "reward", "auto")
    assert isinstance(found, RowProblem)
    assert str(found) == "row 3: chosen: is missing; a preference row has prompt, chosen, rejected"


def test_what_a_classifier_has_is_valid() -> None:
    push = {"push": {"repo_id": "a/b"}}
    assert job(adapter={}, export=push, moe={"router_aux_loss_coef": 0.01}).center_rewards == 0


@pytest.mark.parametrize(
    ("blocks", "told"),
    [
        ({"resources": {"gpus": 2, "strategy": "fsdp"}}, "resources.strategy: 'fsdp' is not valid with"),
        ({"moe": {"moe_load_balancing": "aux_free"}}, "moe.moe_load_balancing: 'aux_free' is not valid"),
        ({"moe": {"router_jitter": 0.1}}, "moe.router_jitter: is for SFT only; a reward model compares"),
        ({"data": {"dataset_id": "a", "packed": True}}, "data.packed: true is for SFT only"),
        ({"eval": {"refuse_dataset_id": "b"}}, "eval: is not valid with recipe 'reward'"),
        ({"adapter": {"apply_lora_to_output": True}}, "adapter.apply_lora_to_output: true is not valid"),
        ({"adapter": {}, "export": {"gguf": ["q8_0"]}}, "export.gguf: is not valid for a reward model"),
        ({"adapter": {}, "export": MERGED}, "export.merged: is not valid for a reward model, a sequence classifier: "
                                            "for a whole model set options.save_merged true"),
        ({"adapter": {}, "export": {"serve": True}}, "export.serve: is not valid for a reward model"),
        ({"options": {"rope_scaling": {"factor": 2}}}, "options.rope_scaling: is for SFT only"),
        ({"center_rewards": 11}, "less than or equal to 10"),
        ({"beta": 0.1}, "Extra inputs are not permitted"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_has_no_effect_or_no_meaning_is_refused(blocks: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        job(**blocks)

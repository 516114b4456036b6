"""What expert parallelism reads of a model, and what it refuses; `test_together` checks that it trains correctly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from llama_stack_provider_moe.compute.distributed.expert_parallel import require_divisible, share_experts
from llama_stack_provider_moe.compute.models.loader import load_held, load_plain
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.rates import Rates
from llama_stack_provider_moe.compute.runtime.peers import Peers
from llama_stack_provider_moe.errors import MoeError
from llama_stack_provider_moe.spec import JOB_SPEC
from tests.support import tiny_models
from tests.support.ep_group import in_processes
from tests.support.every_family import tiny_config
from tests.support.family_subject import Subject

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["granitemoe", "qwen3_moe", "gpt_oss", "llama4_text", "zaya"])
def test_a_process_reads_its_own_experts(family: str, tmp_path: Path) -> None:
    """On disk experts are fused, or one tensor each, with biases or transposed; a process reads only its part."""
    folder, config = tmp_path / "model", tiny_config(family)
    Subject(family).model().save_pretrained(folder)

    def work(rank: int) -> Any:
        model = load_held(str(folder), type(config).from_pretrained(folder), torch.float32, CPU, 2)
        assert type(model) is MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        layout = find_layout(model)
        assert layout is not None
        experts = share_experts(model, layout, Peers(rank, 2))
        assert all(own.untyped_storage().nbytes() == own.nbytes for own in experts.aside.values()), "not a view"
        assert all(each.untyped_storage().nbytes() == 4 for _, each in experts.parameters(model)), "placeholders"
        experts.take(model.requires_grad_(False), Rates())
        return dict(model.named_parameters())

    parts = in_processes(2, work, tmp_path)
    for name, weight in load_plain(str(folder), "fp32", CPU).named_parameters():
        found = torch.cat([part[name] for part in parts]) if ".experts." in name else parts[1][name]
        assert torch.equal(found, weight), name


def test_a_number_of_processes_that_does_not_divide_the_experts_is_refused() -> None:
    with pytest.raises(MoeError, match=r"with 3 processes: .* has 4 experts; expected .* that divides them: 2, 4"):
        require_divisible(tiny_models.config("mixtral"), 3)
    with pytest.raises(MoeError, match="'ep' is not valid for this model: it is dense"):
        require_divisible(tiny_models.config("llama"), 2)


def test_experts_with_rows_for_other_choices_are_refused() -> None:
    """LongCat's choices that compute nothing have rows in its up projection; Zaya's have none."""
    wanted = r"'ep' is not valid for LongcatFlash: gate_up_proj of LongcatFlashExperts is a stack of 6 .* for 4 experts"
    with pytest.raises(MoeError, match=wanted):
        require_divisible(tiny_config("longcat_flash"), 2)
    assert require_divisible(tiny_config("zaya"), 2).idle_choices == 1


REFUSED: dict[str, dict[str, Any]] = {
    "adapter.quantize_base true": {"adapter": {"quantize_base": True}},
    "adapter.use_dora true": {"adapter": {"use_dora": True}},
    "options.save_merged true": {"options": {"save_merged": True}},
    "training.dtype 'fp16'": {"training": {"dtype": "fp16"}},
    "moe.enable_moe_optimizations false": {"moe": {"enable_moe_optimizations": False}},
    "moe.experts_backend 'peft'": {"moe": {"experts_backend": "peft"}},
    "moe.moe_load_balancing 'expert_choice'": {"moe": {"moe_load_balancing": "expert_choice"}},
    "an eval block": {"eval": {"retain_dataset_id": "kept"}},
}


@pytest.mark.parametrize("named", REFUSED)
def test_settings_that_are_not_valid_with_it_are_refused(named: str) -> None:
    body = {"recipe": "sft", "job_uuid": "a", "model": "m", "data": {"dataset_id": "d"}, "adapter": {}}
    resources = {"gpus": 0, "processes": 2, "strategy": "ep"}
    JOB_SPEC.validate_python({**body, "resources": resources})
    with pytest.raises(ValidationError, match=r"resources\.strategy: 'ep' is not valid with ") as refused:
        JOB_SPEC.validate_python({**body, "resources": resources, **REFUSED[named]})
    assert named in str(refused.value)

"""TRL's head is replaced where it would give other figures than the model, also where the weights are in parts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from trl.trainer.utils import add_fused_lm_head

from llama_stack_provider_moe.compute.models.heads import differs_after_backbone, needs_plain_head
from llama_stack_provider_moe.compute.moe.layout import decoder_layers
from tests.support.ep_group import in_processes
from tests.support.family_subject import Subject

# Model type -> whether TRL's head needs replacing.
DIFFERS = {
    "inkling_text": True,  # it divides hidden states by a number that TRL does not know
    "gemma4_text": False,  # TRL knows its soft cap,
    "cohere2_moe": False,  # its factor,
    "granitemoe": False,  # and its divisor
    "mixtral": False,
}


@pytest.mark.parametrize("model_type", DIFFERS)
def test_a_sharded_model_is_judged_as_a_whole_one(model_type: str, tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        model = Subject(model_type).model()
        add_fused_lm_head(model)
        whole = needs_plain_head(model)
        mesh = init_device_mesh("cpu", (2,))
        for layer in decoder_layers(model)[1]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert isinstance(model, FSDPModule)
        return whole, needs_plain_head(model)

    expected = DIFFERS[model_type]
    assert in_processes(2, work, tmp_path) == [(expected, expected)] * 2


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [("final_logit_softcapping", 5.0, False), ("final_logit_softcapping", None, False), ("logit_scale", 0.5, True)],
)
def test_settings_of_the_head_are_compared(setting: str, value: float | None, expected: bool) -> None:
    """TRL takes `logit_scale` from any config, and Gemma does not scale."""
    model = Subject("gemma4_text").model()
    setattr(model.config, setting, value)
    assert differs_after_backbone(model) is expected


def test_no_weight_is_read_and_nothing_changes() -> None:
    model = Subject("inkling_text").model()
    before = vars(model).copy()
    with torch.device("meta"):
        blank = type(model)(model.config)
    assert differs_after_backbone(model)
    assert differs_after_backbone(blank)
    assert vars(model) == before
